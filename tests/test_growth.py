"""How time and memory grow: the limits by hand, all three parts on tiny models, and the report's section."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import config, files, growth
from pipeline.bench import growth_section, limits
from pipeline.bench.limits import Architecture, Asked, Lengths, Machine
from pipeline.model.shape import SHAPES
from pipeline.toolcall import prompt
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import parse_tools

ROOT = Path(__file__).parents[1]
# Body: 2 layers of (4 * 2 * 2 * (2 + 1) + 3 * 4 * 8) = 144 each; head: 4 * 10.
SHAPE = Architecture(layers=2, hidden=4, inner=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)
MACHINE = Machine(bandwidth_bytes_per_s=100.0, float32_operations_per_s=10.0, int8_operations_per_s=1000.0)
TOOL = {
    "name": "Read",
    "description": "Read a file.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}
SMALL = ["parts=[prompt,clients,sizes]", "threads=1", "prompt_tokens=[32,256]", "clients=[1,4]", "new_tokens=3"]
FEW = [*SMALL, "shapes=[smollm2-360m]", "prefix_tokens=8", "request_tokens=4", "warmup_calls=0", "calls=1", "min_s=0"]


def load(*changes: str) -> growth.Params:
    raw = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.from_dotlist(list(changes)))
    found = config.load(raw, growth.Params)  # type: ignore[arg-type]
    assert isinstance(found, growth.Params)
    return found


def test_weights_and_cache_of_a_shape() -> None:
    assert (SHAPE.body_weights, SHAPE.head_weights, SHAPE.weights) == (288, 40, 328)
    assert SHAPE.cache_bytes_per_token == 2 * 2 * 1 * 2 * 4  # keys and values, layers, heads, values, bytes


def test_architecture_is_that_of_the_default_model() -> None:
    assert Architecture.of(SHAPES["smollm2-135m"].config).weights == pytest.approx(134.5e6, rel=0.001)
    assert Architecture.of(SHAPES["qwen2.5-0.5b"].config).head_dim == 64  # not in its config: 896 / 14


def test_limit_of_a_call_is_prefill_by_arithmetic_and_decode_by_bandwidth() -> None:
    lengths = Lengths(prefix=5, asked=3, new=3)
    # Tokens see 6 + 7 + 8 = 21; 4 operations each, of 2 layers with 2 heads of 2: 672 operations.
    prefill_s = 2 * (288 * 3 + 40) / 1000 + 672 / 10
    # Two steps: 50 bytes of weights each, and caches of 9 and 10 tokens with 32 bytes each, at 100 bytes/s.
    decode_s = (2 * 50 + (9 + 10) * 32) / 100
    assert limits.call_s(SHAPE, MACHINE, "int4", 50, lengths) == pytest.approx(prefill_s + decode_s)
    fp32_s = prefill_s + 2 * (288 * 3 + 40) * (1 / 10 - 1 / 1000)  # its weights at the rate of float32
    assert limits.call_s(SHAPE, MACHINE, "fused-fp32", 50, lengths) == pytest.approx(fp32_s + decode_s)
    read_s = limits.call_s(SHAPE, MACHINE, "int8", 10_000, dataclasses.replace(lengths, new=1))
    assert read_s == pytest.approx(10_000 / 100)  # so large that reading it once takes longer than its arithmetic
    assert limits.memory_bytes(SHAPE, 50, lengths) == 50 + 11 * 32


def test_a_step_shares_the_weights_and_not_the_arithmetic() -> None:
    asked = Asked(steps=4, tokens=10, kept=5)
    one, four = (limits.calls_per_s(SHAPE, MACHINE, "int8", 50, asked, together) for together in (1, 4))
    assert one == pytest.approx({"bandwidth": 100 / (4 * 50), "arithmetic": 1000 / (2 * (288 * 10 + 40 * 5))})
    assert four == pytest.approx({"bandwidth": 4 * one["bandwidth"], "arithmetic": one["arithmetic"]})
    assert growth_section.limit_calls_per_s({"limits_calls_per_s": four}) == four["arithmetic"]


def test_request_has_the_wanted_tokens_its_question_and_its_end(tiny_base: Path) -> None:
    tokenizer, tools = Tokenizer(tiny_base), parse_tools([TOOL], "here")
    whole = prompt.request_tokens(tokenizer, [{"role": "user", "content": growth.QUESTION}], tools)
    for tokens in (120, 121):
        asked = growth.request_of(tokens, tokenizer, tools)
        assert len(asked) == tokens
        assert asked[-40:] == whole[-40:]  # the question's end, and where the reply begins


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parts=[prompts]", r"growth\.parts must be one of"),
        ("prompt_tokens=[16]", r"growth\.prompt_tokens must lie in \[32"),
        ("clients=[]", r"growth\.clients must hold at least one value"),
        ("clients=[0]", r"growth\.clients must lie in \[1"),
        ("shapes=[gpt-2]", r"growth\.shapes must be one of .*llama-3\.2-1b"),
        ("calls=0", r"growth\.calls must lie in \[1"),
        ("new_tokens=0", r"growth\.new_tokens must lie in \[1"),
    ],
)
def test_bad_settings_are_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(f"growth.{change}")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_fused: Path) -> config.Paths:
    folder = tmp_path_factory.mktemp("project")
    (folder / "models").mkdir()
    (folder / "models/base").symlink_to(tiny_base, target_is_directory=True)
    for name in ("fused", "int8", "int4"):  # the same weights: what is quantized is not what is tested
        shutil.copytree(tiny_fused, folder / "models" / name)
    files.write_json(folder / "tools.json", [TOOL])
    messages = [{"role": "user", "content": "Show a.py"}]
    expected = {"name": "Read", "arguments": {"path": "a.py"}}
    row = {"id": "1", "category": "Read", "messages": messages, "tools": [TOOL], "expected": expected}
    files.write_jsonl(folder / "test.jsonl", [row, row | {"id": "2"}])
    return config.Paths(folder / "tools.json", folder, folder, folder, folder / "models", folder / "reports")


@pytest.fixture(scope="module")
def found(paths: config.Paths) -> dict[str, Any]:
    quick = ["requests=2", "warmup_calls=0", "calls_per_client=1", "max_new_tokens=8"]
    params = load(*(f"growth.{change}" for change in FEW), *(f"benchmark.{change}" for change in quick))
    shape = SHAPES["smollm2-360m"]
    few = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shapes = {"smollm2-360m": dataclasses.replace(shape, config=shape.config | few | heads)}
    return growth.run(dataclasses.replace(params, paths=paths), shapes)


def test_every_part_has_measures_beside_limits(found: dict[str, Any], paths: config.Paths) -> None:
    assert files.read_json(paths.reports / "growth.json") == found
    assert list(found) == list(growth.PARTS)
    assert list(found["prompt"]["variants"]) == ["fused-fp32", "int8", "int4"]
    for variant in found["prompt"]["variants"].values():
        short, long = variant["by_tokens"]
        assert (short["prompt_tokens"], long["prompt_tokens"]) == (32, 256)
        assert long["limit_call_s"] > short["limit_call_s"]
        # 224 tokens more: keys and values of 2 layers, 2 heads, 16 numbers of 4 bytes.
        assert long["limit_memory_bytes"] - short["limit_memory_bytes"] == 224 * 2 * 2 * 2 * 16 * 4
        for row in (short, long):
            assert row["call_s"]["p50"] > row["first_token_s"]["p50"] > 0
            assert row["peak_rss_bytes"] >= row["rss_bytes"] > row["limit_memory_bytes"]
            assert row["call_s"]["p50"] > row["limit_call_s"]
    assert list(found["sizes"]["variants"]) == ["int8", "int4"]
    int8, int4 = (found["sizes"]["variants"][name]["by_shape"][0] for name in ("int8", "int4"))
    assert int8["model_bytes"] > int4["model_bytes"]
    assert int8["limit_call_s"] > int4["limit_call_s"]


def test_memory_is_that_of_a_process_without_pytorch(found: dict[str, Any]) -> None:
    """With PyTorch imported it was 400 MB before any model; ru_maxrss would begin at this process's."""
    rows = [row for variant in found["prompt"]["variants"].values() for row in variant["by_tokens"]]
    assert max(row["peak_rss_bytes"] for row in rows) < 300e6


def test_clients_are_answered_and_their_steps_counted(found: dict[str, Any]) -> None:
    for variant in found["clients"]["variants"].values():
        one, four = variant["by_clients"]
        assert (one["concurrency"], four["concurrency"]) == (1, 4)
        assert one["error_fraction"] == four["error_fraction"] == 0
        asked = variant["asked"]
        assert asked["tokens"] >= asked["kept"] >= asked["steps"] >= 1
        assert four["limits_calls_per_s"]["bandwidth"] == pytest.approx(4 * one["limits_calls_per_s"]["bandwidth"])
        assert one["calls_per_s"] < growth_section.limit_calls_per_s(one)


def test_report_has_a_section_with_pictures_where_it_was_measured(found: dict[str, Any], paths: config.Paths) -> None:
    assert growth_section.read(paths.reports) == found
    text = "\n\n".join(growth_section.markdown(found))
    for name in growth.PARTS:
        assert f"](growth-{name}.png)" in text
        assert (paths.reports / f"growth-{name}.png").exists()
    assert text.startswith("## How time and memory grow")
    assert "speed only, random weights" in text
    assert growth_section.markdown(growth_section.read(paths.models)) == []


def test_a_part_alone_leaves_the_others(found: dict[str, Any], paths: config.Paths) -> None:
    params = load(*(f"growth.{change}" for change in FEW), "growth.parts=[prompt]", "growth.prompt_tokens=[64]")
    again = growth.run(dataclasses.replace(params, paths=paths), {})
    assert [row["prompt_tokens"] for row in again["prompt"]["variants"]["int8"]["by_tokens"]] == [64]
    assert {name: again[name] for name in ("clients", "sizes")} == {name: found[name] for name in ("clients", "sizes")}


def test_calls_longer_than_the_context_are_refused_before_any_is_made(paths: config.Paths) -> None:
    params = load(*(f"growth.{change}" for change in FEW), "growth.parts=[prompt]", "growth.prompt_tokens=[32,4096]")
    with pytest.raises(ValueError, match=r"growth\.prompt_tokens: a call of 4\d+ tokens.* context of .*2048 tokens"):
        growth.run(dataclasses.replace(params, paths=paths), {})
