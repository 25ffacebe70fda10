import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.reply_reader import ArgumentsDelta, CallBegun, Event, ReplyReader, TextDelta
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tool import ToolCall


def read(reply: str, cuts: list[int], finished: bool = True) -> list[Event]:
    reader = ReplyReader()
    ends = sorted({min(cut, len(reply)) for cut in cuts})
    events = [event for end in ends for event in reader.read(reply[:end], last=False)]
    return [*events, *reader.read(reply, last=True, finished=finished)]


def said(events: list[Event], kind: type[TextDelta] | type[ArgumentsDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


CUTS = st.lists(st.integers(0, 120))
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.booleans(), max_size=3)


@given(VALUES, CUTS)
def test_call_is_said_whole_however_it_comes(arguments: dict[str, object], cuts: list[int]) -> None:
    events = read(write_call(ToolCall("Grep", arguments)), cuts)
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
    assert ReplyReader().read('<tool_call>{"name": "Bash", "arguments": {"comm', last=False) == [CallBegun("Bash")]


def test_begun_marker_is_held_back_until_it_is_text() -> None:
    reader = ReplyReader()
    assert reader.read("<tool", last=False) == []
    assert reader.read("<tool> is", last=False) == [TextDelta("<tool> is")]


def test_cut_call_says_no_more_than_its_arguments() -> None:
    reply = '<tool_call>{"name": "Bash", "arguments": {"command": "ls'
    assert '{"command": "ls'.startswith(said(read(reply, [50], finished=False), ArgumentsDelta))
