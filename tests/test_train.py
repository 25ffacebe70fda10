import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from pipeline import files, train
from pipeline.model.base import load_tuned
from pipeline.train import LoraSettings, TrainConfig, run

CFG = TrainConfig(
    seed=0,
    method="full",
    learning_rate=1e-3,
    weight_decay=0.01,
    warmup_fraction=0.0,
    epochs=2,
    text_weight=0.2,
    tokens_per_step=400,
    evaluations=4,
    patience=3,
    lora=LoraSettings(rank=4, alpha=8, dropout=0.0),
)
TOOL = {
    "name": "Read",
    "description": "Read.",
    "parameters": {"type": "object", "properties": {"p": {"type": "string"}}},
}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    def requests(names: str) -> list[dict[str, object]]:
        return [
            {
                "id": f"r-{name}",
                "category": "Read",
                "messages": [{"role": "user", "content": f"show {name * 3}"}],
                "tools": [TOOL],
                "expected": {"name": "Read", "arguments": {"p": name * 3}},
            }
            for name in names
        ]

    files.write_jsonl(tmp_path / "train.jsonl", requests("abcdefghijklmnopqrst"))
    files.write_jsonl(tmp_path / "validation.jsonl", requests("uvwxyz"))
    return tmp_path


def trained(base: Path, prepared: Path, out: Path, **changed: object) -> dict[str, object]:
    cfg = dataclasses.replace(CFG, **changed)  # type: ignore[arg-type]
    return run(base, prepared, out / "tuned", out / "train.json", cfg)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_lowers_the_loss_and_leaves_one_plain_model(
    method: str, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    metrics = trained(tiny_base, prepared, tmp_path, method=method, learning_rate=1e-2)
    curve = pd.read_csv(tmp_path / "train/plots/metrics/eval/loss.tsv", sep="\t")
    assert metrics["best_validation_loss"] == pytest.approx(curve["loss"].min(), rel=1e-6)
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0]
    assert curve["step"].iloc[-1] == metrics["steps"]
    assert pd.read_csv(tmp_path / "train/plots/metrics/train/loss.tsv", sep="\t")["step"].is_monotonic_increasing
    tuned, _ = load_tuned(tmp_path / "tuned")
    base, _ = load_tuned(tiny_base)
    assert tuned.state_dict().keys() == base.state_dict().keys()  # LoRA is merged
    moved = [name for name, weight in tuned.state_dict().items() if not torch.equal(weight, base.state_dict()[name])]
    assert moved
    assert not (tmp_path / "tuned.checkpoints").exists()


def test_training_stops_early_and_keeps_the_best(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    """A learning rate this high only makes it worse."""
    metrics = trained(tiny_base, prepared, tmp_path, learning_rate=1.0, evaluations=20, epochs=10, patience=2)
    assert metrics["stopped_early"]
    curve = pd.read_csv(tmp_path / "train/plots/metrics/eval/loss.tsv", sep="\t")
    assert len(curve) < 20
    assert metrics["best_step"] == curve["step"].iloc[int(curve["loss"].argmin())]


def test_interrupted_training_goes_on_and_ends_as_if_it_had_not_been(
    tiny_base: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tiny_base, prepared, tmp_path / "whole")

    class Killed(train.LossCurves):
        def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **more: object) -> None:
            if state.global_step == state.max_steps - 1:  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            super().on_log(args, state, control, logs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "LossCurves", Killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_base, prepared, tmp_path / "cut")
    assert (tmp_path / "cut/tuned.checkpoints").exists()
    assert not (tmp_path / "cut/tuned").exists()
    again = trained(tiny_base, prepared, tmp_path / "cut")
    assert again["best_validation_loss"] == pytest.approx(whole["best_validation_loss"], rel=1e-4)
    curves = [pd.read_csv(tmp_path / name / "train/plots/metrics/eval/loss.tsv", sep="\t") for name in ("whole", "cut")]
    assert curves[0]["step"].tolist() == curves[1]["step"].tolist()


def test_checkpoints_of_other_settings_are_not_gone_on_from(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    left = tmp_path / "tuned.checkpoints/checkpoint-1"
    left.mkdir(parents=True)
    files.write_json(left.parent / "inputs.json", {"settings": "other"})
    metrics = trained(tiny_base, prepared, tmp_path)
    assert metrics["steps"] == metrics["steps_planned"]
