"""Requests together are answered as each alone."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import files
from pipeline.model.onnx_export import export_fused
from pipeline.runtime.caller import ToolCaller, load_runtime
from pipeline.runtime.generation import Choice, Row, Step, TogetherRuntime
from pipeline.runtime.packed import PackedRuntime
from pipeline.serving.engine import Asked, Engine, Piece
from pipeline.toolcall.prompt import REVERSE_REQUESTS
from pipeline.toolcall.tool import Tool

ROOT = Path(__file__).parents[2]
TEXTS = [f"Read src/file{number}.py from line {number}, {'please ' * number}" for number in range(9)]


def asked(text: str, **more: Any) -> Asked:
    given: dict[str, Any] = {"tools": (), "choice": Choice.REQUIRED, "max_new_tokens": 40, "stream": False} | more
    return Asked(({"role": "user", "content": text},), **given)


class Engines:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[Engine] = []

    def __call__(self, together: int, change: Callable[[Any], None] = lambda _: None) -> Engine:
        def load() -> ToolCaller:
            caller = ToolCaller.load(self._folder, ROOT / "data/tools.json", threads=1, together=together)
            change(caller.runtime)
            return caller

        self._made.append(Engine(load, 100, 300, together))
        self._made[-1].wait_until_loaded()
        return self._made[-1]

    def stop(self) -> None:
        for engine in self._made:
            engine.stop()
            engine.join(5)


@pytest.fixture(params=["packed", "rows"])
def engines(request: pytest.FixtureRequest, tiny_base: Path, tiny_fused: Path, tmp_path: Path) -> Any:
    """Of both runtimes, the GPU's on the CPU; the model has learnt the reverse order."""
    folder = tmp_path / "model"
    if request.param == "rows":
        export_fused(tiny_base, folder, "cuda")
    else:
        shutil.copytree(tiny_fused, folder)
    learn_reverse_order(folder)
    made = Engines(folder)
    yield made
    made.stop()


def learn_reverse_order(folder: Path) -> None:
    files.write_json(folder / "config.json", files.read_json(folder / "config.json") | {REVERSE_REQUESTS: 1})


async def together(engine: Engine, texts: Sequence[str]) -> list[Piece | BaseException]:
    return await asyncio.gather(*(engine.whole(asked(text)) for text in texts), return_exceptions=True)


def texts(pieces: Sequence[Piece | BaseException]) -> list[str]:
    return [piece.text if isinstance(piece, Piece) else repr(piece) for piece in pieces]


@pytest.fixture
def alone(engines: Engines) -> list[str]:
    engine = engines(1)
    return texts([asyncio.run(engine.whole(asked(text))) for text in TEXTS])


def test_replies_together_are_those_alone(engines: Engines, alone: list[str]) -> None:
    assert len(set(alone)) > 1, "the model would say the same to everybody"
    assert texts(asyncio.run(together(engines(4), TEXTS))) == alone


def test_request_with_other_tools_waits_for_those_before_it_only(engines: Engines) -> None:
    """They have another prefix, so they do not go together; none may starve."""
    engine = engines(3)
    caller = engine.wait_until_loaded()
    some = [asked(TEXTS[at], tools=caller.tools[:2] if at % 2 else ()) for at in range(6)]

    async def all_of_them() -> list[Piece]:
        return await asyncio.gather(*map(engine.whole, some))

    found = asyncio.run(all_of_them())
    assert [piece.new_tokens > 0 for piece in found] == [True] * 6
    assert texts(found) == texts([asyncio.run(engine.whole(one)) for one in some])


def test_cancelled_request_leaves_and_the_others_replies_stay(engines: Engines, alone: list[str]) -> None:
    engine = engines(4)
    runtime = engine.wait_until_loaded().runtime

    async def cancel_one() -> list[Piece | BaseException]:
        others = [asyncio.ensure_future(engine.whole(asked(text))) for text in TEXTS[1:]]
        pieces = engine.answer(asked(TEXTS[0], stream=True))
        await anext(pieces)
        await pieces.aclose()
        return await asyncio.gather(*others, return_exceptions=True)

    assert texts(asyncio.run(cancel_one())) == alone[1:]
    engine.stop()
    engine.join(5)  # the last reply is told before its place is freed
    assert isinstance(runtime, TogetherRuntime)
    assert not (runtime.rows if isinstance(runtime, PackedRuntime) else runtime._rows)  # type: ignore[attr-defined]


def test_request_for_which_memory_is_short_fails_alone(engines: Engines, alone: list[str]) -> None:
    def short_of_memory(runtime: Any) -> None:
        step = runtime.step_together

        def fail_at_long_ones(steps: Sequence[tuple[Row, Step]]) -> list[NDArray[np.float32]]:
            if any(len(part.feed) > longest for _, part in steps):
                raise MemoryError("no memory left")
            found: list[NDArray[np.float32]] = step(steps)
            return found

        runtime.step_together = fail_at_long_ones

    engine = engines(4, short_of_memory)
    caller = engine.wait_until_loaded()
    lengths = [len(caller.encode([{"role": "user", "content": text}], caller.tools, 1)[1]) for text in TEXTS]
    longest = max(lengths[:-1]) + len("<tool_call>")  # the opening is fed with the request, each byte a token
    assert lengths[-1] + len("<tool_call>") > longest
    found = texts(asyncio.run(together(engine, TEXTS)))
    assert found == [*alone[:-1], "MemoryError('no memory left')"]


def test_requests_together_fill_more_than_one_context(tiny_fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients reserve far more tokens than their replies have."""
    monkeypatch.setattr("pipeline.runtime.ort.BUFFER_TOKENS", 512)
    runtime = load_runtime(tiny_fused, "cpu", 1, together=4)
    alone = load_runtime(tiny_fused, "cpu", 1)
    assert isinstance(runtime, PackedRuntime)
    prefix, own = [1, 2, 3], [[7 + row] * 400 for row in range(4)]
    assert runtime.has_room(len(prefix), [401] * 4)
    runtime.begin(prefix)
    rows = [runtime.join() for _ in own]
    for row, tokens in zip(rows, own, strict=True):
        runtime.step_together([(row, Step(tokens, [], len(prefix)))])
    found = runtime.step_together([(row, Step([5], [], len(prefix) + 400)) for row in rows])
    for tokens, logits in zip(own, found, strict=True):
        alone.begin(prefix)
        alone.step(tokens, len(prefix), 1)
        assert np.allclose(logits, alone.step([5], len(prefix) + 400, 1), atol=1e-3)


def test_only_a_fused_model_answers_requests_together(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="only a fused model answers requests together, not one for PyTorch"):
        load_runtime(tiny_base, "cpu", 1, together=2)


WAIT = {"properties": {"seconds": {"enum": list(range(1, 9))}}, "required": ["seconds"]}
WAIT_TOOL = Tool("Wait", "Wait.", {"type": "object", **WAIT})


def test_calls_scored_in_reverse_order_are_chosen_together_as_alone(engines: Engines) -> None:
    """The model is unsure of one token, so several calls are whole and about equally likely."""
    fed: list[list[int]] = []

    def spied(runtime: Any) -> None:
        step_together = runtime.step_together

        def step(steps: Sequence[tuple[Row, Step]]) -> Any:
            fed.extend(step.feed for _, step in steps)
            return step_together(steps)

        runtime.step_together = step

    requests = [asked(text, tools=(WAIT_TOOL,)) for text in TEXTS]

    async def ask(engine: Engine) -> list[str]:
        return [piece.text for piece in await asyncio.gather(*map(engine.whole, requests))]

    alone, many = engines(1), engines(4, spied)
    for engine in (alone, many):
        caller = engine.wait_until_loaded()
        caller.techniques = replace(caller.techniques, reverse_weight=10)
    opening = caller.prompt(TEXTS[0], (WAIT_TOOL,), 40, Choice.REQUIRED).reverse.opening  # type: ignore[union-attr]
    found = asyncio.run(ask(many))
    assert sum(feed[: len(opening)] == opening for feed in fed) >= 2 * len(TEXTS)
    assert found == asyncio.run(ask(alone))
    caller.techniques = replace(caller.techniques, reverse_weight=0)
    assert found != asyncio.run(ask(many)), "no call was chosen for its score"


def test_conversation_is_kept_although_calls_were_scored_in_reverse_order(tiny_fused: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_fused, tmp_path / "model")
    learn_reverse_order(tmp_path / "model")
    engine = Engines(tmp_path / "model")(2)
    first = asked(TEXTS[8], tools=(WAIT_TOOL,))
    call = asyncio.run(engine.whole(first)).text
    said = ({"role": "assistant", "content": call}, {"role": "tool", "content": "done"})
    again = asyncio.run(engine.whole(replace(first, messages=(*first.messages, *said))))
    engine.stop()
    assert again.kept_tokens > len(TEXTS[8]) / 4


def test_short_requests_that_begin_a_conversation_are_scored_in_reverse_order(tiny_fused: Path) -> None:
    caller = ToolCaller.load(tiny_fused, ROOT / "data/tools.json", threads=1)
    assert caller.techniques.reverse_weight == 0, "this model has not learnt the reverse order"
    single = [{"role": "user", "content": "show a"}]
    later = [*single, {"role": "assistant", "content": "Here."}, *single]
    long = [{"role": "user", "content": "show a " * 60}]
    found = [caller.prompt(messages, caller.tools, 40, Choice.AUTO).reverse for messages in (single, later, long)]
    assert [reverse is not None for reverse in found] == [True, False, False]
    assert found[0]
    assert caller.tokenizer.decode(found[0].request) == "show a<|im_end|>"
