"""A sweep as a user starts it, over a tiny model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from pipeline import files

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path, tiny_fused: Path) -> Path:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/tools.json", tmp_path / "data/tools.json")
    for name, hand in (("train", "validation-hand"), ("validation-hand", "validation-hand"), ("test", "test")):
        rows = [value for _, value in files.read_jsonl(ROOT / f"data/requests/{hand}.jsonl")][::40]
        tools = files.read_json(ROOT / "data/tools.json")
        files.write_jsonl(tmp_path / f"data/prepared/{name}.jsonl", [{**row, "tools": tools} for row in rows])
    shutil.copytree(tiny_fused, tmp_path / "models/fused")
    params = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(ROOT / "tests/smoke.yaml"))
    OmegaConf.save(params, tmp_path / "params.yaml")
    return tmp_path


def sweep(project: Path, *overrides: str) -> pd.DataFrame:
    command = [sys.executable, "-m", "pipeline.sweep", "-m", "sweep.name=s", "variant=int4", *overrides]
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return pd.read_csv(project / "reports/sweeps/s/trials.csv")


@pytest.mark.slow
def test_trials_fail_alone_and_are_not_done_twice(project: Path) -> None:
    first = sweep(project, "quantize.int4.algorithm=rtn", "quantize.int4.block_size=32,48")
    assert len(first) == 2
    failed = first[first["error"].notna()]
    assert failed["error"].str.contains(r"block_size must be one of \[16, 32, 64, 128, 256\], got 48").all()
    assert first["recommended"].tolist() == [True, False]
    stamps = {path: path.stat().st_mtime_ns for path in project.glob("reports/sweeps/s/*/trial.json")}
    second = sweep(project, "quantize.int4.algorithm=rtn", "quantize.int4.block_size=32,64")
    assert len(second) == 3
    kept = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp]
    assert len(kept) == 2
    assert not (project / "multirun").exists()
