import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, files, learning_curve
from pipeline.bench import learning_section
from pipeline.learning_curve import LearningCurveConfig, Params, run
from pipeline.prepare import PrepareConfig
from pipeline.provenance import provenance
from pipeline.runtime.generation import ALL
from pipeline.train import LoraSettings, TrainConfig

PREPARE = PrepareConfig(0, 800, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
TRAIN = TrainConfig(0, "full", 0, 0, 1e-3, 0.0, 0.0, 1, 0.2, 0.0, "float32", 100, 1, 1, 1, LoraSettings(1, 1, 0.0))


class Stages:
    """In place of the stages' processes: each writes what is read of it, and more requests give more right calls."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str, str]] = []
        self.fails = ""

    def __call__(self, name: str, overrides: list[str]) -> None:
        given = dict(text.split("=", 1) for text in overrides)
        trial = given.get("prepare.requests", "800"), given.get("train.seed", "0")
        if name == self.fails:
            raise subprocess.CalledProcessError(1, name)
        self.ran.append((name, *trial))
        if name == "train":
            write_train(Path(given["paths.reports"]), int(trial[0]))
        if name == "evaluate":
            files.write_json(Path(given["evaluate.out"]), scored(40 + int(trial[0]) // 20 + int(trial[1])))

    def count(self, name: str) -> int:
        return sum(ran[0] == name for ran in self.ran)


def write_train(reports: Path, requests: int) -> None:
    made = {"train_requests": requests, "steps": 9, "train_s": 60.0, "best_validation_loss": 0.1}
    files.write_json(reports / "train.json", made | {"provenance": provenance(TRAIN) | {"commit": f"at {requests}"}})


def scored(right: int) -> dict[str, Any]:
    return {"n": 100, "exact_call_fraction": right / 100, "exact_call_ci95": [right / 100 - 0.1, right / 100 + 0.1]}


@pytest.fixture
def params(tmp_path: Path) -> Params:
    names = ("tools.json", "keywords.json", "requests", "prepared", "models", "reports")
    paths = config.Paths(*(tmp_path / name for name in names))
    files.write_json(paths.tools, [])
    files.write_json(paths.models / "base/source.json", {"base": "path:x", "sha256": "0"})
    files.write_jsonl(paths.requests / "train/a.jsonl", [{}])
    write_train(paths.reports, 800)
    files.write_json(paths.reports / "evaluate/fused-fp32.json", scored(78))
    return Params(paths, PREPARE, TRAIN, ALL, LearningCurveConfig([400, 200], [1, 2]))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    monkeypatch.setattr(learning_curve, "stage", found)
    return found


def test_each_number_and_each_seed_is_trained_once(params: Params, stages: Stages) -> None:
    found = run(params, ["train.weight_decay=0.0"])
    assert [(row["requests"], row["seed"]) for row in found["rows"]] == [
        (800, 0), (200, 0), (400, 0), (800, 1), (800, 2)
    ]  # fmt: skip
    assert stages.count("train") == 4  # the default's model is there
    assert [row["commit"] for row in found["rows"]] == ["at 800", "at 200", "at 400", "at 800", "at 800"]
    assert [row["test"] and row["test"]["exact_call_fraction"] for row in found["rows"]] == [
        0.78,
        None,
        None,
        0.81,
        0.82,
    ]
    assert list((params.paths.models / "learning_curve").iterdir()) == []
    assert run(params, [])["rows"] == found["rows"]
    assert stages.count("train") == 4


def test_a_failed_trial_keeps_its_folder_and_those_before(params: Params, stages: Stages) -> None:
    stages.fails = "export"
    with pytest.raises(subprocess.CalledProcessError):
        run(params, [])
    assert (params.paths.models / "learning_curve/200-0/train.json").exists()
    stages.fails = ""
    assert len(run(params, [])["rows"]) == 5


def test_other_data_techniques_or_base_begin_anew(
    params: Params, stages: Stages, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainings of another base, and calls of other techniques, passed for done before."""
    run(params, [])
    files.write_jsonl(params.paths.requests / "train/a.jsonl", [{}, {}])
    run(params, [])
    assert stages.count("train") == 8
    params.techniques = replace(ALL, alternatives=0, reverse_weight=0)
    run(params, [])
    assert stages.count("train") == 12
    caplog.set_level("INFO")
    files.write_json(params.paths.models / "base/source.json", {"base": "path:y", "sha256": "1"})
    run(params, [])
    assert stages.count("train") == 16
    assert "another base model: all trials are done anew" in caplog.text


def test_models_of_other_settings_are_refused(params: Params, stages: Stages) -> None:
    params.train.epochs = 2
    with pytest.raises(ValueError, match="dvc repro trains anew"):
        run(params, [])
    assert stages.ran == []


@pytest.mark.usefixtures("stages")
def test_the_report_has_the_seeds_mean_and_spread(params: Params) -> None:
    assert learning_section.markdown(learning_section.read(params.paths.reports)) == []
    run(params, [])
    text = "\n\n".join(learning_section.markdown(learning_section.read(params.paths.reports)))
    assert "on the test, mean of 3 seeds: 80.3% (78.0 to 82.0, standard deviation 2.1 points)" in text
    assert text.count("| 800") == 3
    assert (params.paths.reports / "learning-curve.png").stat().st_size > 10_000
