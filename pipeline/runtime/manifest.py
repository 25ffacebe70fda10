"""What a released folder holds, by SHA-256: a model that was cut or changed on its way is not loaded."""

from pathlib import Path

from pipeline import files

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    files.write_json(folder / NAME, {"sha256": _hashes(folder)})


def check_manifest(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing, changed or not listed; without a manifest, nothing."""
    if not (folder / NAME).exists():
        return
    expected: dict[str, str] = files.read_json(folder / NAME)["sha256"]
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
