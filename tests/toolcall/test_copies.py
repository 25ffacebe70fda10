import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.toolcall import compact
from pipeline.toolcall.copies import can_be_said, copied
from pipeline.toolcall.grammar import Grammar
from pipeline.toolcall.prompt import request_text
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool, ToolCall, parse_tools

SCHEMAS: dict[str, Any] = {
    "file": {"type": "string", "x-copy": "path"},
    "offset": {"type": "integer"},
    "limit": {"type": "integer", "minimum": 1, "x-copy": "last:offset"},
    "timeout": {"type": "integer", "minimum": 1, "x-copy": "milliseconds"},
    "pattern": {"type": "string", "x-copy": "regex"},
    "text": {"type": "string", "x-copy": "text"},
}
TOOL = {"name": "T", "parameters": {"type": "object", "properties": SCHEMAS, "additionalProperties": False}}
TOOLS: tuple[Tool, ...] = parse_tools([TOOL], "tools.json")


@pytest.mark.parametrize(
    ("request_text", "arguments", "written"),
    [
        ("lines 40 to 60", {"offset": 40, "limit": 21}, "offset: 40\nlimit: to 60"),
        ("21 lines from 40 on", {"offset": 40, "limit": 21}, "offset: 40\nlimit: 21"),
        ("21 lines from 40 to 60", {"offset": 40, "limit": 21}, "offset: 40\nlimit: 21"),
        ("line 40", {"offset": 40, "limit": 1}, "offset: 40\nlimit: 1"),
        ("up to 60", {"limit": 60}, "limit: 60"),
        ("for 2 minutes", {"timeout": 120_000}, "timeout: 2 min"),
        ("for 120 seconds", {"timeout": 120_000}, "timeout: 120 s"),
        ("60m", {"timeout": 3_600_000}, "timeout: 60 min"),
        ("an hour", {"timeout": 3_600_000}, "timeout: 1 h"),
        ("120000 ms", {"timeout": 120_000}, "timeout: 120000"),
        ("1.5 s", {"timeout": 1500}, "timeout: 1500"),
        ("find a.b(c[0])", {"pattern": r"a.b\(c\[0\]\)"}, "pattern = a.b(c[0])"),
        ("find a.b", {"pattern": r"a\.b"}, r"pattern: a\.b"),
        ("find ^a+", {"pattern": "^a+"}, "pattern: ^a+"),
        (r"a backslash, \ ", {"pattern": r"\\"}, "pattern = \\"),
        ("write a b", {"text": "a b"}, "text = a b"),
        ("write abc", {"text": "ab"}, "text: ab"),  # half a word
        ("write = a", {"text": "= a"}, "text = = a"),
        ("write", {"text": ""}, "text: "),
        ("a in b", {"file": "b/a"}, "file = b/a"),
    ],
)
def test_what_can_be_copied_is_copied(
    tiny_base: Path, request_text: str, arguments: dict[str, Any], written: str
) -> None:
    call = ToolCall("T", arguments)
    found = compact.write(call, TOOLS, request_text)
    assert found == f"<tool_call>T\n{written}"
    assert compact.read(found, TOOLS) == call
    tokenizer = Tokenizer(tiny_base)
    guide = Grammar(tokenizer.vocabulary, TOOLS).start(request_text)
    guide.accept(tokenizer.encode(found, add_special_tokens=False, split_special_tokens=True))
    if not guide.finished:  # it has where nothing else could follow
        guide.accept([tokenizer.eos_token_id])
    assert guide.finished


def test_lines_of_a_file_that_was_read_are_copied_without_their_numbers() -> None:
    read = {"role": "tool", "content": "  9\u2192a = 1\n 10\u2192b = 2\n 11\tc"}
    assert request_text([{"role": "user", "content": "1\tx"}, read]) == "1\tx\na = 1\nb = 2\nc\n9 10 11"


@given(
    st.text(),
    st.fixed_dictionaries(
        {},
        optional={
            "offset": st.integers(0, 10**6),
            "limit": st.integers(1, 10**6),
            "timeout": st.integers(1, 10**9),
            "pattern": st.text(st.sampled_from("ab \\^$.*+?()[]{}|=\n")),
            "text": st.text(),
        },
    ),
)
def test_any_call_is_read_as_it_was_written(text: str, arguments: dict[str, Any]) -> None:
    call = ToolCall("T", arguments)
    around = f"{text} {json.dumps(arguments)}"
    assert compact.read(compact.write(call, TOOLS, around), TOOLS) == call


@pytest.mark.parametrize("written", ["limit: to 5", "offset: 9\nlimit: to 5", "timeout: 9 h", "timeout: 90 s"])
def test_every_number_so_written_fits_its_schema(written: str) -> None:
    call = compact.read(f"<tool_call>T\n{written}", TOOLS)
    assert call is not None
    assert TOOLS[0].fault(call.arguments) is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "x-copy": True}, r"x-copy must be one of \['span', 'path', 'text', 'regex'"),
        ({"type": "integer", "x-copy": "span"}, "x-copy span is for a string of any form"),
        ({"type": "string", "enum": ["a"], "x-copy": "text"}, "x-copy text is for a string of any form"),
        (
            {"type": "integer", "maximum": 9, "x-copy": "milliseconds"},
            "x-copy milliseconds is for an integer of any size from 1 on",
        ),
        ({"type": "integer", "x-copy": "last:b"}, r"x-copy last:b must name an argument before it: \['first'\]"),
    ],
)
def test_unknown_copy_is_refused(schema: dict[str, Any], message: str) -> None:
    properties = {"first": {"type": "integer"}, "a": schema, "b": {"type": "integer"}}
    tool = {"name": "T", "parameters": {"type": "object", "properties": properties}}
    with pytest.raises(ValueError, match=rf"tools.json: tool 1 \(T\): a: {message}"):
        parse_tools([tool], "tools.json")


@pytest.mark.parametrize("kind", ["span", "path", "text", "regex", "milliseconds", "last:offset"])
@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}, 2.5])
def test_value_of_another_type_is_no_copy(kind: str, value: object) -> None:
    """A client's history may hold any."""
    assert copied({"x-copy": kind}, value, {"offset": 1}, "lines 1 to 2.5 of None") is None


@pytest.mark.parametrize(
    ("kind", "value", "can"),
    [
        ("span", "the budget", True),
        ("span", "budgets", False),
        ("span", "docs/api.md", False),
        ("path", "docs/api.md", True),  # two spans with a slash between
        ("path", "docs/v2/api.md", False),
        ("text", "anything", True),
        ("regex", "anything", True),
    ],
)
def test_what_is_always_a_copy_can_be_said_only_where_it_stands(kind: str, value: str, can: bool) -> None:
    assert can_be_said({"type": "string", "x-copy": kind}, value, "put the budget into api.md in docs") is can


@pytest.mark.parametrize("begin", ["10", None, [10], {"a": 1}])
def test_a_line_to_count_from_that_is_no_number_is_no_copy(begin: object) -> None:
    """Larger models write numbers as texts now and then, and every later turn of the conversation carries that call."""
    assert copied({"x-copy": "last:offset"}, 5, {"offset": begin}, "lines 10 to 14") is None
