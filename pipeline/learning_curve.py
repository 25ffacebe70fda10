"""Exact calls by the number of training requests and by the training's seed. Not a stage.

    python -m pipeline.learning_curve                              hours: each point is a training
    python -m pipeline.learning_curve 'learning_curve.seeds=[]'    only the numbers of requests

The default run is scored from its existing models; each other trial is prepared, trained, exported and scored in its
own folder under models, which is removed after scoring. Rows go to reports/learning_curve.json. A trial already done
with the same settings, data and base model is not repeated, and an interrupted training goes on. Every trial is scored
on the hand-written validation requests, which serve to choose the number; those with the default number also on the
test. Also writes learning-curve.png; the stage `report` shows both.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import learning_section
from pipeline.prepare import PrepareConfig
from pipeline.provenance import provenance
from pipeline.runtime.generation import Techniques
from pipeline.train import TrainConfig

log = logging.getLogger(__name__)

VARIANT = "fused-fp32"
SCORES = ("n", "exact_call_fraction", "exact_call_ci95")


@dataclass
class LearningCurveConfig:
    requests: list[int]  # values of prepare.requests; the one in params.yaml is measured too
    seeds: list[int]  # values of train.seed; the one in params.yaml is measured too

    def __post_init__(self) -> None:
        for n in self.requests:
            config.require_range("learning_curve.requests", n, 20, 10_000_000)


@dataclass
class Params:
    paths: config.Paths
    prepare: PrepareConfig
    train: TrainConfig
    techniques: Techniques
    learning_curve: LearningCurveConfig


@dataclass(frozen=True)
class Trial:
    requests: int
    seed: int


def run(params: Params, overrides: list[str]) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError if models/fused was not made with these settings, CalledProcessError if a
    stage of a trial failed: its own message is printed above.
    """
    paths, default = params.paths, Trial(params.prepare.requests, params.train.seed)
    report = paths.reports / "learning_curve.json"
    origin = provenance((params.prepare, params.train, params.techniques)) | {"inputs_sha256": inputs_sha256(params)}
    found: dict[str, Any] = files.read_json(report) if report.exists() else {}
    if found.get("provenance", {}).get("inputs_sha256") != origin["inputs_sha256"]:
        require_default_run(params)
        if found:
            log.info("%s is of other settings, data or another base model: all trials are done anew", report)
        found = {"default": asdict(default), "rows": [default_row(params, default, overrides)], "provenance": origin}
        save(found, report)
    sizes = [Trial(n, default.seed) for n in sorted(params.learning_curve.requests)]
    for trial in [*sizes, *(Trial(default.requests, seed) for seed in params.learning_curve.seeds)]:
        if any(row["requests"] == trial.requests and row["seed"] == trial.seed for row in found["rows"]):
            log.info("%s was done before", trial)
            continue
        folder = paths.models / "learning_curve" / f"{trial.requests}-{trial.seed}"
        on_test = trial.requests == default.requests
        found["rows"].append(row(params, trial, folder, on_test=on_test, overrides=overrides))
        save(found, report)
        shutil.rmtree(folder)
    return found


def save(found: dict[str, Any], report: Path) -> None:
    files.write_json(report, found)
    learning_section.plot(found, report.with_name("learning-curve.png"))


def inputs_sha256(params: Params) -> str:
    """Hash of the inputs that all trials share; the base model's source.json contains the hash of its weights."""
    read = [params.paths.models / "base/source.json", params.paths.tools, *requests_files(params.paths.requests)]
    text = json.dumps(
        {
            "prepare": asdict(params.prepare),
            "train": asdict(params.train),
            "techniques": asdict(params.techniques),
            "files": [files.sha256(path) for path in read],
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def requests_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*.*") if file.suffix != ".md")


def require_default_run(params: Params) -> None:
    trained = files.read_json(params.paths.reports / "train.json")
    if trained["provenance"]["settings_sha256"] != provenance(params.train)["settings_sha256"]:
        raise ValueError("reports/train.json is of other settings than train's: dvc repro trains anew")


def default_row(params: Params, default: Trial, overrides: list[str]) -> dict[str, Any]:
    paths = params.paths
    own = [*overrides, f"paths.models={paths.models}"]
    with files.whole_folder(paths.models / "learning_curve") as folder:
        exact = score(paths.prepared / "validation-hand.jsonl", folder / "exact.json", own)
    shutil.rmtree(paths.models / "learning_curve")
    on_test = files.read_json(paths.reports / f"evaluate/{VARIANT}.json")
    return row_of(default, paths.reports / "train.json", exact, on_test)


def row(params: Params, trial: Trial, folder: Path, on_test: bool, overrides: list[str]) -> dict[str, Any]:
    """Train and score one trial. If it fails or is interrupted, its folder stays and the next run goes on in it."""
    paths = params.paths
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_symlink():
        (folder / "base").symlink_to((paths.models / "base").resolve(), target_is_directory=True)
    prepared = folder / "prepared"
    own = [f"paths.prepared={prepared}", f"paths.models={folder}", f"paths.reports={folder}"]
    own += [f"prepare.requests={trial.requests}", f"train.seed={trial.seed}"]
    log.info("%s ...", trial)
    for name in ("prepare", "train", "export"):
        stage(name, [*overrides, *own])
    exact = score(prepared / "validation-hand.jsonl", folder / "exact.json", [*overrides, *own])
    tested = score(prepared / "test.jsonl", folder / "exact-test.json", [*overrides, *own]) if on_test else None
    return row_of(trial, folder / "train.json", exact, tested)


def row_of(trial: Trial, train: Path, exact: dict[str, Any], on_test: dict[str, Any] | None) -> dict[str, Any]:
    trained = files.read_json(train)
    return {
        **asdict(trial),
        "commit": trained["provenance"]["commit"],  # the default run's may differ from the current one
        "train_requests": trained["train_requests"],
        "steps": trained["steps"],
        "train_s": trained["train_s"],
        "best_validation_loss": trained["best_validation_loss"],
        "validation_hand": {key: exact[key] for key in SCORES},
        "test": on_test and {key: on_test[key] for key in SCORES},
    }


def score(requests: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    stage("evaluate", [*overrides, f"variant={VARIANT}", f"evaluate.requests={requests}", f"evaluate.out={out}"])
    return dict(files.read_json(out))


def stage(name: str, overrides: list[str]) -> None:
    subprocess.run([sys.executable, "-m", f"pipeline.{name}", *overrides], check=True)  # noqa: S603


@config.main
def main(raw: DictConfig) -> None:
    given = [text for text in HydraConfig.get().overrides.task if not text.startswith("learning_curve.")]
    run(config.load(raw, Params), given)


if __name__ == "__main__":
    main()
