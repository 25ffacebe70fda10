"""Hashes of the inputs of a figure, so that a report can refuse figures from different models or requests."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import files


def beside(requests: Path) -> Path:
    """The file of requests that come later in a conversation: FILE-later.jsonl, which may be missing or empty."""
    return requests.with_stem(f"{requests.stem}-later")


REQUESTS = ("requests", "later")  # the keys of inputs_sha256 that are files of requests


def inputs_sha256(requests: Path, folder: Path | None) -> dict[str, str]:
    """Of the file of requests, of the one `beside` it if there is one, and of the weights in `folder` if given."""
    found = {"requests": files.sha256(requests)}
    if beside(requests).exists():
        found["later"] = files.sha256(beside(requests))
    if folder:
        weights = sorted([*folder.glob("model.onnx*"), *folder.glob("*.safetensors")])
        hashes = " ".join(files.sha256(path) for path in weights)
        found["model"] = hashlib.sha256(hashes.encode()).hexdigest()
    return found


def differing(one: dict[str, Any], other: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """The inputs among `keys` in which two reports differ."""
    inputs = [report["provenance"]["inputs_sha256"] for report in (one, other)]
    return [key for key in keys if inputs[0].get(key) != inputs[1].get(key)]
