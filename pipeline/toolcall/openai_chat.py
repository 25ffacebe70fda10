"""Converts conversations of OpenAI's chat API (fine-tuning files, agents' logs) to this project's requests."""

import json
from typing import Any

from pipeline.toolcall.conversation import NONE
from pipeline.toolcall.offered import offered, visible
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tool import Tool, ToolCall, parse_tools


def is_openai(value: Any) -> bool:
    """Whether the last message is the answer; this project's requests have `expected` instead."""
    match value:
        case {"messages": [*_, {"role": "assistant"}]}:
            return "expected" not in value
    return False


def from_openai(value: dict[str, Any], own: tuple[Tool, ...], where: str) -> dict[str, Any]:
    """A line of a requests file, in our form. The last message is the answer; system messages are dropped: the prompt
    is ours.

    The line's tools, matched with `own`, and its texts take the same form as on the server (offered.py).
    Raises ValueError naming `where` for a turn with several calls, an answer with neither call nor text, content that
    is not text (an image), and invalid tools.
    """
    messages = value["messages"]
    if wrong := [message for message in messages if not isinstance(message, dict)]:
        raise ValueError(f"{where}: messages: expected objects, got {str(wrong[0])[:80]!r}")
    *asked, answer = messages
    turns = [_turn(message, where) for message in asked if message.get("role") not in ("system", "developer")]
    calls, texts = _calls(answer, where), [visible(text, "assistant") for text in _texts(answer, where)]
    if not calls and not any(texts):
        raise ValueError(f"{where}: messages: the answer has neither a call nor a text")
    request: dict[str, Any] = {
        "id": value.get("id") or f"line-{where.rpartition(':')[2]}",
        "category": NONE,
        "messages": [turn for turn in turns if turn["content"] or turn["role"] == "tool"],
        "expected": None,
    }
    if calls:
        call = calls[0]
        request |= {"category": call.name, "expected": {"name": call.name, "arguments": call.arguments}}
    else:
        request["reply"] = "\n".join(texts)
    if "tools" in value:
        found = value["tools"]
        theirs = parse_tools([*map(_tool, found)] if isinstance(found, list) else found, f"{where}: tools")
        request["tools"] = [tool.to_json() for tool in offered(theirs, own, None)]
    return request


def _turn(message: dict[str, Any], where: str) -> dict[str, str]:
    calls = map(write_call, _calls(message, where))
    role = str(message.get("role"))
    parts = [*(visible(text, role) for text in _texts(message, where)), *calls]
    return {"role": role, "content": "\n".join(part for part in parts if part)}


def _texts(message: dict[str, Any], where: str) -> list[str]:
    match message.get("content"):
        case None:
            return []
        case str(text):
            return [text]
        case list(parts) if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            return [part["text"] for part in parts]
        case other:
            raise ValueError(f"{where}: messages: content: expected a text or parts of text, got {str(other)[:80]!r}")


def _calls(message: dict[str, Any], where: str) -> list[ToolCall]:
    match message.get("tool_calls") or []:
        case [_, _, *_] as several:
            raise ValueError(f"{where}: messages: a turn makes {len(several)} calls; the model makes one at a time")
        case list(calls):
            return [_call(call, where) for call in calls]
        case other:
            raise ValueError(f"{where}: messages: tool_calls: expected a list, got {str(other)[:80]!r}")


def _tool(value: Any) -> Any:
    """As in a tools file; anything but a tool is left for parse_tools to refuse."""
    match value:
        case {"function": dict(tool)} | dict(tool):
            parameters = tool.get("parameters") or {"type": "object", "properties": {}}
            return {**tool, "description": tool.get("description") or "", "parameters": parameters}
    return value


def _call(call: Any, where: str) -> ToolCall:
    match call:
        case {"function": {"name": str(name), "arguments": str(text)}}:
            try:
                arguments = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: messages: arguments of {name} are no JSON: {error.msg}") from error
            if isinstance(arguments, dict):
                return ToolCall(name, arguments)
    raise ValueError(f"{where}: messages: expected a call with a function's name and arguments, got {str(call)[:80]!r}")
