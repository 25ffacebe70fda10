"""Stage `quantize`: the fused graph with its weights in 8 or 4 bits.

Reads models/fused, training requests for calibration and validation requests for comparison;
writes models/{variant} and reports/quantize/{variant}.json. With quantize.device=cuda (no GPU needed)
it reads models/cuda/fused-fp16 and writes models/cuda/{variant} and reports/quantize/cuda/{variant}.json.
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.model import agreement, base, onnx_export, onnx_quantize, scale_tuning, sensitivity
from pipeline.provenance import provenance
from pipeline.runtime.caller import NO_DYNAMIC
from pipeline.toolcall import prompt
from pipeline.toolcall.conversation import Request, parse_request
from pipeline.toolcall.tokenizer import Tokenizer

log = logging.getLogger(__name__)

COMPARED_ON = 64  # training requests that show which matrix products lose most at 4 bits


@dataclass
class VariantConfig:
    bits: int
    algorithm: str
    block_size: int
    symmetric: bool
    accuracy_level: int  # of MatMulNBits; 0: computes in the type of the scales, 4: in int8
    dynamic: bool  # 8-bit activations too, except in the head and float_inputs matrix products
    smoothing: float  # if dynamic: share of the activations' unevenness moved into the weights
    float_inputs: int  # if dynamic: number of matrix products (most uneven inputs) that stay weight-only
    eight_bit_products: int  # if gptq: number of matrix products (highest loss at 4 bits) that keep 8
    tuning_steps: int  # if gptq: steps in which the scales learn the tuned model's predictions; 0: none

    def in_effect(self) -> "VariantConfig":
        """Settings that the algorithm does not use are set to 0, so that a sweep lists only those with an effect."""
        of_gptq, of_dynamic = self.algorithm == "gptq", self.dynamic
        return replace(
            self,
            eight_bit_products=self.eight_bit_products if of_gptq else 0,
            tuning_steps=self.tuning_steps if of_gptq else 0,
            smoothing=self.smoothing if of_dynamic else 0.0,
            float_inputs=self.float_inputs if of_dynamic else 0,
        )

    def __post_init__(self) -> None:
        config.require_one_of("quantize.VARIANT.bits", self.bits, [4, 8])
        config.require_one_of("quantize.VARIANT.algorithm", self.algorithm, ["rtn", "k_quant", "gptq"])
        config.require_one_of("quantize.VARIANT.block_size", self.block_size, [16, 32, 64, 128, 256])
        config.require_one_of("quantize.VARIANT.accuracy_level", self.accuracy_level, [0, 1, 2, 3, 4])
        if self.algorithm == "k_quant" and (self.bits, self.block_size, self.symmetric) != (4, 32, False):
            raise ValueError("quantize.VARIANT.algorithm k_quant is 4 bits, block_size 32, symmetric false only")
        if self.algorithm == "gptq" and not self.symmetric:
            raise ValueError("quantize.VARIANT.algorithm gptq is symmetric true only")
        if self.dynamic and (self.bits, self.algorithm) != (8, "rtn"):
            raise ValueError("quantize.VARIANT.dynamic is 8 bits, algorithm rtn only")
        config.require_range("quantize.VARIANT.eight_bit_products", self.eight_bit_products, 0, 100_000)
        config.require_range("quantize.VARIANT.tuning_steps", self.tuning_steps, 0, 100_000)
        config.require_range("quantize.VARIANT.smoothing", self.smoothing, 0, 1)
        config.require_range("quantize.VARIANT.float_inputs", self.float_inputs, 0, 100_000)


@dataclass
class CudaConfig:
    """Weight-only: the activations stay in float16."""

    int8: VariantConfig
    int4: VariantConfig

    def __post_init__(self) -> None:
        for name, cfg in (("int8", self.int8), ("int4", self.int4)):
            if cfg.dynamic:
                raise ValueError(f"quantize.cuda.{name}.dynamic must be false: {NO_DYNAMIC}")


@dataclass
class QuantizeConfig:
    device: str
    int8: VariantConfig
    int4: VariantConfig
    cuda: CudaConfig  # replaces these two if device is cuda
    prompts: int  # hand-written validation requests for the comparison with fp32
    calibration_requests: int  # training requests whose activations are recorded, if dynamic or gptq

    def __post_init__(self) -> None:
        config.require_one_of("quantize.device", self.device, ["cpu", "cuda"])
        config.require_range("quantize.calibration_requests", self.calibration_requests, 1, 100_000)
        config.require_range("quantize.prompts", self.prompts, 1, 100_000)


@dataclass
class Params:
    paths: config.Paths
    variant: str
    quantize: QuantizeConfig

    def __post_init__(self) -> None:
        config.require_one_of("variant", self.variant, ["int8", "int4"])


def run(paths: config.Paths, report: Path, variant: str, cfg: QuantizeConfig) -> dict[str, Any]:
    fused, prepared, out = paths.models / "fused", paths.prepared, paths.models / variant
    settings: VariantConfig = getattr(cfg, variant)
    if cfg.device == "cuda":
        fused, out = paths.models / "cuda/fused-fp16", paths.models / "cuda" / variant
        settings = getattr(cfg.cuda, variant)
    precision = onnx_export.PRECISIONS[cfg.device]
    rows = files.read_spread(prepared / "validation-hand.jsonl", cfg.prompts)
    requests = [parse_request(value, (), where) for where, value in rows]
    if settings != settings.in_effect():
        log.warning("quantize.%s: %s makes no use of all of %s", variant, settings.algorithm, settings)
    settings = settings.in_effect()
    log.info("quantizing to %s: %s", variant, settings)
    start = time.perf_counter()
    with files.whole_folder(out) as folder:
        texts = calibration_texts(fused, prepared / "train.jsonl", cfg.calibration_requests)
        tune = partial(tuned_scales, paths, settings.tuning_steps) if settings.tuning_steps else None
        counts, compared = onnx_quantize.quantize(
            fused / "model.onnx", folder / "model.onnx", settings, texts, partial(nats_lost, paths), tune
        )
        onnx_export.copy_tokenizer(fused, folder)
        of_fused = files.read_json(fused / "toolcaller.json")
        files.write_json(folder / "toolcaller.json", of_fused | {"quantize": asdict(settings)})
        model_bytes, fused_bytes = graph_bytes(folder), graph_bytes(fused)
        metrics = {
            "variant": variant,
            "model_bytes": model_bytes,
            f"{precision}_bytes": fused_bytes,
            "size_fraction": model_bytes / fused_bytes,
            "weights_by_bits": {bits: n for bits, n in sorted(counts.items()) if n},
            "settings": asdict(settings),
            "quantize_s": time.perf_counter() - start,
            **agreement.closeness(fused, folder, requests),
            "sensitivity": [asdict(product) for product in compared],
        }
    files.write_json(report, metrics | {"provenance": provenance(settings)})
    log.info("%s: %.1f%% of %s's bytes", variant, 100 * model_bytes / fused_bytes, precision)
    return metrics


def calibration_texts(fused: Path, requests: Path, n: int) -> list[tuple[list[int], int]]:
    """Tokens of `n` requests and right calls; and the length of their prefix if an earlier one has it, else 0."""
    tokenizer = Tokenizer(fused)
    found = [parse_request(value, (), where) for where, value in files.read_spread(requests, n)]
    seen: set[tuple[int, ...]] = set()
    texts = []
    for request, tokens in zip(found, agreement.texts(tokenizer, found), strict=True):
        prefix = tuple(prompt.prefix_tokens(tokenizer, request.tools))
        texts.append((tokens, len(prefix) if prefix in seen else 0))
        seen.add(prefix)
    return texts


def nats_lost(paths: config.Paths, rounded: onnx_quantize.AllRounded) -> dict[str, float]:
    model, tokenizer = base.load_tuned(paths.models / "tuned")
    return sensitivity.nats_lost(model, rounded, training_requests(paths, COMPARED_ON), tokenizer)


def tuned_scales(paths: config.Paths, steps: int, rounded: onnx_quantize.AllRounded) -> dict[str, NDArray[np.float32]]:
    model, tokenizer = base.load_tuned(paths.models / "tuned")
    requests = training_requests(paths, steps * scale_tuning.REQUESTS)
    return scale_tuning.tune(model, rounded, requests, tokenizer, steps)


def training_requests(paths: config.Paths, n: int) -> list[Request]:
    return [parse_request(value, (), where) for where, value in files.read_spread(paths.prepared / "train.jsonl", n)]


def graph_bytes(folder: Path) -> int:
    """The graph and its weights, without the tokenizer."""
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    reports = params.paths.reports / ("quantize" if params.quantize.device == "cpu" else "quantize/cuda")
    run(params.paths, reports / f"{params.variant}.json", params.variant, params.quantize)


if __name__ == "__main__":
    main()
