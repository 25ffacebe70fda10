import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.toolcall import compact
from pipeline.toolcall.grammar import Grammar
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool, ToolCall, parse_tools

COPYING = {
    "name": "Edit",
    "parameters": {
        "type": "object",
        "properties": {
            "file_path": {"type": "string", "x-copy": "path"},
            "old_string": {"type": "string", "x-copy": "span"},
            "new_string": {"type": "string"},
            "count": {"type": "integer"},
        },
        "required": ["old_string", "new_string"],
        "additionalProperties": False,
    },
}
TEXT = 'In b c.py under src, replace\n```\nx = "é\\n"\n```\nby y'


def allows(tokenizer: Any, call: ToolCall, tools: tuple[Tool, ...]) -> bool:
    guide = Grammar(tokenizer.vocabulary, tools).start(TEXT)
    tokens = tokenizer.encode(compact.write(call, tools), add_special_tokens=False, split_special_tokens=True)
    try:
        guide.accept([*tokens, tokenizer.eos_token_id])
    except RuntimeError:
        return False
    return guide.finished


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"old_string": "x", "new_string": "anything"}, True),
        ({"file_path": "b c.py", "old_string": "x", "new_string": "", "count": 3}, True),
        ({"file_path": "src/b c.py", "old_string": "x", "new_string": ""}, True),  # two spans and a slash
        ({"file_path": "lib/b c.py", "old_string": "x", "new_string": ""}, False),
        ({"old_string": 'x = "é\\n"', "new_string": ""}, True),  # a quote, a backslash: escaped in the call
        ({"old_string": '```\nx = "é\\n"\n```', "new_string": ""}, True),
        ({"old_string": "src/b", "new_string": ""}, False),  # joined spans are for paths
        ({"old_string": "X", "new_string": ""}, False),
        ({"old_string": "repl", "new_string": ""}, False),  # half a word
        ({"file_path": "rc/b c.py", "old_string": "x", "new_string": ""}, False),
        ({"new_string": ""}, False),  # required
        ({"file_path": "b c.py", "new_string": ""}, False),
        ({"old_string": "x", "new_string": "a\nmore: 1"}, True),  # no argument of this tool: text
        ({"old_string": "x", "new_string": "", "count": "3"}, False),
    ],
)
def test_copied_arguments_are_spans_of_the_request(tiny_base: Path, arguments: dict[str, Any], allowed: bool) -> None:
    tools = parse_tools([COPYING, {"name": "Stop", "parameters": {"type": "object"}}], "tools.json")
    tokenizer = Tokenizer(tiny_base)
    assert allows(tokenizer, ToolCall("Edit", arguments), tools) is allowed
    assert allows(tokenizer, ToolCall("Stop", {}), tools)


def test_without_copied_arguments_any_text_is_allowed(tiny_base: Path) -> None:
    free = json.loads(json.dumps(COPYING).replace(', "x-copy": "path"', "").replace(', "x-copy": "span"', ""))
    arguments = {"file_path": "lib/x", "old_string": "nowhere", "new_string": ""}
    call = ToolCall("Edit", arguments)
    assert allows(Tokenizer(tiny_base), call, parse_tools([free], "tools.json"))
