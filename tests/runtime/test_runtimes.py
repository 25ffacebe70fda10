"""Every runtime gives the logits of a plain forward pass, also after going back and with a kept prefix."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.model.agreement import pytorch_logits
from pipeline.model.base import load_tuned
from pipeline.model.onnx_export import export_portable
from pipeline.runtime.caller import load_runtime
from pipeline.runtime.generation import RowsRuntime, Runtime, generate_together

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns about itself

PREFIX, OTHER = list(range(10, 30)), list(range(60, 95))
ASKED, WRONG, RIGHT = [1, 2, 3, 4, 5], [6, 7, 8], [9, 10]


@pytest.fixture(scope="module")
def tiny_onnx(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "onnx"
    export_portable(tiny_base, folder)
    return folder


Load = Callable[[int], Runtime]


@pytest.fixture(params=["base", "onnx", "fused", "together"])
def load(tiny_base: Path, tiny_fused: Path, request: pytest.FixtureRequest) -> Load:
    """Of a runtime, by the number of prefixes it keeps."""
    folder = tiny_fused
    if request.param in ("base", "onnx"):
        folder = tiny_base if request.param == "base" else request.getfixturevalue("tiny_onnx")
    return lambda prefixes: load_runtime(folder, "cpu", 1, prefixes, request.param == "together")


@pytest.mark.parametrize("prefixes", [0, 1, 2])
def test_steps_give_the_logits_of_a_plain_pass(load: Load, prefixes: int, tiny_base: Path) -> None:
    runtime = load(prefixes)
    for prefix in (PREFIX, OTHER, OTHER, PREFIX):
        expected = pytorch_logits(tiny_base, [[*prefix, *ASKED, *RIGHT]])[0]
        at = len(prefix)
        runtime.begin(prefix)
        first = runtime.step([*ASKED, *WRONG], at, 1 + len(WRONG))
        assert first.shape == (4, expected.shape[1])
        np.testing.assert_allclose(first[0], expected[at + len(ASKED) - 1], atol=1e-4)
        again = runtime.step(RIGHT, at + len(ASKED), 2)  # over the wrong ones
        np.testing.assert_allclose(again, expected[-2:], atol=1e-4)


def test_prefix_that_was_not_used_for_the_longest_is_dropped(load: Load) -> None:
    runtime = load(2)
    for prefix in (PREFIX, OTHER, PREFIX, ASKED):
        runtime.begin(prefix)
    assert [runtime.keeps(prefix) for prefix in (PREFIX, OTHER, ASKED)] == [True, False, True]


@pytest.mark.parametrize("together", [False, True])
def test_drafts_may_reach_beyond_the_context(tiny_fused: Path, together: bool) -> None:
    """A request that just fits failed where the last step had a draft: the buffer ended with the context."""
    runtime = load_runtime(tiny_fused, "cpu", 1, together=together)
    runtime.begin(PREFIX)
    feed = [1] * (runtime.context_tokens - len(PREFIX))
    assert runtime.step([*feed, *ASKED], len(PREFIX), 1 + len(ASKED)).shape[0] == 6


@pytest.mark.parametrize("kind", ["base", "onnx"])
def test_replies_together_are_those_alone(kind: str, tiny_base: Path, request: pytest.FixtureRequest) -> None:
    """Rows of different length, padded on the left, behind one prefix; a row that ends leaves the batch."""
    model, _ = load_tuned(tiny_base)
    runtime = load_runtime(tiny_base if kind == "base" else request.getfixturevalue("tiny_onnx"), "cpu", threads=1)
    assert isinstance(runtime, RowsRuntime)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    end = generate_together(runtime, PREFIX, prompts[1:2], -1, 3)[0][-1].id  # one of the rows ends early
    found = generate_together(runtime, PREFIX, prompts, end, max_new_tokens=8)
    assert len(found[1]) <= 3
    for asked, reply in zip(prompts, found, strict=True):
        tokens = [*PREFIX, *asked]
        with torch.inference_mode():
            for token in reply:
                assert int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()) == token.id
                tokens.append(token.id)
        assert len(reply) == 8 or reply[-1].id == end
