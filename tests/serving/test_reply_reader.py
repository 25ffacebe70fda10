import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.engine import Piece
from pipeline.serving.reply_reader import ArgumentsDelta, CallBegun, Event, ReplyReader, TextDelta
from pipeline.toolcall import compact
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tool import ToolCall


def piece(text: str, last: bool = False, **more: Any) -> Piece:
    return Piece(text, 10, 100, prefix_kept=True, last=last, **{"finished": last, **more})


def read(reply: str, cuts: list[int], call: ToolCall | None = None) -> list[Event]:
    """`reply` cut at `cuts`, then as a whole: the last piece of a call is JSON."""
    reader = ReplyReader()
    ends = sorted({min(cut, len(reply)) for cut in cuts})
    name = call.name if call else None
    begun = [piece(reply[:end], tool=name if "\n" in reply[:end] else None) for end in ends]
    events = [event for part in begun for event in reader.read(part)]
    return [*events, *reader.read(piece(write_call(call) if call else reply, last=True, tool=name, call=call))]


def said(events: list[Event], kind: type[TextDelta] | type[ArgumentsDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


CUTS = st.lists(st.integers(0, 120))
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.booleans(), max_size=3)


@given(VALUES, CUTS)
def test_call_is_said_whole_however_it_comes(arguments: dict[str, object], cuts: list[int]) -> None:
    call = ToolCall("Grep", arguments)
    events = read(compact.write(call, ()), cuts, call)
    assert events[0] == CallBegun("Grep")
    assert sum(isinstance(event, CallBegun) for event in events) == 1
    assert json.loads(said(events, ArgumentsDelta)) == arguments
    assert not said(events, TextDelta)


@given(st.text().filter(lambda text: not text.startswith("<tool_call>")), CUTS)
def test_text_is_said_whole_however_it_comes(text: str, cuts: list[int]) -> None:
    events = read(text, cuts)
    assert said(events, TextDelta) == text.removesuffix("\ufffd") + ("\ufffd" if text.endswith("\ufffd") else "")
    assert not any(isinstance(event, CallBegun) for event in events)


def test_name_is_said_before_the_arguments_come() -> None:
    reader = ReplyReader()
    assert reader.read(piece("<tool_call>Bas")) == []
    assert reader.read(piece("<tool_call>Bash\ncomm", tool="Bash")) == [CallBegun("Bash")]


def test_begun_marker_is_held_back_until_it_is_text() -> None:
    reader = ReplyReader()
    assert reader.read(piece("<tool")) == []
    assert reader.read(piece("<tool> is")) == [TextDelta("<tool> is")]


def test_cut_call_gives_no_arguments() -> None:
    assert ReplyReader().read(piece("<tool_call>Bash\ncommand: ls", last=True, finished=False)) == []


def test_what_only_looks_like_a_call_is_text() -> None:
    reader, text = ReplyReader(), "<tool_call>Launch\ntarget: all"
    assert reader.read(piece(text)) == []
    assert reader.read(piece(text, last=True)) == [TextDelta(text)]
