"""The form in which the model itself writes a call: an argument a line, texts as they are.

    <tool_call>Edit
    file_path: src/app.py
    old_string: print("a\\n")
    new_string: log.info("a\\n")

Nothing is quoted or escaped, so what is copied from a request has the tokens that it has there, and a call has half
as many tokens as in JSON. Outside of the model calls stand as JSON (reply.py).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool, ToolCall, find_tool

# With any other keyword (pattern, format, maxLength, ...) a text is written as JSON, whose grammar knows them.
_TEXT_KEYWORDS = {"type", "description", "title", "default", "examples", "enum", "const", "x-copy"}


def is_text(schema: Any) -> bool:
    """Is a value of `schema` written as it is? All others are written as JSON."""
    return isinstance(schema, dict) and schema.get("type") == "string" and schema.keys() <= _TEXT_KEYWORDS


def write(call: ToolCall, tools: Sequence[Tool]) -> str:
    """In the order of the tool's schema. Raises ValueError where `read` would take the text for another call."""
    tool = find_tool(tools, call.name)
    order = list(tool.parameters.get("properties", {})) if tool else []
    names = sorted(call.arguments, key=lambda name: order.index(name) if name in order else len(order))
    text = OPENING + call.name + "".join(f"\n{name}: {_write(call.arguments[name], name, tool)}" for name in names)
    if tool and read(text, tools) != call:
        raise ValueError(f"a value of this call of {call.name} looks like its next argument: {text!r}")
    return text


def read(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    """The call that is all of `text`, or None where it is none."""
    if not text.startswith(OPENING):
        return None
    name, line, rest = text[len(OPENING) :].partition("\n")
    tool = find_tool(tools, name)
    if tool is None:
        return None
    properties = tool.parameters.get("properties", {})
    arguments: dict[str, Any] = {}
    left, names = line + rest, list(properties)
    while left:
        key = _key(names).match(left)
        if key is None:
            return None
        names = names[names.index(key[1]) + 1 :]
        following = _key(names).search(left, key.end()) if names else None
        end = following.start() if following else len(left)
        arguments[key[1]] = _read(left[key.end() : end], properties[key[1]])
        left = left[end:]
    return ToolCall(name, arguments)


def _key(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile(f"\n({'|'.join(map(re.escape, names))}): ") if names else re.compile("(?!)")


def _write(value: Any, name: str, tool: Tool | None) -> str:
    schema = tool.parameters.get("properties", {}).get(name) if tool else None
    if isinstance(value, str) and (tool is None or is_text(schema)):
        return value
    return json.dumps(value, ensure_ascii=False)


def _read(value: str, schema: Any) -> Any:
    if is_text(schema):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # which does not fit the schema, and is reported so
