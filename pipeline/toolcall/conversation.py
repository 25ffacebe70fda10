"""A request: a conversation up to a user's message or a tool's result, the tools on offer, the right call."""

from dataclasses import dataclass
from typing import Any

from pipeline.toolcall.score import fits
from pipeline.toolcall.tool import Tool, ToolCall, find_tool, parse_tools

NONE = "none"  # the category of requests for which no call is right

Message = dict[str, str]  # role and content
Accepted = dict[str, list[Any]]  # argument -> accepted values; null: may be left out


@dataclass(frozen=True)
class Request:
    id: str
    category: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    expected: ToolCall | None
    accept: tuple[Accepted, ...] = ()
    reply: str | None = None  # the answer to train on if no call is right

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "id": self.id,
            "category": self.category,
            "messages": list(self.messages),
            "tools": [tool.to_json() for tool in self.tools],
            "expected": None,
        }
        if self.expected:
            value["expected"] = {"name": self.expected.name, "arguments": self.expected.arguments}
        if self.accept:
            value["accept"] = list(self.accept)
        if self.reply is not None:
            value["reply"] = self.reply
        return value


def parse_request(value: Any, tools: tuple[Tool, ...], where: str) -> Request:
    """The request in a line of a requests file; `tools` are used if the line has none.

    Raises ValueError naming `where` and the field that breaks the format (data/requests/README.md).
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {str(value)[:80]!r}")
    for field in ("id", "category"):
        if not isinstance(value.get(field), str) or not value[field]:
            raise ValueError(f"{where}: {field}: expected a text, got {value.get(field)!r}")
    if "tools" in value:
        tools = parse_tools(value["tools"], f"{where}: tools")
    request = Request(
        value["id"],
        value["category"],
        parse_messages(value.get("messages"), f"{where}: messages"),
        tools,
        _parse_expected(value, tools, where),
        _parse_accept(value.get("accept", []), f"{where}: accept"),
        value.get("reply"),
    )
    category = request.expected.name if request.expected else NONE
    if request.category != category:
        raise ValueError(f"{where}: category: expected {category!r}, got {request.category!r}")
    if request.expected and request.accept and not fits(request.expected, request.accept):
        raise ValueError(f"{where}: accept: the expected call itself fits none of its maps")
    return request


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of messages, got {str(value)[:80]!r}")
    for message in value:
        match message:
            case {"role": "user" | "assistant" | "tool", "content": str()}:
                continue
        raise ValueError(f"{where}: expected role user, assistant or tool and a text as content, got {message!r}")
    if value[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}: must end with the user, got role {value[-1]['role']!r}")
    return tuple(value)


def _parse_expected(value: dict[str, Any], tools: tuple[Tool, ...], where: str) -> ToolCall | None:
    if "expected" not in value:
        raise ValueError(f"{where}: expected: missing; null says that no call is right")
    match value["expected"]:
        case None:
            return None
        case {"name": str(name), "arguments": dict(arguments)}:
            call = ToolCall(name, arguments)
        case other:
            raise ValueError(f"{where}: expected: needs name and arguments, got {other!r}")
    tool = find_tool(tools, name)
    if tool is None:
        offered = [tool.name for tool in tools]
        raise ValueError(f"{where}: expected: no tool {name!r} among {offered}")
    if fault := tool.fault(arguments):
        raise ValueError(f"{where}: expected: does not fit the schema of {name}: {fault}")
    return call


def _parse_accept(value: Any, where: str) -> tuple[Accepted, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list of maps, got {value!r}")
    for accepted in value:
        if not isinstance(accepted, dict) or not all(
            isinstance(values, list) and values for values in accepted.values()
        ):
            raise ValueError(f"{where}: expected a list of values per argument, got {accepted!r}")
    return tuple(value)
