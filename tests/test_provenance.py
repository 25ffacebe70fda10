from pathlib import Path

import pytest

from pipeline.provenance import provenance


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of an hour ended with FileNotFoundError where its report was to be written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(())["commit"] is None
