"""The grammar for other runtimes, read by llguidance's own converter."""

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from pipeline.toolcall.gbnf import gbnf
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import parse_tools

TOOLS = parse_tools(
    [
        {
            "name": "Edit",
            "parameters": {
                "type": "object",
                "properties": {
                    "file_path": {"type": "string", "x-copy": "path"},
                    "new_string": {"type": "string"},
                    "mode": {"enum": ["a", 'b"c'], "type": "string"},
                    "timeout": {"type": "integer", "x-copy": "milliseconds"},
                },
                "required": ["file_path", "new_string"],
            },
        },
        {
            "name": "Set",
            "parameters": {"type": "object", "properties": {"options": {"type": "object"}}, "required": ["options"]},
        },
        {"name": "Stop", "parameters": {"type": "object", "properties": {}}},
    ],
    "tools",
)


@pytest.mark.parametrize(
    ("reply", "allowed"),
    [
        ("Hello <b>, <tool_call> is text here", True),
        ("<tool_call>Stop", True),
        ("<tool_call>Edit\nfile_path = a b.py\nnew_string: x\ny", True),
        ('<tool_call>Edit\nfile_path = a\nnew_string: \nmode: b"c\ntimeout: 90 s', True),
        ("<tool_call>Edit\nfile_path = a\nnew_string: \ntimeout: 5000", True),
        ('<tool_call>Set\noptions: {"a": [1, -2.5e3, "\\n"]}', True),
        ('<tool_call>Set\noptions: {"a": [1}', False),
        ("<tool_call>Other", False),
        ("<tool_call>Edit\nnew_string: x", False),  # the path is required
        ("<tool_call>Edit\nfile_path: a\nnew_string: x", False),  # and a copy
        ("<tool_call>Stop\nfile_path = a", False),
    ],
)
def test_calls_are_held_and_text_is_free(reply: str, allowed: bool, tiny_base: Path) -> None:
    tokenizer: Any = Tokenizer(tiny_base)
    matcher = LLMatcher(tokenizer.vocabulary, gbnf_to_lark(gbnf(TOOLS)))
    tokens = [*tokenizer.encode(reply, split_special_tokens=True), tokenizer.eos_token_id]
    assert matcher.consume_tokens(tokens) == allowed, matcher.get_error()


def test_the_default_tools_have_one() -> None:
    tools = parse_tools(json.loads(Path("data/tools.json").read_text(encoding="utf-8")), "data/tools.json")
    assert 'call-0 ::= "Read" after-0-0\n' in gbnf(tools)
