"""A sweep as a user starts it, over a tiny model."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from pipeline import files
from pipeline.provenance import machine
from pipeline.sweep import held, summarize

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path, tiny_fused: Path) -> Path:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/tools.json", tmp_path / "data/tools.json")
    for name, hand in (("train", "validation-hand"), ("validation-hand", "validation-hand"), ("test", "test")):
        rows = [value for _, value in files.read_jsonl(ROOT / f"data/requests/{hand}.jsonl")][::40]
        if name == "train":  # where each has a reply
            rows = [row for row in rows if row["expected"]]
        tools = files.read_json(ROOT / "data/tools.json")
        files.write_jsonl(tmp_path / f"data/prepared/{name}.jsonl", [{**row, "tools": tools} for row in rows])
    shutil.copytree(tiny_fused, tmp_path / "models/fused")
    shutil.copytree(tiny_base, tmp_path / "models/tuned")
    params = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(ROOT / "tests/smoke.yaml"))
    OmegaConf.save(params, tmp_path / "params.yaml")
    return tmp_path


def start(project: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.sweep", "-m", "sweep.name=s", "variant=int4", *overrides]
    environment = os.environ | {"PYTHONPATH": str(project)}
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(project: Path, running: subprocess.Popen[str], name: str = "s") -> pd.DataFrame:
    output, _ = running.communicate()
    assert running.returncode == 0, output[-4000:]
    return pd.read_csv(project / f"reports/sweeps/{name}/trials.csv")


def sweep(project: Path, *overrides: str, name: str = "s") -> pd.DataFrame:
    return finish(project, start(project, *overrides), name)


def finished(project: Path) -> dict[Path, int]:
    """When each trial that is done was."""
    return {path: path.stat().st_mtime_ns for path in project.glob("reports/sweeps/s/*/trial.json")}


def is_free(lock: Path) -> bool:
    with lock.open("a+") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_lock_is_held_until_the_stage_that_inherited_it_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock, fcntl.LOCK_SH), held(lock, fcntl.LOCK_SH) as inherited:
        stage = subprocess.Popen(["sleep", "60"], pass_fds=[inherited])  # noqa: S607
    assert not is_free(lock)
    stage.kill()
    stage.wait()
    assert is_free(lock)


def test_trials_of_other_weights_or_machines_are_not_compared(tmp_path: Path) -> None:
    """After a training the old weights' trials stood in the table beside the new ones', with the same names."""
    now = {"inputs_sha256": "new", "machine": "X"}
    trials = {
        "a": (now, 0.5),
        "b": (now, 0.6),
        "c": (now | {"inputs_sha256": "old"}, 0.9),
        "d": ({"machine": "X"}, 0.9),
    }
    for name, (of, exact) in trials.items():
        row = {"trial": name, "overrides": f"x.y={name}", "commit": "1", "error": None, "exact_call_fraction": exact}
        files.write_json(tmp_path / name / "trial.json", row | of | {"p50_s": 0.1, "model_bytes": 9})
    summarize(tmp_path, now, 0.01)
    table = pd.read_csv(tmp_path / "trials.csv")
    assert table["trial"].tolist() == ["b", "a"]
    assert {"commit", "machine", "inputs_sha256"} < set(table)
    assert (tmp_path / "verdict.txt").read_text().startswith("Recommended: y=b, 60.0% exact")


def test_a_verdict_on_other_weights_goes_when_no_trial_of_these_succeeded(tmp_path: Path) -> None:
    files.write_text(tmp_path / "verdict.txt", "of the old weights")
    now = {"inputs_sha256": "new", "machine": "X"}
    row = {"trial": "a", "overrides": "", "error": "no", "exact_call_fraction": None, "p50_s": None}
    files.write_json(tmp_path / "a/trial.json", row | now)
    summarize(tmp_path, now, 0.01)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["trials.csv"]


@pytest.mark.slow
def test_trials_fail_alone_and_are_not_done_twice(project: Path) -> None:
    first = sweep(project, "quantize.int4.algorithm=rtn", "quantize.int4.block_size=32,48")
    assert len(first) == 2
    failed = first[first["error"].notna()]
    assert failed["error"].str.contains(r"block_size must be one of \[16, 32, 64, 128, 256\], got 48").all()
    assert first["recommended"].tolist() == [True, False]
    assert (first["machine"] == machine()["cpu"]).all()
    stamps = finished(project)
    second = sweep(project, "quantize.int4.algorithm=rtn", "quantize.int4.block_size=32,64")
    assert len(second) == 3
    kept = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp]
    assert len(kept) == 2
    assert not (project / "multirun").exists()
    verdict = (project / "reports/sweeps/s/verdict.txt").read_text()
    assert verdict.startswith("Recommended: block_size=")
    third = sweep(project, "sweep.name=t", "quantize.int4.algorithm=rtn,gptq", "quantize.int4.block_size=32", name="t")
    assert third["error"].isna().all()
    times = {path.parent.name: path.stat().st_mtime_ns for path in project.glob("reports/sweeps/*/*/quantize.log")}
    assert len(times) == 4, "the trial that the other sweep had was done again"
    assert first["inputs_sha256"].tolist() == third["inputs_sha256"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("quantize.int4.blocksize=32", "Key 'blocksize' is not in struct"),
        ("variant=int2", "variant must be one of"),
        ("quantize.int8.block_size=32", "quantize.int8.block_size has no effect on a trial of int4"),
        ("train.frozen_layers=0", "train.frozen_layers has no effect on a trial of int4"),
    ],
)
def test_what_no_trial_can_have_is_refused(project: Path, override: str, error: str) -> None:
    running = start(project, override)
    output, _ = running.communicate()
    assert running.returncode != 0
    assert error in output
    assert not finished(project)


@pytest.mark.slow
def test_optuna_goes_on_after_a_failed_trial_and_resumes(project: Path) -> None:
    import optuna

    storage = f"sqlite:///{project}/study.db"
    search = (
        "hydra/sweeper=optuna", "hydra.sweeper.direction=[maximize,minimize,minimize]",
        f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=s", "hydra.sweeper.n_jobs=1",
        "quantize.int4.algorithm=rtn", "quantize.int4.block_size=choice(32,48)",
    )  # fmt: skip
    # The seeds are of draws that begin with 48, 32 and with 32.
    sweep(project, *search, "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=2")
    before = finished(project)
    table = sweep(project, *search, "hydra.sweeper.sampler.seed=2", "hydra.sweeper.n_trials=1")
    assert finished(project) == before
    assert table["error"].notna().sum() == 1
    study = optuna.load_study(study_name="s", storage=storage)
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "COMPLETE", "FAIL"]
    told = {tuple(trial.values) for trial in study.trials if trial.state.name == "COMPLETE"}
    rows = [row for path in finished(project) if not (row := files.read_json(path))["error"]]
    assert told == {(row["exact_call_fraction"], row["p50_s"], row["model_bytes"]) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("joblib", "hydra.launcher.n_jobs=2"),
        ("submitit_local", "hydra.launcher.cpus_per_task=1"),
    ],
    ids=lambda launcher: launcher[0],
)
def test_processes_do_equal_trials_once(project: Path, launcher: tuple[str, str]) -> None:
    name, setting = launcher
    blocks = "quantize.int4.block_size=32,32,64"
    table = sweep(project, f"hydra/launcher={name}", setting, "quantize.int4.algorithm=rtn", blocks)
    assert len(table) == 2
    assert table["error"].isna().all()


@pytest.mark.slow
def test_ray_finishes_every_trial_when_a_node_dies(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(project))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        dying = cluster.add_node(num_cpus=1)
        running = start(
            project, "hydra/launcher=ray", f"hydra.launcher.ray.init.address={cluster.address}",
            "+hydra.launcher.ray.init.object_store_memory=null", "+hydra.launcher.ray.remote.num_cpus=1",
            "quantize.int4.algorithm=rtn",
            "quantize.int4.block_size=16,32", "quantize.int4.symmetric=true,false", "quantize.int4.accuracy_level=0,4",
        )  # fmt: skip
        while len(before := finished(project)) < 3 and running.poll() is None:
            time.sleep(0.2)
        cluster.remove_node(dying, allow_graceful=False)
        table = finish(project, running)
    finally:
        cluster.shutdown()
    assert len(table) == 8
    assert table["error"].isna().all()
    assert before.items() <= finished(project).items()
