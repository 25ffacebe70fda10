"""Manifest of a released folder: SHA-256 of its files and its prompts' form. A folder that differs is not loaded."""

from pathlib import Path

from pipeline import files
from pipeline.toolcall import prompt

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    files.write_json(folder / NAME, {"prompt": prompt.form(), "sha256": _hashes(folder)})


def check_manifest(folder: Path) -> None:
    """Does nothing if there is no manifest.

    Raises ValueError naming the first file that is missing, changed or not listed, or if the model was made by a
    version of this package whose prompts have another form.
    """
    if not (folder / NAME).exists():
        return
    manifest = files.read_json(folder / NAME)
    if manifest.get("prompt") != prompt.form():
        raise ValueError(
            f"{folder / NAME}: the model was trained on prompts of another form than this version of the package "
            f"writes ({str(manifest.get('prompt'))[:12]}, here {prompt.form()[:12]}): use the version that released it"
        )
    expected: dict[str, str] = manifest["sha256"]
    found = _hashes(folder)
    for name in sorted({*expected, *found}):
        if name not in found:
            raise ValueError(f"{folder / name}: missing, but {NAME} lists it")
        if name not in expected:
            raise ValueError(f"{folder / name}: not listed in {NAME}")
        if found[name] != expected[name]:
            raise ValueError(f"{folder / name}: changed since its release: {NAME} has another hash")


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {str(path.relative_to(folder)): files.sha256(path) for path in paths}
