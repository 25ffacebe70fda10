import json
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import files
from pipeline.toolcall.openai_chat import from_openai, is_openai
from pipeline.toolcall.requests import read_requests
from pipeline.toolcall.tool import Tool, ToolCall, parse_tools

BOOK: dict[str, Any] = {
    "name": "book",
    "description": "Book a meeting.",
    "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]},
}
TOOLS = parse_tools([BOOK], "tools")


ASKED = [{"role": "user", "content": "and saturday"}, {"role": "assistant", "content": "Both?"}]


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
    request = from_openai(value, TOOLS, "own.jsonl:7")
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "tool"]
    assert json.dumps({"name": "book", "arguments": {"day": "friday"}}) in request["messages"][1]["content"]
    assert request["expected"]["arguments"] == {"day": "monday"}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (calling('{"day": "friday"}', '{"day": "monday"}'), "own.jsonl:3: messages: a turn makes 2 calls"),
        (calling("{day}"), "own.jsonl:3: messages: arguments of book are no JSON"),
        (calling("[1]"), "own.jsonl:3: messages: expected a call with a function's name"),
        ({"role": "assistant", "content": ""}, "own.jsonl:3: messages: the answer has neither"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
            "own.jsonl:3: messages: the answer has neither",
        ),
        ({"role": "assistant", "content": None, "tool_calls": {"a": 1}}, "own.jsonl:3: messages: tool_calls: expected"),
    ],
)
def test_what_is_no_answer_is_named(answer: dict[str, object], fault: str) -> None:
    value = line(answer)
    assert is_openai(value)
    with pytest.raises(ValueError, match=fault):
        from_openai(value, TOOLS, "own.jsonl:3")


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        (calling('{"day": "friday"}', '{"day": "monday"}'), "own.jsonl:3: messages: a turn makes 2 calls"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "own.jsonl:3: messages: content: expected a text or parts of text, got \"\\[{'type': 'image_url'",
        ),
        ("book friday", "own.jsonl:3: messages: expected objects, got 'book friday'"),
    ],
)
def test_an_earlier_turn_that_would_be_cut_is_named(turn: object, fault: str) -> None:
    """Of several calls all but the first were left out of the prompt, and an image was an empty text."""
    value = line(calling('{"day": "friday"}'))
    value["messages"] = [turn, *value["messages"]]  # type: ignore[misc]
    with pytest.raises(ValueError, match=fault):
        from_openai(value, TOOLS, "own.jsonl:3")


@pytest.mark.parametrize(
    ("tools", "fault"),
    [
        (None, "own.jsonl:3: tools: expected a list of at least one tool, got 'None'"),
        ({"name": "book"}, "own.jsonl:3: tools: expected a list"),
        (["book"], "own.jsonl:3: tools: tool 1: needs a name and parameters, got 'book'"),
        ([{"function": {"name": "book", "description": 3}}], r"own.jsonl:3: tools: tool 1 \(book\): description: exp"),
    ],
)
def test_tools_that_are_none_are_named(tools: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        from_openai(line(calling('{"day": "friday"}'), tools=tools), TOOLS, "own.jsonl:3")


def test_tools_and_texts_are_those_that_the_server_shows(tmp_path: Path) -> None:
    """Training saw a known tool's pages and an agent's reminders, of which the server leaves out both."""
    shown = Tool(
        "book", "Book a meeting.", {"type": "object", "properties": {"day": {"type": "string", "x-copy": "span"}}}
    )
    theirs = {**BOOK, "description": "Books.\n\nPages of it.", "parameters": {**BOOK["parameters"], "required": []}}
    ping = {"name": "ping", "description": "Ping a host.\nPages of it."}
    value = line(
        calling('{"day": "friday"}'),
        tools=[{"type": "function", "function": found} for found in ({"name": "bare"}, theirs, ping)],
    )
    parts = ["<system-reminder>It is May.</system-reminder>\n", "book friday", "in May\n"]
    value["messages"][1] = {"role": "user", "content": [{"type": "text", "text": text} for text in parts]}  # type: ignore[index]
    files.write_jsonl(tmp_path / "own.jsonl", [value])
    (request,) = read_requests(tmp_path / "own.jsonl", (shown,))
    nothing = {"type": "object", "properties": {}}
    assert request.tools == (shown, Tool("bare", "", nothing), Tool("ping", "Ping a host.", nothing))
    assert request.messages == ({"role": "user", "content": "book friday\nin May"},)


def test_the_answer_is_put_as_the_same_turn_is_in_a_history() -> None:
    """Or the server's prompt would hold another text than the one that was learnt."""
    text = "Done.\n<system-reminder>hush</system-reminder>"
    asked = line({"role": "assistant", "content": text})
    answered = from_openai(asked, TOOLS, "x:1")
    gone_on = from_openai({"messages": [*cast(list[Any], asked["messages"]), *ASKED]}, TOOLS, "x:2")
    assert answered["reply"] == gone_on["messages"][1]["content"]
    assert "hush" not in answered["reply"]
