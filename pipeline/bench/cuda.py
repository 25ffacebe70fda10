"""The variants for a GPU, and the gate before they are measured: their replies must equal those on the CPU.

Imports nothing that needs a GPU.
"""

from collections.abc import Sequence
from pathlib import Path

from pipeline import files

FOLDERS = {  # in the models' folder
    "torch-fp32": "tuned",
    "torch-fp16": "cuda/torch-fp16",
    "fused-fp16": "cuda/fused-fp16",
    "int8": "cuda/int8",
    "int4": "cuda/int4",
}
HELD = ("fused-fp16", "int8", "int4")  # use the grammar and all other techniques; the others decode plainly
REFERENCE = "fused-fp16"  # quantized variants are compared with it, request by request


def same_reply_fraction(replies: Sequence[str], on_cpu: Sequence[str]) -> float:
    """Share of requests whose replies are equal in every character."""
    return sum(one == other for one, other in zip(replies, on_cpu, strict=True)) / len(replies)


def require_parity(variant: str, fraction: float, least: float) -> None:
    """Raises RuntimeError if `fraction` is below `least`: some GPUs compute garbage, fast (onnxruntime-genai#2291)."""
    if fraction < least:
        raise RuntimeError(
            f"{variant} gives the CPU's reply on {fraction:.2%} of the requests; "
            f"evaluate.min_same_reply_fraction asks for {least:.2%}: no number of this GPU is written"
        )


def require_evaluated(report: Path, gpu: str) -> None:
    """Raises RuntimeError unless `evaluate` wrote `report` on this `gpu`, with enough replies equal to the CPU's."""
    first = f"first python -m pipeline.evaluate variant={report.stem} evaluate.device=cuda"
    if not report.exists():
        raise RuntimeError(f"no {report}: a GPU is measured once its replies were compared with the CPU's; {first}")
    found = files.read_json(report)
    if found["gpu"] != gpu:
        raise RuntimeError(f"{report} is of {found['gpu']}, and this is {gpu}; {first}")
    require_parity(report.stem, found["same_reply_fraction_vs_cpu"], found["min_same_reply_fraction"])
