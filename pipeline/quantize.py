"""Stage `quantize`: the fused graph with its weights in 8 or 4 bits.

Reads models/fused and validation requests; writes models/{variant} and reports/quantize/{variant}.json.
"""

import logging
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.model import agreement, onnx_export, onnx_quantize
from pipeline.provenance import provenance
from pipeline.toolcall.conversation import parse_request

log = logging.getLogger(__name__)


@dataclass
class VariantConfig:
    bits: int
    algorithm: str
    block_size: int
    symmetric: bool
    accuracy_level: int  # 0: as the weights' scales, 4: computes in int8

    def __post_init__(self) -> None:
        config.require_one_of("quantize.VARIANT.bits", self.bits, [4, 8])
        config.require_one_of("quantize.VARIANT.algorithm", self.algorithm, ["rtn", "k_quant"])
        config.require_one_of("quantize.VARIANT.block_size", self.block_size, [16, 32, 64, 128, 256])
        config.require_one_of("quantize.VARIANT.accuracy_level", self.accuracy_level, [0, 1, 2, 3, 4])
        if self.algorithm == "k_quant" and (self.bits, self.block_size, self.symmetric) != (4, 32, False):
            raise ValueError("quantize.VARIANT.algorithm k_quant is 4 bits, block_size 32, symmetric false only")


@dataclass
class QuantizeConfig:
    int8: VariantConfig
    int4: VariantConfig
    prompts: int  # hand-written validation requests to compare with fp32 on

    def __post_init__(self) -> None:
        config.require_range("quantize.prompts", self.prompts, 1, 100_000)


@dataclass
class Params:
    paths: config.Paths
    variant: str
    quantize: QuantizeConfig

    def __post_init__(self) -> None:
        config.require_one_of("variant", self.variant, ["int8", "int4"])


def run(fused: Path, prepared: Path, out: Path, report: Path, variant: str, cfg: QuantizeConfig) -> dict[str, Any]:
    settings: VariantConfig = getattr(cfg, variant)
    requests = [
        parse_request(value, (), where)
        for where, value in islice(files.read_jsonl(prepared / "validation-hand.jsonl"), cfg.prompts)
    ]
    log.info("quantizing to %s: %s", variant, settings)
    start = time.perf_counter()
    with files.whole_folder(out) as folder:
        counts = onnx_quantize.quantize(fused / "model.onnx", folder / "model.onnx", settings)
        onnx_export.copy_tokenizer(fused, folder)
        files.write_json(folder / "toolcaller.json", {"runtime": "fused", "quantize": asdict(settings)})
        model_bytes, fp32_bytes = graph_bytes(folder), graph_bytes(fused)
        metrics = {
            "variant": variant,
            "model_bytes": model_bytes,
            "fp32_bytes": fp32_bytes,
            "size_fraction": model_bytes / fp32_bytes,
            "weights_by_bits": {str(bits): n for bits, n in sorted(counts.items()) if n},
            "settings": asdict(settings),
            "quantize_s": time.perf_counter() - start,
            **agreement.closeness(fused, folder, requests),
        }
    files.write_json(report, metrics | {"provenance": provenance(settings)})
    log.info("%s: %.1f%% of fp32's bytes", variant, 100 * model_bytes / fp32_bytes)
    return metrics


def graph_bytes(folder: Path) -> int:
    """The graph and its weights, without the tokenizer."""
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


@hydra.main(version_base="1.3", config_path="..", config_name="params")
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    paths, variant = params.paths, params.variant
    report = paths.reports / "quantize" / f"{variant}.json"
    run(paths.models / "fused", paths.prepared, paths.models / variant, report, variant, params.quantize)


if __name__ == "__main__":
    main()
