"""A request that goes on with an earlier one is answered as if it were the first, with fewer tokens computed."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.runtime.caller import ToolCaller, load_runtime
from pipeline.runtime.conversations import Conversations, shared
from pipeline.runtime.generation import Choice, Row, Runtime, Step
from pipeline.runtime.ort import FusedRuntime
from pipeline.runtime.packed import PackedRuntime
from pipeline.serving.engine import Asked, Engine

ROOT = Path(__file__).parents[2]
PREFIX = [3, 4, 5]
FIRST = list(range(10, 40))
REPLY = [70, 71, 72]
NEXT = [*FIRST, *REPLY, *range(100, 110)]  # goes on with it
OTHER = [*FIRST[:15], *range(200, 215)]  # begins like it, by chance


@pytest.fixture(params=["fused", "together"])
def runtime(request: pytest.FixtureRequest, tiny_fused: Path) -> Runtime:
    return load_runtime(tiny_fused, "cpu", 1, together=2 * (request.param == "together"), conversation_tokens=100)


class Fed:
    """How many tokens the model read."""

    def __init__(self, runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        name = "_run" if isinstance(runtime, PackedRuntime) else "_extend"
        run = getattr(runtime, name)

        def counted(tokens: list[int], *more: Any) -> NDArray[np.float32]:
            self.tokens += len(tokens)
            logits: NDArray[np.float32] = run(tokens, *more)
            return logits

        monkeypatch.setattr(runtime, name, counted)

    def taken(self) -> int:
        n, self.tokens = self.tokens, 0
        return n


def feed(runtime: Any, row: Row | None, tokens: list[int], at: int) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (
        runtime.step_together([(row, Step(tokens, [], at))])[0] if row else runtime.step(tokens, at, 1)
    )
    return found


def ask(runtime: Any, asked: list[int], reply: list[int]) -> NDArray[np.float32]:
    """Logits after `asked`; the model is then made to say `reply`."""
    runtime.begin(PREFIX)
    row = runtime.join(asked) if isinstance(runtime, PackedRuntime) else None
    logits = feed(runtime, row, asked, len(PREFIX))
    for at, token in enumerate(reply):
        feed(runtime, row, [token], len(PREFIX) + len(asked) + at)
    if row:
        runtime.leave(row)
    return logits


def test_only_what_is_new_in_a_conversation_is_computed(
    runtime: Runtime, tiny_fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.begin(PREFIX)
    fed, fresh = Fed(runtime, monkeypatch), load_runtime(tiny_fused, "cpu", 1)
    ask(runtime, FIRST, REPLY)
    assert fed.taken() == len(FIRST) + len(REPLY)
    assert np.allclose(ask(runtime, NEXT, []), ask(fresh, NEXT, []), atol=1e-4)
    assert fed.taken() == len(NEXT) - len(FIRST) - len(REPLY)
    assert np.allclose(ask(runtime, OTHER, REPLY), ask(fresh, OTHER, []), atol=1e-4)
    assert fed.taken() == len(OTHER) + len(REPLY)
    # Asked once more as it was: the last token is fed for its logits.
    assert np.allclose(ask(runtime, OTHER, []), ask(fresh, OTHER, []), atol=1e-4)
    assert fed.taken() == 1


def test_without_it_all_is_computed(tiny_fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for together in (1, 2):
        runtime = load_runtime(tiny_fused, "cpu", 1, together=together)
        runtime.begin(PREFIX)
        fed = Fed(runtime, monkeypatch)
        ask(runtime, FIRST, [])
        ask(runtime, FIRST, [])
        assert fed.taken() == 2 * len(FIRST)


def test_conversations_are_kept_beside_each_other_where_requests_go_together(
    tiny_fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load_runtime(tiny_fused, "cpu", 1, together=2, conversation_tokens=100)
    ask(runtime, FIRST, REPLY)
    ask(runtime, OTHER, REPLY)
    fed = Fed(runtime, monkeypatch)
    ask(runtime, NEXT, [])
    assert fed.taken() == len(NEXT) - len(FIRST) - len(REPLY)


def test_a_step_that_failed_leaves_nothing_behind(
    runtime: Runtime, tiny_fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fed, but not computed, must not pass for known."""
    ask(runtime, FIRST, REPLY)
    runtime.begin(PREFIX)

    def fail(*_: Any) -> None:
        raise MemoryError

    row = runtime.join(NEXT) if isinstance(runtime, PackedRuntime) else None
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_run" if isinstance(runtime, PackedRuntime) else "_extend", fail)
        with pytest.raises(MemoryError):
            feed(runtime, row, NEXT, len(PREFIX))
    if isinstance(runtime, PackedRuntime) and row:
        runtime.leave(row)
    fresh = load_runtime(tiny_fused, "cpu", 1)
    assert np.allclose(ask(runtime, NEXT, []), ask(fresh, NEXT, []), atol=1e-4)


def test_the_oldest_go_first_and_a_conversation_is_kept_once() -> None:
    buffer = np.arange(200, dtype=np.float32).reshape(1, 1, 200, 1)
    kept = Conversations([buffer], 100)
    a, b = list(range(40)), list(range(100, 140))
    kept.keep((1,), a, range(40), 38)
    kept.keep((1,), b, [*range(50, 89), 99], 40)
    kept.keep((1,), [*a[:38], 7, 8], range(40), 40)  # goes on with what was asked in a, and takes its place
    assert kept.restore((1,), [*b, 9], 150) == b
    assert buffer[0, 0, 150:190, 0].tolist() == [*range(50, 89), 99]
    assert kept.restore((2,), [*b, 9], 150) == []  # another prefix
    assert kept.restore((1,), [*b[:30], 9], 150) == b[:30]  # another that begins so
    kept.keep((1,), list(range(300, 330)), range(30), 30)  # too many together: a, used before b, goes
    assert kept.restore((1,), [*a[:38], 7, 8, 9], 150) == []
    assert kept.restore((1,), [*b, 9], 150) == b
    kept.keep((1,), list(range(101)), range(101), 101)  # too long to be kept
    assert kept.restore((1,), list(range(101)), 0) == []


def test_where_memory_is_short_nothing_is_kept() -> None:
    """It ended the engine's thread, and with it the server."""

    class Short(np.ndarray[Any, Any]):
        def copy(self, order: Any = None) -> Any:
            raise MemoryError(order)

    buffer = np.zeros((1, 1, 50, 1), np.float32)
    kept = Conversations([buffer], 100)
    kept.keep((1,), range(20), range(20), 20)
    kept._buffers = [buffer.view(Short)]
    kept.keep((1,), range(100, 120), range(20), 20)
    kept._buffers = [buffer]
    assert [kept.restore((1,), asked, 0) for asked in (range(21), range(100, 121))] == [[], []]


def test_shared_counts_what_both_begin_with() -> None:
    assert [shared(a, b) for a, b in (([], []), ([1], []), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 9, 3]))] == [0, 0, 2, 1]


@pytest.mark.parametrize("together", [1, 2])
def test_replies_in_a_conversation_are_those_without_the_cache(tiny_fused: Path, together: int) -> None:
    first = {"role": "user", "content": "Read src/app.py, please, and tell me what it does"}
    texts = {}
    for tokens in (0, 4096):

        def load(tokens: int = tokens) -> ToolCaller:
            caller = ToolCaller.load(tiny_fused, ROOT / "data/tools.json", threads=1, together=together)
            kept = load_runtime(tiny_fused, "cpu", 1, together=together, conversation_tokens=tokens)
            return ToolCaller(kept, caller.tokenizer, caller.tools, caller.techniques)

        engine = Engine(load, 10, 300, together)
        engine.wait_until_loaded()
        one = asyncio.run(engine.whole(Asked((first,), (), Choice.REQUIRED, 30, stream=False)))
        messages = (first, {"role": "assistant", "content": one.text}, {"role": "tool", "content": "1\tx = 1"})
        two = asyncio.run(engine.whole(Asked(messages, (), Choice.REQUIRED, 30, stream=False)))
        engine.stop()
        engine.join(5)
        texts[tokens] = [one.text, two.text]
        assert one.kept_tokens == 0
        assert (two.kept_tokens > 40) is (tokens > 0 and together > 1)  # alone it is not told
        assert two.cached_tokens == two.kept_tokens + two.prefix_tokens
    assert texts[0] == texts[4096]
    assert isinstance(load_runtime(tiny_fused, "cpu", 1, conversation_tokens=1), FusedRuntime)
