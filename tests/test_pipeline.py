"""The whole pipeline as a user runs it, on a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path) -> Path:
    """A copy of the project with a base of its own and the settings of smoke.yaml."""
    for name in ("pipeline", "data/requests", "data/tools.json", "data/keywords.json", "dvc.yaml"):
        source, copy = ROOT / name, tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    tests_of_hand = tmp_path / "data/requests/test.jsonl"
    lines = tests_of_hand.read_text(encoding="utf-8").splitlines(keepends=True)
    tests_of_hand.write_text("".join(lines[::60]), encoding="utf-8")
    shutil.copytree(tiny_base, tmp_path / "base")
    params = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(ROOT / "tests/smoke.yaml"))
    OmegaConf.save(params, tmp_path / "params.yaml")
    dvc("init", "--no-scm", "-q", cwd=tmp_path)
    dvc("config", "core.analytics", "false", cwd=tmp_path)
    return tmp_path


def dvc(*arguments: str, cwd: Path) -> str:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(cwd)}
    done = subprocess.run(
        [str(bin_folder / "dvc"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_repro_twice_does_the_work_once(project: Path) -> None:
    dvc("repro", cwd=project)
    scored = json.loads((project / "reports/evaluate/int8.json").read_text())
    assert scored["n"] == 7
    assert sum(scored["outcomes"].values()) == 7
    assert (project / "reports/report.md").read_text().startswith("# Which variant to ship")
    assert {path.name for path in (project / "models").iterdir()} >= {
        "base", "tuned", "onnx", "fused", "int8", "int4"
    }  # fmt: skip
    assert "up to date" in dvc("repro", cwd=project)
