"""OpenAI's chat completions: requests as pydantic models, replies as JSON values and events."""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from pipeline.runtime.generation import Choice
from pipeline.serving.engine import Asked, Piece, Said, in_turn
from pipeline.toolcall.offered import offered, visible
from pipeline.toolcall.tool import Tool, ToolCall


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Function(BaseModel):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class WireTool(BaseModel):
    type: Literal["function"]
    function: Function


class CalledFunction(BaseModel):
    name: str
    arguments: str


class WireCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def _no_null(value: Any) -> Any:
    return [] if value is None else value


class WireMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: Annotated[list[WireCall], BeforeValidator(_no_null)] = []
    tool_call_id: str | None = None


class ChosenName(BaseModel):
    name: str


class ChosenFunction(BaseModel):
    type: Literal["function"]
    function: ChosenName


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatBody(BaseModel):
    """Other keys are accepted and ignored: sampling is greedy, and the system prompt is the model's own."""

    model: str
    messages: list[WireMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: Annotated[list[WireTool], BeforeValidator(_no_null)] = []
    tool_choice: Literal["auto", "none", "required"] | ChosenFunction | None = None
    n: Literal[1] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


def asked(body: ChatBody, own: tuple[Tool, ...], max_new_tokens: int) -> Asked:
    """Raises ValueError if the conversation does not end with the user or a tool, or the chosen tool is missing."""
    tools = [
        Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {"type": "object"})
        for tool in body.tools
    ]
    wanted = body.tool_choice.function.name if isinstance(body.tool_choice, ChosenFunction) else None
    choice = Choice.REQUIRED if wanted else Choice(str(body.tool_choice or "auto"))
    limit = body.max_completion_tokens or body.max_tokens or max_new_tokens
    if choice == Choice.REQUIRED and not tools:
        raise ValueError("tool_choice asks for a call, but there are no tools")
    return Asked(
        in_turn(_said(body.messages)),
        offered(tools, own, wanted),
        choice if tools else Choice.NONE,
        min(limit, max_new_tokens),
        bool(body.stream),
    )


def _said(wire: list[WireMessage]) -> Iterator[Said]:
    for message in wire:
        if message.role in ("system", "developer"):
            continue
        parts = [message.content] if isinstance(message.content, str) else [p.text for p in message.content or []]
        calls = tuple((call.id, _called(call)) for call in message.tool_calls)
        texts = [visible(part, message.role) for part in parts]
        yield Said(message.role, "\n".join(filter(None, texts)), calls, message.tool_call_id)


def _called(call: WireCall) -> ToolCall:
    try:
        arguments = json.loads(call.function.arguments or "{}")
        json.dumps(arguments, ensure_ascii=False).encode()  # half a surrogate pair, "\\ud800", is JSON but no text
    except ValueError as error:
        raise ValueError(f"messages: arguments of {call.function.name} are no JSON text: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"messages: arguments of {call.function.name} are no object")
    return ToolCall(call.function.name, arguments)


def completion(piece: Piece, model: str) -> dict[str, Any]:
    call = piece.call
    content = None if call or piece.is_cut_call else piece.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if call:
        message["tool_calls"] = [_tool_call(call)]
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(piece)}],
        "usage": usage(piece),
    }


def finish_reason(piece: Piece) -> str:
    if not piece.finished:
        return "length"
    return "tool_calls" if piece.call else "stop"


def usage(piece: Piece) -> dict[str, Any]:
    prompt = piece.prompt_tokens + piece.prefix_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": piece.new_tokens,
        "total_tokens": prompt + piece.new_tokens,
        "prompt_tokens_details": {"cached_tokens": piece.cached_tokens},
    }


class Stream:
    """Makes the server-sent events of one reply from its pieces."""

    def __init__(self, model: str, include_usage: bool) -> None:
        self._model, self._include_usage = model, include_usage
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._begun = False

    def events(self, piece: Piece, text: str) -> Iterator[str]:
        """`text`: the new text in `piece`."""
        if not self._begun:
            self._begun = True
            yield self._chunk({"role": "assistant", "content": None})
        if text:
            yield self._chunk({"content": text})
        if piece.call:
            yield self._chunk({"tool_calls": [{"index": 0, **_tool_call(piece.call)}]})
        if piece.last:
            yield self._chunk({}, finish_reason(piece))
            if self._include_usage:
                yield self._line(choices=[], usage=usage(piece))
            yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> str:
        return self._line(choices=[{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    def _line(self, **fields: Any) -> str:
        chunk = {"id": self._id, "object": "chat.completion.chunk", "created": int(time.time()), "model": self._model}
        return f"data: {json.dumps(chunk | fields, ensure_ascii=False)}\n\n"


def failure_event(status: int, message: str) -> str:
    return f"data: {json.dumps(error(status, message), ensure_ascii=False)}\n\n"


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}
