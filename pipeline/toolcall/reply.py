"""A reply: text, or `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; the model writes compact.py's form."""

import json
import re

from pipeline.toolcall.tool import ToolCall

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{OPENING}(.*?)(?:{CLOSING}|$)", re.DOTALL)


def write_call(call: ToolCall) -> str:
    body = {"name": call.name, "arguments": call.arguments}
    return f"{OPENING}{json.dumps(body, ensure_ascii=False)}{CLOSING}"


def attempts_call(reply: str) -> bool:
    return OPENING in reply


def parse_call(reply: str) -> ToolCall | None:
    """The first call in `reply`, or None when it holds none that can be read.

    None is a result, not an error: a model that writes broken JSON is what we came to measure.
    """
    found = _CALL.search(reply)
    if found is None:
        return None
    try:
        # A value may hold the closing marker: the JSON text says where it ends, not the marker.
        body, _ = json.JSONDecoder().raw_decode(reply, found.start(1))
    except (ValueError, RecursionError):
        return None
    match body:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, arguments)
    return None
