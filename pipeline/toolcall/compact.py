"""The form in which the model writes a call: one line per argument, texts as they are.

    <tool_call>Edit
    file_path = src/app.py
    old_string = print("a\\n")
    new_string: log.info("a\\n")

`=` marks a text copied from the request (copies.py), `:` the model's own value. Texts are neither quoted nor escaped,
so copied text keeps the tokens it has in the request, and a call takes half as many as in JSON. Everywhere else, calls
are JSON (reply.py).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from pipeline.toolcall import copies
from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool, ToolCall, find_tool

# A text whose schema has another keyword (pattern, format, maxLength, ...) is JSON, whose grammar enforces these.
_TEXT_KEYWORDS = {"type", "description", "title", "default", "examples", "enum", "const", "x-copy"}


def is_text(schema: Any) -> bool:
    """Whether a value of `schema` is written as it is; all others are written as JSON."""
    return isinstance(schema, dict) and schema.get("type") == "string" and schema.keys() <= _TEXT_KEYWORDS


def write(call: ToolCall, tools: Sequence[Tool], text: str = "") -> str:
    """`call` in this form, arguments in the order of the schema; `text`: the request that they are copied from."""
    tool = find_tool(tools, call.name)
    properties = tool.parameters.get("properties", {}) if tool else {}
    order = list(properties)
    names = sorted(call.arguments, key=lambda name: order.index(name) if name in order else len(order))
    lines = [OPENING + call.name]
    for name in names:
        value, schema = call.arguments[name], properties.get(name)
        copy = copies.copied(schema, value, call.arguments, text)
        separator = copies.separators(schema)[0] if copy is not None else copies.OWN
        lines.append(name + separator + (_write(value, schema, tool) if copy is None else copy))
    return "\n".join(lines)


def read(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    """The call, or None if `text` as a whole is not one."""
    if not text.startswith(OPENING):
        return None
    name, line, rest = text[len(OPENING) :].partition("\n")
    tool = find_tool(tools, name)
    if tool is None:
        return None
    properties, required = tool.parameters.get("properties", {}), tool.parameters.get("required", [])
    arguments: dict[str, Any] = {}
    left, names = line + rest, list(properties)
    while left:
        key = _key(names, properties, required).match(left)
        if key is None:
            return None
        argument, separator, _ = key[1].rpartition(copies.COPY if key[1].endswith(copies.COPY) else copies.OWN)
        names = names[names.index(argument) + 1 :]
        following = _key(names, properties, required).search(left, key.end())
        end = following.start() if following else len(left)
        arguments[argument] = _read(left[key.end() : end], properties[argument], separator, arguments)
        left = left[end:]
    return ToolCall(name, arguments)


def _key(names: Sequence[str], properties: dict[str, Any], required: Sequence[str]) -> re.Pattern[str]:
    """Only `names` up to the first required one can come next: a line that begins with a later one is text."""
    ends = next((at for at, name in enumerate(names, 1) if name in required), len(names))
    keys = [re.escape(name + separator) for name in names[:ends] for separator in copies.separators(properties[name])]
    return re.compile(f"\n({'|'.join(keys)})" if keys else "(?!)")


def _write(value: Any, schema: Any, tool: Tool | None) -> str:
    if isinstance(value, str) and (tool is None or is_text(schema)):
        return value
    return json.dumps(_as_in(schema, value), ensure_ascii=False)


def _as_in(schema: Any, value: Any) -> Any:
    """`value` as the grammar has it: object keys in the order of their schema, integers without a decimal point."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        known = schema.get("properties", {})
        keys = [*(key for key in known if key in value), *(key for key in value if key not in known)]
        return {key: _as_in(known.get(key), value[key]) for key in keys}
    if isinstance(value, list):
        return [_as_in(schema.get("items"), item) for item in value]
    whole = schema.get("type") == "integer" and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _read(value: str, schema: Any, separator: str, before: dict[str, Any]) -> Any:
    if separator == copies.COPY or copies.form_of(schema):
        restored = copies.restored(schema, value, before)
        if restored is not None:
            return restored
    if is_text(schema):
        return value
    try:
        found = json.loads(value)
        json.dumps(found, allow_nan=False)  # 1e999 is valid JSON, but infinite in Python
    except ValueError:
        return value  # as a text; Tool.fault checks whether it fits the schema
    return found
