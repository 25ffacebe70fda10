"""What a figure is of, so that a report can refuse figures of different models or requests."""

import hashlib
from pathlib import Path

from pipeline import files


def beside(requests: Path) -> Path:
    """Where requests stand that come later in a conversation: FILE-later.jsonl; it may be missing, or empty."""
    return requests.with_stem(f"{requests.stem}-later")


def inputs_sha256(requests: Path, folder: Path | None) -> dict[str, str]:
    """Of the file of requests and the one beside it, and of the weights in the model's folder, where there are such."""
    found = {"requests": files.sha256(requests)}
    if beside(requests).exists():
        found["later"] = files.sha256(beside(requests))
    if folder:
        weights = sorted([*folder.glob("model.onnx*"), *folder.glob("*.safetensors")])
        hashes = " ".join(files.sha256(path) for path in weights)
        found["model"] = hashlib.sha256(hashes.encode()).hexdigest()
    return found
