"""Conversations as OpenAI's chat API has them - its fine-tuning files, and what agents log - as requests of ours."""

import json
from typing import Any

from pipeline.toolcall.conversation import NONE
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tool import ToolCall


def is_openai(value: Any) -> bool:
    """Does the answer stand at the end of the messages, where a request of ours has `expected`?"""
    match value:
        case {"messages": [*_, {"role": "assistant"}]}:
            return "expected" not in value
    return False


def from_openai(value: dict[str, Any], where: str) -> dict[str, Any]:
    """A line of a requests file. The last message is the answer; system messages are left out: the prompt is ours.

    Raises ValueError naming `where` for an answer of several calls, or of neither call nor text.
    """
    *asked, answer = value["messages"]
    calls = answer.get("tool_calls") or []
    if len(calls) > 1:
        raise ValueError(f"{where}: messages: the answer makes {len(calls)} calls; the model makes one at a time")
    if not calls and not answer.get("content"):
        raise ValueError(f"{where}: messages: the answer has neither a call nor a text")
    turns = [message for message in asked if message.get("role") not in ("system", "developer")]
    request: dict[str, Any] = {
        "id": value.get("id") or f"line-{where.rpartition(':')[2]}",
        "category": NONE,
        "messages": [_message(message, where) for message in turns],
        "expected": None,
    }
    if calls:
        call = _call(calls[0], where)
        request |= {"category": call.name, "expected": {"name": call.name, "arguments": call.arguments}}
    else:
        request["reply"] = _text(answer["content"])
    if "tools" in value:
        request["tools"] = [tool.get("function", tool) for tool in value["tools"]]
    return request


def _message(message: dict[str, Any], where: str) -> dict[str, str]:
    calls = "".join(write_call(_call(call, where)) for call in message.get("tool_calls") or [])
    return {"role": str(message.get("role")), "content": _text(message.get("content")) + calls}


def _text(content: Any) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


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
