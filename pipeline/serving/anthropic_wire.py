"""Anthropic's Messages API: requests as pydantic models, replies as JSON values and events."""

import json
import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from pipeline.runtime.generation import Choice
from pipeline.serving.engine import Asked, Piece, Said, in_turn
from pipeline.toolcall.offered import offered, visible
from pipeline.toolcall.tool import Tool, ToolCall


class Text(BaseModel):
    type: Literal["text"]
    text: str


class ToolUse(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(BaseModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: "str | list[Text | Ignored] | None" = None


class Ignored(BaseModel):
    """Thinking, which the model does not see."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[Text | ToolUse | ToolResult | Ignored, Field(discriminator="type")]


class WireMessage(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class WireTool(BaseModel):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any] | None = None  # None: a tool that the provider's servers would run


class ToolChoice(BaseModel):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None


def _no_null(value: Any) -> Any:
    return [] if value is None else value


class MessagesBody(BaseModel):
    """Other keys are accepted and ignored: sampling is greedy, and the system prompt is the model's own."""

    model: str
    messages: list[WireMessage] = Field(min_length=1)
    max_tokens: int = Field(default=1024, ge=1)
    tools: Annotated[list[WireTool], BeforeValidator(_no_null)] = []
    tool_choice: ToolChoice | None = None
    stream: bool | None = False


class CountBody(MessagesBody):
    """The body of /v1/messages/count_tokens."""


def asked(body: MessagesBody, own: tuple[Tool, ...], max_new_tokens: int) -> Asked:
    """Raises ValueError if the conversation does not end with the user, or the chosen tool is not offered."""
    tools = [
        Tool(tool.name, tool.description or "", tool.input_schema)
        for tool in body.tools
        if tool.input_schema is not None
    ]
    wanted = body.tool_choice.name if body.tool_choice and body.tool_choice.type == "tool" else None
    kind = body.tool_choice.type if body.tool_choice else "auto"
    choice = {"auto": Choice.AUTO, "any": Choice.REQUIRED, "tool": Choice.REQUIRED, "none": Choice.NONE}[kind]
    if body.tool_choice and body.tool_choice.type == "tool" and wanted is None:
        raise ValueError("tool_choice: type tool needs a name")
    if choice == Choice.REQUIRED and not tools:
        raise ValueError("tool_choice asks for a call, but there are no tools")
    return Asked(
        in_turn(_said(body.messages)),
        offered(tools, own, wanted),
        choice if tools else Choice.NONE,
        min(body.max_tokens, max_new_tokens),
        bool(body.stream),
    )


def _said(wire: list[WireMessage]) -> Iterator[Said]:
    for message in wire:
        if message.role == "system":
            continue
        blocks = [Text(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        for block in blocks:
            if isinstance(block, ToolResult):
                yield Said("tool", _result(block), answers=block.tool_use_id)
        texts = [visible(block.text) for block in blocks if isinstance(block, Text)]
        calls = [(block.id, ToolCall(block.name, block.input)) for block in blocks if isinstance(block, ToolUse)]
        yield Said(message.role, "\n".join(filter(None, texts)), tuple(calls))


def _result(block: ToolResult) -> str:
    if isinstance(block.content, list):
        return visible("\n".join(part.text for part in block.content if isinstance(part, Text)), "tool")
    return visible(block.content or "", "tool")


def message_id() -> str:
    return f"msg_{secrets.token_hex(12)}"


def message(piece: Piece, model: str) -> dict[str, Any]:
    call = piece.call
    content: list[dict[str, Any]] = []
    if call:
        content = [{"type": "tool_use", "id": _call_id(), "name": call.name, "input": call.arguments}]
    elif not piece.is_cut_call:
        content = [{"type": "text", "text": piece.text}]
    return {
        "id": message_id(),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop_reason(piece),
        "stop_sequence": None,
        "usage": usage(piece),
    }


def stop_reason(piece: Piece) -> str:
    if not piece.finished:
        return "max_tokens"
    return "tool_use" if piece.call else "end_turn"


def usage(piece: Piece) -> dict[str, int]:
    return {
        "input_tokens": piece.prompt_tokens - piece.kept_tokens,
        "cache_read_input_tokens": piece.cached_tokens,
        "cache_creation_input_tokens": 0 if piece.prefix_kept else piece.prefix_tokens,
        "output_tokens": piece.new_tokens,
    }


class Stream:
    """Makes the server-sent events of one reply from its pieces."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._begun = False
        self._block = ""

    def events(self, piece: Piece, text: str) -> Iterator[str]:
        """`text`: the new text in `piece`."""
        if not self._begun:
            self._begun = True
            start = message(piece, self._model) | {"content": [], "stop_reason": None}
            yield _event("message_start", message=start)
        if text:
            yield from self._open({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})
        if call := piece.call:
            yield from self._open({"type": "tool_use", "id": _call_id(), "name": call.name, "input": {}})
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})
        if piece.last:
            if self._block:
                yield _event("content_block_stop", index=0)
            yield _event(
                "message_delta", delta={"stop_reason": stop_reason(piece), "stop_sequence": None}, usage=usage(piece)
            )
            yield _event("message_stop")

    def _open(self, block: dict[str, Any]) -> Iterator[str]:
        if not self._block:
            self._block = block["type"]
            yield _event("content_block_start", index=0, content_block=block)

    def _delta(self, delta: dict[str, str]) -> str:
        return _event("content_block_delta", index=0, delta=delta)


def failure_event(status: int, message: str) -> str:
    return _event("error", error=error(status, message)["error"])


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"


def _call_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"


ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error(status: int, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": ERRORS.get(status, "api_error"), "message": message}}
