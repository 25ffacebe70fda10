"""Is a reply right? Definitions: data/requests/README.md."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pipeline.toolcall.reply import attempts_call, parse_call
from pipeline.toolcall.tool import Tool, ToolCall, find_tool


class Outcome(StrEnum):
    """What one reply came to. Every reply has exactly one, so the counts add up to the replies."""

    EXACT = "exact"
    MALFORMED = "malformed"  # a call was begun that cannot be read or breaks its tool's schema
    WRONG_TOOL = "wrong_tool"
    WRONG_ARGUMENTS = "wrong_arguments"
    CALLED = "called"  # a call, although none is right
    SILENT = "silent"  # no call, although one is right


def outcome(
    reply: str,
    tools: Sequence[Tool],
    expected: ToolCall | None,
    accept: Sequence[dict[str, list[Any]]],
) -> Outcome:
    if not attempts_call(reply):
        return Outcome.EXACT if expected is None else Outcome.SILENT
    if expected is None:
        return Outcome.CALLED
    call = parse_call(reply)
    if call is None or not is_valid(call, tools):
        return Outcome.MALFORMED
    if call.name != expected.name:
        return Outcome.WRONG_TOOL
    exact = fits(call, accept) if accept else same(call.arguments, expected.arguments)
    return Outcome.EXACT if exact else Outcome.WRONG_ARGUMENTS


def is_valid(call: ToolCall, tools: Sequence[Tool]) -> bool:
    tool = find_tool(tools, call.name)
    return tool is not None and tool.fault(call.arguments) is None


def fits(call: ToolCall, accept: Sequence[dict[str, list[Any]]]) -> bool:
    return any(
        all(
            name in accepted and any(same(value, right) for right in accepted[name])
            for name, value in call.arguments.items()
        )
        and all(name in call.arguments or None in values for name, values in accepted.items())
        for accepted in accept
    )


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: unlike in Python, true is not 1."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
