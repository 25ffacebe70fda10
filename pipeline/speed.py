"""Stage `speed` of pipeline/cuda/dvc.yaml: how fast models of other sizes are. Speed only, random weights.

Reads only a tokenizer, which the exporters need; writes reports/benchmark/cuda/speed/{shape}.json. In every variant a
call reads `request_tokens` after a cached prefix and decodes `new_tokens` one by one: no grammar, no drafts.
"""

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench.statistics import percentiles
from pipeline.model import onnx_export, onnx_quantize
from pipeline.model.shape import SHAPES, Shape, random_model
from pipeline.provenance import provenance
from pipeline.runtime.caller import load_runtime
from pipeline.runtime.cuda_rows import CudaRowsRuntime
from pipeline.runtime.fixed import call, peak_rss_bytes
from pipeline.runtime.generation import Runtime, Step

log = logging.getLogger(__name__)

VARIANTS = ("torch-fp32", "torch-fp16", "fused-fp16", "int8", "int4")


@dataclass
class SpeedConfig:
    shape: str
    device: str
    threads: int
    block_size: int  # of the quantized weights
    prefix_tokens: int
    request_tokens: int
    new_tokens: int
    warmup_calls: int
    calls: int
    clients: list[int]
    max_logit_difference_fraction: float  # of the largest logit; GPU against CPU, many together against one

    def __post_init__(self) -> None:
        config.require_one_of("speed.shape", self.shape, list(SHAPES))
        config.require_one_of("speed.device", self.device, ["cpu", "cuda"])
        config.require_range("speed.threads", self.threads, 1, 1024)
        config.require_one_of("speed.block_size", self.block_size, [16, 32, 64, 128, 256])
        for name in ("prefix_tokens", "request_tokens", "new_tokens"):
            config.require_range(f"speed.{name}", getattr(self, name), 1, 1000)
        config.require_range("speed.warmup_calls", self.warmup_calls, 0, 1000)
        config.require_range("speed.calls", self.calls, 1, 100_000)
        config.require_ranges("speed.clients", self.clients, 1, 64)
        config.require_range("speed.max_logit_difference_fraction", self.max_logit_difference_fraction, 0, 1)


@dataclass
class Params:
    paths: config.Paths
    speed: SpeedConfig


def run(tokenizer: Path, report: Path, shape: Shape, cfg: SpeedConfig) -> dict[str, Any]:
    """`shape`: that of cfg.shape, or a smaller one to try things with."""
    variants: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        log.info("making %s with random weights", cfg.shape)
        make(Path(scratch), tokenizer, shape, cfg.block_size)
        for name in VARIANTS:
            # One process per variant, so that no memory is left over from the one before.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                variants[name] = process.submit(measure, Path(scratch) / name, cfg).result()
            log.info("%s %s: p50 %.1f ms", cfg.shape, name, 1e3 * variants[name]["call_s"]["p50"])
    metrics = {
        "what": "speed only, random weights",
        "shape": cfg.shape,
        "source": shape.source,
        "device": cfg.device,
        "new_tokens": cfg.new_tokens,
        "variants": variants,
    }
    files.write_json(report, metrics | {"provenance": provenance(cfg)})
    return metrics


def make(scratch: Path, tokenizer: Path, shape: Shape, block_size: int) -> None:
    """Make one folder per variant. Weights are rounded to nearest: no other rounding helps random ones."""
    for name in VARIANTS:
        (scratch / name).mkdir()
    plain, fused = scratch / "torch-fp32", scratch / "fused-fp16"
    random_model(shape, tokenizer, plain)
    onnx_export.export_half(plain, scratch / "torch-fp16")
    onnx_export.export_fused(plain, fused, "cuda")
    for name, bits in (("int8", 8), ("int4", 4)):
        weight_only = {"algorithm": "rtn", "symmetric": True, "accuracy_level": 0, "dynamic": False}
        _quantize(fused, scratch / name, {"bits": bits, "block_size": block_size, **weight_only}, [])


def make_for_cpu(scratch: Path, tokenizer: Path, shape: Shape, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Make one folder per entry of `settings`, which are those of quantize.VARIANT in params.yaml.

    Settings that need calibration get random tokens for it.
    """
    plain, fused = scratch / "torch-fp32", scratch / "fused-fp32"
    for folder in (plain, fused, *(scratch / name for name in settings)):
        folder.mkdir()
    random_model(shape, tokenizer, plain)
    onnx_export.export_fused(plain, fused)
    shutil.rmtree(plain)
    seen = np.random.default_rng(0).integers(1, shape.config["vocab_size"], 64).tolist()
    for name, found in settings.items():
        _quantize(fused, scratch / name, found, [(seen, 0)])
    shutil.rmtree(fused)


def _quantize(fused: Path, out: Path, settings: Mapping[str, Any], rows: onnx_quantize.Rows) -> None:
    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # it logs every node
    onnx_quantize.quantize(fused / "model.onnx", out / "model.onnx", SimpleNamespace(**settings), rows)
    onnx_export.copy_tokenizer(fused, out)
    files.write_json(out / "toolcaller.json", files.read_json(fused / "toolcaller.json"))


def measure(folder: Path, cfg: SpeedConfig) -> dict[str, Any]:
    """To be run in its own process.

    Raises RuntimeError if the logits on the device differ from those on the CPU, or those of many requests decoded
    together from those of one.
    """
    vocabulary = int(files.read_json(folder / "config.json")["vocab_size"])
    tokens = np.random.default_rng(0).integers(1, vocabulary, cfg.prefix_tokens + cfg.request_tokens).tolist()
    prefix, asked = tokens[: cfg.prefix_tokens], tokens[cfg.prefix_tokens :]
    gpu = open_gpu(cfg.device)
    with gpu.watch() if gpu else nullcontext([]) as samples:
        runtime = load_runtime(folder, cfg.device, cfg.threads, prefixes=1)
        made = [call(runtime, prefix, asked, cfg.new_tokens) for _ in range(cfg.warmup_calls + cfg.calls)]
    peak = peak_rss_bytes()
    made = made[cfg.warmup_calls :]
    found = logits_after(runtime, asked)
    on_cpu = logits_after(load_runtime(folder, "cpu", cfg.threads, prefixes=1), asked) if gpu else found
    difference = require_close(f"{folder.name}, on {cfg.device} and on the CPU", found, on_cpu, cfg)
    with gpu.watch() if gpu else nullcontext([]) as busy:
        by_clients = calls_per_s(folder, cfg, prefix, asked)
    one_at_a_time = 1 / statistics.mean(total_s for _, total_s in made)
    return {
        "model_bytes": sum(p.stat().st_size for p in [*folder.glob("model.onnx*"), *folder.glob("*.safetensors")]),
        "call_s": percentiles([total_s for _, total_s in made]),
        "first_token_s": percentiles([first_s for first_s, _ in made]),
        "calls_per_s": by_clients or {str(clients): one_at_a_time for clients in cfg.clients},
        "decode_tokens_per_s": (cfg.new_tokens - 1) * len(made) / max(1e-9, sum(b - a for a, b in made)),
        "peak_rss_bytes": peak,
        "gpu_peak_bytes": None,
        **(measures(samples, busy if by_clients else []) if gpu else {}),
        "gpu": gpu.facts() if gpu else None,
        "logit_difference_fraction": difference,
    }


def calls_per_s(folder: Path, cfg: SpeedConfig, prefix: list[int], asked: list[int]) -> dict[str, float]:
    """By number of clients, whose calls begin and end together, each in a row of the KV cache; median of three.

    Empty for PyTorch, whose runtimes take one request at a time here.
    Raises RuntimeError if the logits of many rows differ from those of one.
    """
    if not (folder / "model.onnx").exists():
        return {}
    runtime = CudaRowsRuntime(folder, cfg.device, cfg.threads, max(cfg.clients))
    alone, rows = (logits_together(runtime, prefix, asked, n) for n in (1, max(cfg.clients)))
    require_close(f"{folder.name}, {len(rows)} requests together and one", rows, alone, cfg)
    found = {}
    for clients in cfg.clients:
        made = [calls_together_s(runtime, prefix, asked, cfg.new_tokens, clients) for _ in range(4)]
        found[str(clients)] = clients / statistics.median(made[1:])  # the first warms up
    return found


def calls_together_s(runtime: CudaRowsRuntime, prefix: list[int], asked: list[int], new_tokens: int, n: int) -> float:
    """Seconds for `n` calls that begin and end together."""
    start = time.perf_counter()
    runtime.begin(prefix)
    rows = [runtime.join() for _ in range(n)]
    steps = [Step(asked, [], len(prefix))] * n
    for at in range(len(prefix) + len(asked), len(prefix) + len(asked) + new_tokens):
        logits = runtime.step_together(list(zip(rows, steps, strict=True)))
        steps = [Step([int(found[0].argmax())], [], at) for found in logits]
    for row in rows:
        runtime.leave(row)
    return time.perf_counter() - start


def logits_together(runtime: CudaRowsRuntime, prefix: list[int], asked: list[int], n: int) -> NDArray[np.float32]:
    """Logits (n, vocabulary) of `n` requests that read `asked` and then, in one step, one token each."""
    runtime.begin(prefix)
    rows = [runtime.join() for _ in range(n)]
    runtime.step_together([(row, Step(asked, [], len(prefix))) for row in rows])
    logits = runtime.step_together([(row, Step(asked[:1], [], len(prefix) + len(asked))) for row in rows])
    for row in rows:
        runtime.leave(row)
    return np.concatenate(logits)


def require_close(whose: str, found: NDArray[np.float32], wanted: NDArray[np.float32], cfg: SpeedConfig) -> float:
    """Their largest difference, as a share of the largest logit. Raises RuntimeError if that is too large."""
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not difference <= cfg.max_logit_difference_fraction:  # also true for NaN
        raise RuntimeError(
            f"{whose}: logits are {difference:.1%} of the largest apart; "
            f"speed.max_logit_difference_fraction allows {cfg.max_logit_difference_fraction:.1%}"
        )
    return difference


def measures(alone: list[Any], busy: list[Any]) -> dict[str, Any]:
    from pipeline.bench.gpu import measures

    return measures(alone, busy)


def open_gpu(device: str) -> Any:
    """A Gpu; None on the CPU, where NVML is not imported."""
    if device == "cpu":
        return None
    from pipeline.bench.gpu import Gpu

    return Gpu()


def logits_after(runtime: Runtime, asked: list[int]) -> NDArray[np.float32]:
    runtime.begin(asked[:1])
    logits: NDArray[np.float32] = runtime.step(asked, 1, 1)[0]
    return logits


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    cfg, report = params.speed, params.paths.reports / f"benchmark/cuda/speed/{params.speed.shape}.json"
    run(params.paths.models / "base", report, SHAPES[cfg.shape], cfg)


if __name__ == "__main__":
    main()
