"""Stage `export`: the tuned model as ONNX graphs, compared with PyTorch.

Reads models/tuned and test prompts; writes models/onnx (optimum's portable graph), models/fused
(GroupQueryAttention) and reports/export.json. A difference over the limit fails the stage.
With export.device=cuda (no GPU needed) it writes models/cuda/fused-fp16, models/cuda/torch-fp16 (only
weights, for PyTorch) and reports/export/cuda.json.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import config, files
from pipeline.model import agreement, onnx_export
from pipeline.provenance import provenance
from pipeline.toolcall.conversation import parse_request

log = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    device: str
    cuda_graph: bool  # on CUDA, replay one-token steps as a CUDA graph
    prompts: int  # test requests on which the models are compared
    max_logit_difference: float  # allowed, over all positions of the prompts
    max_logit_difference_fp16: float
    min_same_reply_fraction: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        config.require_one_of("export.device", self.device, ["cpu", "cuda"])
        config.require_range("export.prompts", self.prompts, 1, 100_000)
        config.require_range("export.max_logit_difference", self.max_logit_difference, 0, 1e6)
        config.require_range("export.max_logit_difference_fp16", self.max_logit_difference_fp16, 0, 1e6)
        config.require_range("export.min_same_reply_fraction", self.min_same_reply_fraction, 0, 1)
        config.require_range("export.max_new_tokens", self.max_new_tokens, 1, 100_000)


@dataclass
class Params:
    paths: config.Paths
    export: ExportConfig


def run(paths: config.Paths, report: Path, cfg: ExportConfig) -> dict[str, Any]:
    tuned, models = paths.models / "tuned", paths.models
    rows = files.read_spread(paths.prepared / "test.jsonl", cfg.prompts)
    requests = [parse_request(value, (), where) for where, value in rows]
    metrics: dict[str, Any] = {}
    for name, export in exporters(cfg).items():
        log.info("exporting models/%s", name)
        with files.whole_folder(models / name) as folder:
            export(tuned, folder)
            shutil.copy(paths.tools, folder / "tools.json")  # the tools the model was trained to call
            found = agreement.parity(tuned, folder, requests, cfg.max_new_tokens)
            log.info("%s: %s", name, found)
            _require(name, found, cfg)
            metrics[name] = found | {"model_bytes": files.folder_bytes(folder)}
    files.write_json(report, metrics | {"prompts": len(requests), "provenance": provenance(cfg)})
    return metrics


def exporters(cfg: ExportConfig) -> dict[str, Callable[[Path, Path], None]]:
    """Export function for each folder in models."""
    if cfg.device == "cpu":
        return {"onnx": onnx_export.export_portable, "fused": onnx_export.export_fused}
    fused = partial(onnx_export.export_fused, device="cuda", cuda_graph=cfg.cuda_graph)
    return {"cuda/torch-fp16": onnx_export.export_half, "cuda/fused-fp16": fused}


def _require(name: str, found: dict[str, Any], cfg: ExportConfig) -> None:
    key = "max_logit_difference" if cfg.device == "cpu" else "max_logit_difference_fp16"
    if found["max_logit_difference"] > getattr(cfg, key):
        raise RuntimeError(
            f"models/{name} differs from PyTorch by {found['max_logit_difference']:.4g} in a logit; "
            f"export.{key} allows {getattr(cfg, key):g}"
        )
    if found["same_reply_fraction"] < cfg.min_same_reply_fraction:
        raise RuntimeError(
            f"models/{name} gives PyTorch's reply on {found['same_reply_fraction']:.1%} of the prompts; "
            f"export.min_same_reply_fraction asks for {cfg.min_same_reply_fraction:.1%}"
        )


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    report = params.paths.reports / ("export.json" if params.export.device == "cpu" else "export/cuda.json")
    run(params.paths, report, params.export)


if __name__ == "__main__":
    main()
