from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.toolcall.compact import read, write
from pipeline.toolcall.conversation import Request
from pipeline.toolcall.prompt import reply_tokens
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool, ToolCall

PROPERTIES: dict[str, Any] = {
    "path": {"type": "string"},
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "all": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "any": {},
}
TOOL = Tool("Put", "Put.", {"type": "object", "properties": PROPERTIES, "required": ["path"]})
VALUES = {
    "text": st.text(),
    "count": st.integers(),
    "all": st.booleans(),
    "tags": st.lists(st.text()),
    "any": st.none() | st.text() | st.integers() | st.dictionaries(st.text(), st.text()),
}


@given(st.fixed_dictionaries({"path": st.text()}, optional=VALUES))
def test_call_is_read_as_it_was_written(arguments: dict[str, Any]) -> None:
    call = ToolCall("Put", arguments)
    assert read(write(call, [TOOL]), [TOOL]) == call


def test_texts_stand_as_they_are_and_in_the_order_of_the_schema() -> None:
    call = ToolCall("Put", {"text": 'a\n"b"\\', "path": " src", "count": 3})
    assert write(call, [TOOL]) == '<tool_call>Put\npath:  src\ntext: a\n"b"\\\ncount: 3'


@pytest.mark.parametrize(
    "text", ["", "Put", "<tool_call>Cook\npath: a", "<tool_call>Put\nelse: a", "<tool_call>Put\ncount: 3\npath: a"]
)
def test_what_is_no_call_is_none(text: str) -> None:
    found = read(text, [TOOL])
    assert found is None or TOOL.fault(found.arguments)


def test_value_that_looks_like_the_next_argument_is_not_trained_on(tiny_base: Path) -> None:
    messages = ({"role": "user", "content": "x"},)
    request = Request("r1", "Put", messages, (TOOL,), ToolCall("Put", {"path": "a\ncount: 3"}))
    with pytest.raises(ValueError, match="request r1: a value of its call looks like the next argument"):
        reply_tokens(Tokenizer(tiny_base), request)


def test_a_line_that_looks_like_an_argument_behind_the_next_required_one_is_text() -> None:
    properties = {name: {"type": "string"} for name in ("old", "new", "mode")}
    tool = Tool("Put", "", {"type": "object", "properties": properties, "required": ["old", "new"]})
    found = read("<tool_call>Put\nold: a: 1\nmode: fast\nnew: b\nmode: slow", [tool])
    assert found == ToolCall("Put", {"old": "a: 1\nmode: fast", "new": "b", "mode": "slow"})


@pytest.mark.parametrize("written", ["1e999", "-1e999", "NaN", "9" * 5000])
def test_a_number_that_python_cannot_hold_stays_as_it_is_written(written: str) -> None:
    tool = Tool("T", "", {"type": "object", "properties": {"n": {"type": "number"}}})
    found = read(f"<tool_call>T\nn: {written}", [tool])
    assert found == ToolCall("T", {"n": written})
    assert tool.fault(found.arguments)


def test_value_of_another_kind_is_read_and_does_not_fit() -> None:
    found = read("<tool_call>Put\npath: a\ncount: many", [TOOL])
    assert found == ToolCall("Put", {"path": "a", "count": "many"})
    assert TOOL.fault(found.arguments)


def test_an_integer_that_is_none_stays_as_it_is() -> None:
    """In a client's history anything may stand."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    tools = (Tool("T", "", schema),)
    for value, written in ((float("inf"), "Infinity"), (2.5, "2.5"), (2.0, "2")):
        assert write(ToolCall("T", {"n": value}), tools) == f"<tool_call>T\nn: {written}"
