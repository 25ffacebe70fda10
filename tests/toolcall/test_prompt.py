import json
from typing import Any

import pytest

from pipeline.toolcall import compact, copies, prompt
from pipeline.toolcall.tool import parse_tools

READ = {"type": "object", "properties": {"p": {"type": "string"}, "n": {"type": "integer"}}, "required": ["p"]}
TOOLS = parse_tools([{"name": "Read", "description": "Read.", "parameters": READ}], "tools")


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (copies, "OWN", " - "),
        (copies, "UNITS", {"s": 1000}),
        (compact, "OPENING", "<call>"),
        (prompt, "END", "</s>"),
        (prompt, "_kind", lambda _: ""),
        (prompt, "request_text", lambda messages: messages[-1]["content"]),
    ],
)
def test_form_is_another_where_anything_is_written_otherwise(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    before = prompt.form()
    assert before == prompt.form()
    monkeypatch.setattr(where, name, value)
    assert prompt.form() != before


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (call("Read", p="a"), "call"),
        ("It says one.", "text"),
        (call("Look", p="a"), ""),  # no such tool
        (call("Read", q="a"), ""),
        (call("Read", p="a", n="many"), ""),
        (call("Read", p="a\nn: 1"), ""),  # would be read as another call
        ('<tool_call>{"name": "Read", "argum', ""),
        ("  ", ""),
    ],
)
def test_what_an_agent_said_wrong_is_read_and_not_learnt(said: str, kind: str) -> None:
    messages = [{"role": "user", "content": "show a"}, {"role": "assistant", "content": said}]
    parts = list(prompt.request_parts(prompt._Letters(), messages, TOOLS))
    assert [found for _, found in parts] == ["", "", "", "", kind, "", ""]
    assert [token for part, _ in parts for token in part] == prompt.request_tokens(prompt._Letters(), messages, TOOLS)
