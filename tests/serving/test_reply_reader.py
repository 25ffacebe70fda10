import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving import anthropic_wire, openai_wire
from pipeline.serving.engine import Piece
from pipeline.serving.reply_reader import ReplyReader
from pipeline.toolcall import compact
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tool import ToolCall

STREAMS = [lambda: anthropic_wire.Stream("m"), lambda: openai_wire.Stream("m", include_usage=True)]


def piece(text: str, last: bool = False, **more: Any) -> Piece:
    return Piece(text, 10, 100, prefix_kept=True, last=last, **{"finished": last, **more})


def read(reply: str, cuts: list[int], call: ToolCall | None = None) -> str:
    """What is said of `reply` cut at `cuts`, then as a whole: the last piece of a call is JSON."""
    reader = ReplyReader()
    begun = [piece(reply[:end]) for end in sorted({min(cut, len(reply)) for cut in cuts})]
    last = piece(write_call(call) if call else reply, last=True, call=call)
    return "".join(reader.read(part) for part in [*begun, last])


def streamed(stream: Any, pieces: list[Piece]) -> str:
    reader = ReplyReader()
    return "".join(event for part in pieces for event in stream.events(part, reader.read(part)))


CUTS = st.lists(st.integers(0, 120))
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.booleans(), max_size=3)


@given(VALUES, CUTS)
def test_call_is_no_text_however_it_comes(arguments: dict[str, object], cuts: list[int]) -> None:
    call = ToolCall("Grep", arguments)
    assert read(compact.write(call, ()), cuts, call) == ""


@given(st.text().filter(lambda text: not text.startswith("<tool_call>")), CUTS)
def test_text_is_said_whole_however_it_comes(text: str, cuts: list[int]) -> None:
    assert read(text, cuts) == text


def test_begun_marker_is_held_back_until_it_is_text() -> None:
    reader = ReplyReader()
    assert reader.read(piece("<tool")) == ""
    assert reader.read(piece("<tool> is")) == "<tool> is"


@pytest.mark.parametrize("left", ["<", "<tool", "<tool_call>", "<tool_call>Bash\ncommand: ls"])
def test_what_is_left_of_a_cut_call_is_not_said(left: str) -> None:
    """Of one that was cut inside its marker `<tool` was said as the reply's text."""
    cut = piece(left, last=True, finished=False)
    assert ReplyReader().read(cut) == ""
    assert anthropic_wire.message(cut, "m")["content"] == []
    assert openai_wire.completion(cut, "m")["choices"][0]["message"]["content"] is None


def test_whole_text_may_look_like_a_marker() -> None:
    assert ReplyReader().read(piece("<", last=True)) == "<"


@pytest.mark.parametrize("stream", STREAMS)
def test_cut_call_is_never_begun(stream: Any) -> None:
    """Its name was sent as soon as it was known, and so a client got a call without arguments."""
    begun, cut = "<tool_call>Bash\ncomm", "<tool_call>Bash\ncommand: rm"
    events = streamed(stream(), [piece(begun), piece(cut, last=True, finished=False)])
    assert "Bash" not in events
    assert "max_tokens" in events or '"length"' in events


@pytest.mark.parametrize("stream", STREAMS)
def test_call_that_does_not_fit_its_schema_is_text_alone(stream: Any) -> None:
    """Its text was sent inside the block of the call that its name had opened."""
    call = write_call(ToolCall("Pick", {"n": 1}))
    events = streamed(stream(), [piece("<tool_call>Pick\nn"), piece(call, last=True)])
    assert "tool_use" not in events
    assert "tool_calls" not in events
    assert json.dumps(call) in events


@pytest.mark.parametrize("stream", STREAMS)
def test_whole_call_is_sent_once(stream: Any) -> None:
    call = ToolCall("Bash", {"command": "ls"})
    events = streamed(stream(), [piece("<tool_call>Bash\ncomm"), piece(write_call(call), last=True, call=call)])
    assert events.count('"name": "Bash"') == 1
    assert events.count(json.dumps(json.dumps(call.arguments))) == 1
