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


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "format": "path"}, "a/b"),  # pydantic's Path
        ({"type": "object", "propertyNames": {"type": "string"}}, {"a": 1}),  # zod's record
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [1, 2]),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}, "ab"),
        ({"type": "string", "enum": ["x", None]}, "x"),
        ({"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}, {"a": "x", "b": 2.0}),
        ({"type": "array", "items": {"type": "integer"}}, [5.0]),
        ({"type": "integer"}, 5.0),
    ],
)
def test_schemas_of_common_libraries_make_a_grammar(tiny_base: Path, schema: dict[str, Any], value: Any) -> None:
    """And a call that fits them is allowed as it is written."""
    parameters = {
        "type": "object",
        "properties": {"note": {"type": "string"}, "a/b": schema},
        "required": ["a/b"],
        "$id": "urn:x",
        "examples": [{}],
        "minProperties": 1,
        "anyOf": [{"required": ["a/b"]}, True],
    }
    tools = parse_tools([{"name": "Do", "parameters": parameters}], "tools.json")
    for arguments in ({"a/b": value}, {"note": "some words", "a/b": value}):
        call = ToolCall("Do", arguments)
        assert allows(Tokenizer(tiny_base), call, tools)
        assert compact.read(compact.write(call, tools), tools) == call


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"name": "a", "children": [{"name": "b", "children": []}]}, True),
        ({"name": "a", "children": [[]]}, False),
        ({"name": "a", "same": "b"}, True),
        ({"name": "a", "same": 1}, False),
        ({"name": "a", "node": {"next": {"next": {}}}}, True),
        ({"name": "a", "node": {"next": 1}}, False),
    ],
)
def test_references_are_to_the_tool_s_own_parameters(tiny_base: Path, arguments: dict[str, Any], allowed: bool) -> None:
    """They were looked for within the argument that holds them."""
    parameters = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "children": {"type": "array", "items": {"$ref": "#"}},
            "same": {"$ref": "#/properties/name"},
            "node": {"$ref": "#/$defs/node"},
        },
        "required": ["name"],
        "additionalProperties": False,
        "$defs": {
            "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
        },
    }
    tools = parse_tools([{"name": "Do", "parameters": parameters}], "tools.json")
    assert allows(Tokenizer(tiny_base), ToolCall("Do", arguments), tools) is allowed


def test_an_argument_that_no_text_fits_is_refused(tiny_base: Path) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "enum": [1]}}}
    with pytest.raises(ValueError, match=r'tool Do: no text fits \{"type": "string", "enum": \[1\]\}'):
        Grammar(Tokenizer(tiny_base).vocabulary, parse_tools([{"name": "Do", "parameters": odd}], "tools.json"))


@pytest.mark.parametrize(
    ("more", "where"),
    [({"anyOf": [{"properties": {"b": {}}}]}, "anyOf"), ({"$ref": "#/$defs/A", "$defs": {"A": {}}}, r"\$ref")],
)
def test_arguments_outside_of_the_properties_are_refused(tiny_base: Path, more: dict[str, Any], where: str) -> None:
    tools = parse_tools([{"name": "Do", "parameters": {"type": "object"} | more}], "tools.json")
    with pytest.raises(ValueError, match=f"tool Do: its arguments must stand under properties, not under .*{where}"):
        Grammar(Tokenizer(tiny_base).vocabulary, tools)


def test_fault_of_a_schema_is_told_without_our_grammar(tiny_base: Path) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    with pytest.raises(ValueError, match="look-ahead") as caught:
        Grammar(Tokenizer(tiny_base).vocabulary, parse_tools([{"name": "Do", "parameters": odd}], "tools.json"))
    assert "start:" not in str(caught.value)
    assert "SPAN" not in str(caught.value)
