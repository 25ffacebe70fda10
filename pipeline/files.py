"""Files that are whole or absent: written under a temporary name, then renamed."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ONE_FILE = "1TB"  # max_shard_size of save_pretrained: the other stages read one model.safetensors


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file, line and column if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place (`file:line`, for error messages) and value; blank lines are skipped.

    Raises ValueError naming the file and line that is not JSON.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg}: {line[:80]!r}") from error


def read_spread(path: Path, n: int) -> list[tuple[str, Any]]:
    """At most `n` rows of read_jsonl, evenly spaced: if the file is sorted by category, each has its share."""
    rows = list(read_jsonl(path))
    return [rows[at * len(rows) // n] for at in range(n)] if n < len(rows) else rows


def write_json(path: Path, value: Any) -> None:
    """Write `value` with sorted keys. NaN and infinity raise ValueError: they are not JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    lines = (json.dumps(value, allow_nan=False, ensure_ascii=False) for value in values)
    write_text(path, "".join(line + "\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; it replaces `path` when the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
