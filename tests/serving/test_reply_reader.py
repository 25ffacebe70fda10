import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.reply_reader import ArgumentsDelta, CallBegun, Event, ReplyReader, TextDelta
from pipeline.toolcall import compact
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tool import ToolCall


def read(reply: str, cuts: list[int], whole: str | None = None) -> list[Event]:
    """`reply` cut at `cuts`, then `whole`: the last piece of a call is JSON."""
    reader = ReplyReader()
    ends = sorted({min(cut, len(reply)) for cut in cuts})
    events = [event for end in ends for event in reader.read(reply[:end], last=False)]
    return [*events, *reader.read(whole or reply, last=True)]


def said(events: list[Event], kind: type[TextDelta] | type[ArgumentsDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


CUTS = st.lists(st.integers(0, 120))
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.booleans(), max_size=3)


@given(VALUES, CUTS)
def test_call_is_said_whole_however_it_comes(arguments: dict[str, object], cuts: list[int]) -> None:
    call = ToolCall("Grep", arguments)
    events = read(compact.write(call, ()), cuts, write_call(call))
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
    assert ReplyReader().read("<tool_call>Bash\ncomm", last=False) == [CallBegun("Bash")]
    assert ReplyReader().read("<tool_call>Bas", last=False) == []


def test_begun_marker_is_held_back_until_it_is_text() -> None:
    reader = ReplyReader()
    assert reader.read("<tool", last=False) == []
    assert reader.read("<tool> is", last=False) == [TextDelta("<tool> is")]


def test_cut_call_gives_no_arguments() -> None:
    assert ReplyReader().read("<tool_call>Bash\ncommand: ls", last=True, finished=False) == []
