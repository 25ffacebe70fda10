"""Speed of other models' shapes: each shape goes through every exporter and runtime, made small and on the CPU."""

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
from omegaconf import OmegaConf

from pipeline import config, speed
from pipeline.model.shape import SHAPES
from pipeline.runtime.cuda_rows import CudaRowsRuntime

ROOT = Path(__file__).parents[1]
SMALL = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def load(*changes: str) -> speed.SpeedConfig:
    raw = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.from_dotlist(list(changes)))
    found: Any = config.load(raw, speed.Params)  # type: ignore[arg-type]
    assert isinstance(found, speed.Params)
    return found.speed


def small(name: str) -> Any:
    shape = SHAPES[name]
    heads = {key: value for key, value in HEADS.items() if key != "head_dim" or "head_dim" in shape.config}
    return dataclasses.replace(shape, config=shape.config | SMALL | heads)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_shape_becomes_graphs_for_cuda(name: str, tiny_base: Path, tmp_path: Path) -> None:
    speed.make(tmp_path, tiny_base, small(name), block_size=32)
    for variant, products in (("fused-fp16", "MatMul"), ("int8", "MatMulNBits"), ("int4", "MatMulNBits")):
        operators = {node.op_type for node in onnx.load(tmp_path / variant / "model.onnx").graph.node}
        assert {"GroupQueryAttention", products} <= operators


def test_report_says_that_weights_are_random(tiny_base: Path, tmp_path: Path) -> None:
    changes = (
        "device=cpu",
        "threads=1",
        "prefix_tokens=8",
        "request_tokens=4",
        "new_tokens=3",
        "calls=2",
        "clients=[1,3]",
    )
    cfg = load(*(f"speed.{change}" for change in (*changes, "shape=phi-4-mini")))
    found = speed.run(tiny_base, tmp_path / "phi-4-mini.json", small("phi-4-mini"), cfg)
    assert (found["what"], found["source"]) == ("speed only, random weights", SHAPES["phi-4-mini"].source)
    assert list(found["variants"]) == list(speed.VARIANTS)
    sizes = [variant["model_bytes"] for variant in found["variants"].values()]
    assert sizes[0] > 1.9 * sizes[1]  # float32, float16
    assert sizes[2] > sizes[3] > sizes[4]
    by_clients = {name: variant["calls_per_s"] for name, variant in found["variants"].items()}
    assert all(set(found) == {"1", "3"} and min(found.values()) > 0 for found in by_clients.values())
    assert by_clients["torch-fp32"]["1"] == by_clients["torch-fp32"]["3"]  # one request at a time
    assert all(variant["gpu_peak_bytes"] is None for variant in found["variants"].values())


def test_rows_that_are_not_what_one_request_gets_are_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed.make(tmp_path, tiny_base, small("qwen2.5-0.5b"), block_size=32)
    cfg = load("speed.device=cpu", "speed.threads=1", "speed.clients=[1,3]")
    apart = CudaRowsRuntime._one_each
    monkeypatch.setattr(CudaRowsRuntime, "_one_each", lambda self, new: apart(self, new) * (1 + 0.1 * (len(new) > 1)))
    with pytest.raises(RuntimeError, match=r"int8, 3 requests together and one: logits are 10\.0% .* apart"):
        speed.calls_per_s(tmp_path / "int8", cfg, [1, 2, 3], [4, 5])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 0.1345e9),
        ("smollm2-360m", 0.362e9),
        ("qwen2.5-0.5b", 0.494e9),
        ("llama-3.2-1b", 1.236e9),
        ("phi-4-mini", 3.836e9),
    ],
)
def test_shapes_have_the_parameters_their_authors_say(name: str, parameters: float) -> None:
    """Counted by hand: embedding, and per layer q, k, v, o, gate, up, down; biases and norms are too few to show."""
    c = SHAPES[name].config
    head = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    attention = c["hidden_size"] * head * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    layer = attention + 3 * c["hidden_size"] * c["intermediate_size"]
    found = c["vocab_size"] * c["hidden_size"] + c["num_hidden_layers"] * layer
    assert found == pytest.approx(parameters, rel=0.002)
