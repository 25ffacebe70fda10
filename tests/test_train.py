import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import files, train
from pipeline.model.base import load_tuned
from pipeline.model.gptq import nearest
from pipeline.model.int8_training import Int8Products
from pipeline.train import LoraSettings, TrainConfig, run

ROOT = Path(__file__).parents[1]
CFG = TrainConfig(
    seed=0,
    method="full",
    frozen_layers=0,
    frozen_block_size=0,
    learning_rate=1e-3,
    weight_decay=0.01,
    warmup_fraction=0.0,
    epochs=2,
    text_weight=0.2,
    reverse_fraction=0.5,
    precision="float32",
    tokens_per_step=400,
    evaluations=4,
    validation_requests=100,
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
    assert files.read_json(tmp_path / "tuned/config.json")["reverse_requests"] == metrics["reverse_requests"] != 0


def test_training_stops_early_and_keeps_the_best(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    """What is learned is soon wrong for validation requests whose right calls are others."""
    rows = [value for _, value in files.read_jsonl(prepared / "validation.jsonl")]
    for row in rows:
        row["expected"]["arguments"]["p"] = "#0123456789"
    files.write_jsonl(prepared / "validation.jsonl", rows)
    metrics = trained(tiny_base, prepared, tmp_path, learning_rate=1e-2, evaluations=20, epochs=40, patience=2)
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

    fastest = iter(["float32", "int8"])  # when it goes on, another is
    monkeypatch.setattr(train.PrefixTrainer, "fastest_precision", lambda _: next(fastest))
    with monkeypatch.context() as patch:
        patch.setattr(train, "LossCurves", Killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny_base, prepared, tmp_path / "cut", precision="auto")
    assert (tmp_path / "cut/tuned.checkpoints").exists()
    assert not (tmp_path / "cut/tuned").exists()
    before_s = max(files.read_json(tmp_path / "cut/tuned.checkpoints/seconds.json").values())
    shutil.rmtree(tmp_path / "cut/train")  # as DVC does with the outputs of a stage that it runs again
    again = trained(tiny_base, prepared, tmp_path / "cut", precision="auto")
    assert again["precision"] == "float32"
    assert again["train_s"] > before_s
    assert again["best_validation_loss"] == pytest.approx(whole["best_validation_loss"], rel=1e-4)
    for kind in ("train", "eval"):
        file = f"train/plots/metrics/{kind}/loss.tsv"
        curves = [pd.read_csv(tmp_path / name / file, sep="\t") for name in ("whole", "cut")]
        assert curves[0]["step"].tolist() == curves[1]["step"].tolist()


def test_checkpoints_of_other_settings_are_not_gone_on_from(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    left = tmp_path / "tuned.checkpoints/checkpoint-1"
    left.mkdir(parents=True)
    files.write_json(left.parent / "inputs.json", {"settings": "other"})
    metrics = trained(tiny_base, prepared, tmp_path)
    assert metrics["steps"] == metrics["steps_planned"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_each_precision_learns_the_same(precision: str, tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    metrics = trained(tiny_base, prepared, tmp_path, precision=precision, learning_rate=1e-2)
    assert metrics["precision"] == precision
    curve = pd.read_csv(tmp_path / "train/plots/metrics/eval/loss.tsv", sep="\t")
    assert curve["loss"].iloc[-1] < 0.9 * curve["loss"].iloc[0]


@pytest.mark.parametrize(
    ("step_s", "fastest"),
    [
        ({"float32": 0.1, "bfloat16": 0.2, "int8": 0.2}, "float32"),
        ({"float32": 0.2, "bfloat16": 0.1, "int8": 0.2}, "bfloat16"),
        ({"float32": 0.2, "bfloat16": 0.4, "int8": 0.1}, "int8"),
        ({"float32": 0.2, "bfloat16": 0.4, "int8": 0.17}, "int8"),
        ({"float32": 0.2, "bfloat16": 0.4, "int8": 0.195}, "float32"),  # saves too little for what it costs
    ],
)
def test_auto_takes_the_precision_whose_steps_are_fastest(
    step_s: dict[str, float],
    fastest: str,
    tiny_base: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_loss, now_s = train.PrefixTrainer.compute_loss, 0.0

    def slowed(self: train.PrefixTrainer, *given: Any, **more: Any) -> Any:
        nonlocal now_s
        int8 = isinstance(self.products, Int8Products)
        now_s += step_s["int8" if int8 else str(self.dtype).removeprefix("torch.")]
        return compute_loss(self, *given, **more)

    monkeypatch.setattr(train.PrefixTrainer, "compute_loss", slowed)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now_s))
    assert trained(tiny_base, prepared, tmp_path, precision="auto", epochs=0.1, evaluations=1)["precision"] == fastest


def test_int8_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"train\.precision is int8, which is for CPUs"):
        train.refuse_int8_on_a_gpu("int8")


def test_frozen_layers_stay(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    trained(tiny_base, prepared, tmp_path, frozen_layers=1, learning_rate=1e-2)
    base, _ = load_tuned(tiny_base)
    tuned, _ = load_tuned(tmp_path / "tuned")
    moved = {name for name, weight in tuned.named_parameters() if not torch.equal(weight, base.state_dict()[name])}
    assert moved
    assert all(name.startswith(("model.layers.1.", "model.norm")) for name in moved)
    with pytest.raises(ValueError, match=r"train\.frozen_layers is 99, but the model has"):
        trained(tiny_base, prepared, tmp_path, frozen_layers=99)


def test_frozen_weights_go_on_the_grid_of_int4(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    trained(tiny_base, prepared, tmp_path, frozen_layers=1, frozen_block_size=64)
    base, tuned = (load_tuned(folder)[0].state_dict() for folder in (tiny_base, tmp_path / "tuned"))
    for name, block_size in (("layers.0.mlp.up_proj", 64), ("embed_tokens", 32)):
        before, after = (found[f"model.{name}.weight"].numpy().T for found in (base, tuned))
        assert (after == nearest(before, 4, block_size)).all()
        assert not (after == before).all()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_base: Path, prepared: Path, tmp_path: Path) -> None:
    """Started by accelerate, they share each step's requests: 20 requests in steps of 400 tokens."""
    params = OmegaConf.merge(
        OmegaConf.load(ROOT / "params.yaml"),
        {"train": dataclasses.asdict(dataclasses.replace(CFG, precision="float32"))},
        {"paths": {"prepared": str(prepared)}},
    )
    curves = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        shutil.copytree(tiny_base, folder / "models/base")
        shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        OmegaConf.save(params, folder / "params.yaml")
        # --multi_gpu is what starts processes on one host; where there is no GPU they are CPU processes
        many = ["--multi_gpu", f"--main_process_port={free_port()}"] if processes > 1 else ["--cpu"]
        launch = [
            *many,
            f"--num_processes={processes}",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
        ]
        found = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "pipeline.train"],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        curves[processes] = [
            pd.read_csv(folder / f"reports/train/plots/metrics/{name}/loss.tsv", sep="\t")["loss"]
            for name in ("train", "eval")
        ]
        assert files.read_json(folder / "reports/train.json")["processes"] == processes
    for one, two in zip(curves[1], curves[2], strict=True):
        assert len(one) >= 4
        assert one.tolist() == pytest.approx(two.tolist(), rel=1e-4)
    one, two = (load_tuned(tmp_path / str(processes) / "models/tuned")[0].state_dict() for processes in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_all_that_the_assistant_said_is_learnt_and_each_reply_once(tiny_base: Path) -> None:
    tokenizer = load_tuned(tiny_base)[1]
    call = '<tool_call>{"name": "Read", "arguments": {"p": "a"}}</tool_call>'
    said = [
        {"role": "user", "content": "show a"},
        {"role": "assistant", "content": call},
        {"role": "tool", "content": "1\tone"},
        {"role": "assistant", "content": "It says one."},
        {"role": "user", "content": "and b"},
    ]
    last: dict[str, Any] = {"id": "2", "category": "Read", "messages": said, "tools": [TOOL]}
    last["expected"] = {"name": "Read", "arguments": {"p": "b"}}
    first = {**last, "id": "1", "messages": said[:1], "expected": {"name": "Read", "arguments": {"p": "a"}}}
    alone, again = train.read_examples([("1", first), ("2", last)], tokenizer, 0.2)
    (whole,) = train.read_examples([("2", last)], tokenizer, 0.2)
    texts = [tokenizer.decode(whole.tokens[reply.start : reply.end]) for reply in whole.replies]
    assert texts == ["<tool_call>Read\np: a<|im_end|>", "It says one.<|im_end|>", "<tool_call>Read\np: b<|im_end|>"]
    assert [reply.weight for reply in whole.replies] == [1.0, 0.2, 1.0]
    assert alone.tokens == whole.tokens[: whole.replies[0].end]
    assert again.replies == whole.replies[1:]


def test_single_requests_for_a_call_are_learnt_in_reverse_order_too(tiny_base: Path) -> None:
    tokenizer = load_tuned(tiny_base)[1]
    single: dict[str, Any] = {
        "id": "1",
        "category": "Read",
        "messages": [{"role": "user", "content": "show a"}],
        "tools": [TOOL],
        "expected": {"name": "Read", "arguments": {"p": "a"}},
    }
    text = {**single, "category": "none", "expected": None, "reply": "What is a?"}
    answered = {"role": "assistant", "content": "It is there."}
    later = {**single, "messages": [*single["messages"], answered, *single["messages"]]}
    rows = [("1", single), ("2", text), ("3", later)]
    (found,) = train.reverse_examples(rows, tokenizer, dataclasses.replace(CFG, reverse_fraction=1.0))
    (forward,) = train.read_examples(rows[:1], tokenizer, 0.2)
    assert found.tokens[: found.prefix] == forward.tokens[: forward.prefix]
    assert tokenizer.decode(found.tokens[found.prefix :]) == (
        "<|im_start|>assistant\n<tool_call>Read\np: a<|im_end|>\n<|im_start|>user\nshow a<|im_end|>"
    )
    (reply,) = found.replies
    assert tokenizer.decode(found.tokens[reply.start : reply.end]) == "show a<|im_end|>"
    assert (reply.weight, reply.first_weight) == (0.2, 0.2)
    assert train.reverse_examples(rows, tokenizer, dataclasses.replace(CFG, reverse_fraction=0.0)) == []
