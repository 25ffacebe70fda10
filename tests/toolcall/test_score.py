from typing import Any

import pytest

from pipeline.toolcall.reply import parse_call, write_call
from pipeline.toolcall.score import Outcome, fits, outcome, same
from pipeline.toolcall.tool import Tool, ToolCall

READ = Tool(
    "Read",
    "",
    {
        "type": "object",
        "properties": {"file_path": {"type": "string"}, "limit": {"type": "integer"}},
        "required": ["file_path"],
        "additionalProperties": False,
    },
)
RIGHT = ToolCall("Read", {"file_path": "a.py"})


@pytest.mark.parametrize(
    ("reply", "expected", "came_to"),
    [
        (write_call(RIGHT), RIGHT, Outcome.EXACT),
        (write_call(ToolCall("Read", {"file_path": "b.py"})), RIGHT, Outcome.WRONG_ARGUMENTS),
        (write_call(ToolCall("Read", {"file_path": 3})), RIGHT, Outcome.MALFORMED),
        (write_call(ToolCall("Cook", {})), RIGHT, Outcome.MALFORMED),
        ("<tool_call>{broken", RIGHT, Outcome.MALFORMED),
        ("Sure.", RIGHT, Outcome.SILENT),
        ("Sure.", None, Outcome.EXACT),
        (write_call(RIGHT), None, Outcome.CALLED),
    ],
)
def test_outcome_of_a_reply(reply: str, expected: ToolCall | None, came_to: Outcome) -> None:
    assert outcome(reply, [READ], expected, ()) is came_to


def test_fits_takes_absent_argument_only_when_null_is_accepted() -> None:
    accept: list[dict[str, list[Any]]] = [{"file_path": ["a.py"], "limit": [None, 3]}]
    assert fits(RIGHT, accept)
    assert fits(ToolCall("Read", {"file_path": "a.py", "limit": 3}), accept)
    assert not fits(ToolCall("Read", {"file_path": "a.py", "limit": 4}), accept)
    assert not fits(RIGHT, [{"file_path": ["a.py"], "limit": [3]}])
    assert not fits(RIGHT, [{}])


def test_same_tells_true_from_one() -> None:
    assert not same(True, 1)
    assert same([1, {"a": False}], [1, {"a": False}])
    assert not same([0], [False])


def test_parse_call_reads_a_value_that_holds_the_closing_marker() -> None:
    call = ToolCall("Write", {"file_path": "a", "content": "x</tool_call>y"})
    assert parse_call(write_call(call)) == call
