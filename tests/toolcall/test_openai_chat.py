import json
from pathlib import Path

import pytest

from pipeline import files
from pipeline.prepare import read_requests
from pipeline.toolcall.openai_chat import from_openai, is_openai
from pipeline.toolcall.tool import ToolCall, parse_tools

BOOK = {
    "name": "book",
    "description": "Book a meeting.",
    "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]},
}
TOOLS = parse_tools([BOOK], "tools")


def line(answer: dict[str, object], **more: object) -> dict[str, object]:
    messages = [{"role": "system", "content": "You plan."}, {"role": "user", "content": "book friday"}, answer]
    return {"messages": messages, **more}


def calling(*arguments: str) -> dict[str, object]:
    calls = [
        {"id": f"c{at}", "type": "function", "function": {"name": "book", "arguments": text}}
        for at, text in enumerate(arguments)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_a_file_of_openai_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    files.write_jsonl(
        path,
        [
            line(calling('{"day": "friday"}'), tools=[{"type": "function", "function": BOOK}]),
            line({"role": "assistant", "content": "Which week?"}),
            {"id": "ours", "category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None},
        ],
    )
    first, second, third = read_requests(path, TOOLS)
    assert first.expected == ToolCall("book", {"day": "friday"})
    assert first.messages == ({"role": "user", "content": "book friday"},)
    assert (first.id, first.category, first.tools) == ("line-1", "book", TOOLS)
    assert (second.expected, second.reply, second.category) == (None, "Which week?", "none")
    assert third.id == "ours"


def test_turns_before_keep_their_calls_and_results() -> None:
    value = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "book friday"}]},
            calling('{"day": "friday"}'),
            {"role": "tool", "tool_call_id": "c0", "content": "taken"},
            calling('{"day": "monday"}'),
        ]
    }
    request = from_openai(value, "own.jsonl:7")
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "tool"]
    assert json.dumps({"name": "book", "arguments": {"day": "friday"}}) in request["messages"][1]["content"]
    assert request["expected"]["arguments"] == {"day": "monday"}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (calling('{"day": "friday"}', '{"day": "monday"}'), "own.jsonl:3: messages: the answer makes 2 calls"),
        (calling("{day}"), "own.jsonl:3: messages: arguments of book are no JSON"),
        (calling("[1]"), "own.jsonl:3: messages: expected a call with a function's name"),
        ({"role": "assistant", "content": ""}, "own.jsonl:3: messages: the answer has neither"),
    ],
)
def test_what_is_no_answer_is_named(answer: dict[str, object], fault: str) -> None:
    value = line(answer)
    assert is_openai(value)
    with pytest.raises(ValueError, match=fault):
        from_openai(value, "own.jsonl:3")
