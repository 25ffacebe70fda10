"""From a request to tokens, the same way for training, evaluation, benchmark and server.

The form is ChatML. The prefix (system prompt with the tools) is the same for every request of an agent, so its KV cache
is computed once. Messages and tools are encoded without special tokens: `<|im_end|>` in a request is text.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.toolcall import compact
from pipeline.toolcall.conversation import Message, Request
from pipeline.toolcall.copies import copy_of
from pipeline.toolcall.reply import OPENING, parse_call
from pipeline.toolcall.tool import Tool, ToolCall, find_tool

START, END = "<|im_start|>", "<|im_end|>"
REVERSE_REQUESTS = "reverse_requests"  # in a model's config.json: on how many it was trained in reverse order

_LINE_NUMBER = re.compile(r"^ *(\d+)[\t→]", re.MULTILINE)

Tokenizer = Any  # transformers' or toolcall/tokenizer.py's


def system_prompt(tools: Sequence[Tool]) -> str:
    """Only the tools: how to reply is learnt, and further instructions made training slower and no better."""
    return "Tools:\n" + "\n".join(f"- {signature(tool)}: {tool.description}" for tool in tools)


def signature(tool: Tool) -> str:
    """`Read(file_path, offset?: integer)`: ? marks an optional argument; texts have no type, to save tokens."""
    required = tool.parameters.get("required", [])
    parts = [
        f"{name}{'' if name in required else '?'}{_kind(schema)}"
        for name, schema in tool.parameters.get("properties", {}).items()
    ]
    return f"{tool.name}({', '.join(parts)})"


def _kind(schema: Any) -> str:
    if not isinstance(schema, dict):  # true: anything
        return ": any"
    if "enum" in schema:
        return ": " + "|".join(str(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "string":
        return ": regex" if copy_of(schema) == "regex" else ""
    form = {"milliseconds": "|time", "last": "|to"}.get(copy_of(schema).partition(":")[0], "")
    return f": {'|'.join(kind) if isinstance(kind, list) else kind}{form}"


def prefix_tokens(tokenizer: Tokenizer, tools: Sequence[Tool]) -> list[int]:
    return [
        *_markup(tokenizer, f"{START}system\n"),
        *_text(tokenizer, system_prompt(tools)),
        *_markup(tokenizer, f"{END}\n"),
    ]


def request_tokens(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """What follows the prefix, up to where the reply begins; earlier calls are in the model's form (compact.py)."""
    return [token for part, _ in request_parts(tokenizer, messages, tools) for token in part]


def request_parts(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool]
) -> Iterator[tuple[list[int], str]]:
    """The same in pieces, each with what it teaches: `call` or `text` (of the assistant, with its end), or nothing."""
    for at, message in enumerate(messages):
        call = parse_call(message["content"]) if message["role"] == "assistant" else None
        text = compact.write(call, tools, request_text(messages[:at])) if call else message["content"]
        said = _learnable(call, text, tools) if message["role"] == "assistant" else ""
        yield _markup(tokenizer, f"{START}{message['role']}\n"), ""
        yield [*_text(tokenizer, text), *_markup(tokenizer, END)], said
        yield _markup(tokenizer, "\n"), ""
    yield _markup(tokenizer, f"{START}assistant\n"), ""


def _learnable(call: ToolCall | None, text: str, tools: Sequence[Tool]) -> str:
    """Nothing if the agent erred or its log is broken: unknown tool, arguments that do not fit, half a call."""
    if call is None:
        return "text" if text.strip() and OPENING not in text else ""
    tool = find_tool(tools, call.name)
    return "call" if tool and not tool.fault(call.arguments) and compact.read(text, tools) == call else ""


def request_text(messages: Sequence[Message]) -> str:
    """The text that arguments are copied from. Line numbers in a tool's result are moved behind all its lines."""
    parts = []
    for message in messages:
        numbers = _LINE_NUMBER.findall(message["content"]) if message["role"] == "tool" else []
        lines = _LINE_NUMBER.sub("", message["content"]) if numbers else message["content"]
        parts += [lines, " ".join(numbers)] if numbers else [lines]
    return "\n".join(parts)


def reply_tokens(tokenizer: Tokenizer, request: Request) -> list[int]:
    """The right reply and the end token.

    Raises ValueError if a request has neither call nor text, or its call would be read as a different one.
    """
    if request.expected:
        text = compact.write(request.expected, request.tools, request_text(request.messages))
        if compact.read(text, request.tools) != request.expected:
            raise ValueError(f"request {request.id}: a value of its call looks like the next argument: {text!r}")
    elif request.reply:
        text = request.reply
    else:
        raise ValueError(f"request {request.id}: to train on it, it needs a reply or a call")
    return [*_text(tokenizer, text), *_markup(tokenizer, END)]


def reverse_tokens(tokenizer: Tokenizer, message: Message) -> tuple[list[int], list[int], list[int]]:
    """What comes before a call, between, and the request's tokens when the call stands before its request.

    How likely the request is after a call helps to choose among several calls: one that leaves out what was asked for
    makes the request less likely. Conversations to train on begin with the user, so the two orders cannot be confused.
    """
    opening, between = f"{START}assistant\n", f"\n{START}{message['role']}\n"
    request = [*_text(tokenizer, message["content"]), *_markup(tokenizer, END)]
    return _markup(tokenizer, opening), _markup(tokenizer, between), request


def form() -> str:
    """A hash of the form of conversations: a model can only be used with the form it was trained on."""
    kinds: dict[str, Any] = {
        "path": {"type": "string", "x-copy": "path"},
        "text": {"type": "string", "x-copy": "text"},
        "pattern": {"type": "string", "x-copy": "regex"},
        "mode": {"enum": ["a", "b"]},
        "offset": {"type": "integer"},
        "limit": {"type": "integer", "x-copy": "last:offset"},
        "timeout": {"type": "integer", "x-copy": "milliseconds"},
    }
    tools = (Tool("Look", "Looks.", {"type": "object", "properties": kinds, "required": ["path"]}),)
    earlier = '<tool_call>{"name": "Look", "arguments": {"path": "b.txt", "text": "hello"}}</tool_call>'
    messages = (
        {"role": "user", "content": "Greet b.txt"},
        {"role": "assistant", "content": earlier},
        {"role": "tool", "content": "7\tone\n8\ttwo"},
        {"role": "assistant", "content": "It says one, two."},
        {"role": "user", "content": "And f(x) in a.txt, lines 15 to 19, within 2 min"},
    )
    call = {"path": "a.txt", "text": "one\ntwo", "pattern": r"f\(x\)", "mode": "a", "offset": 15, "limit": 5}
    request = Request("", "Look", messages, tools, ToolCall("Look", {**call, "timeout": 120_000}))
    letters = _Letters()
    asked, reply = request_tokens(letters, messages, tools), reply_tokens(letters, request)
    parts = prefix_tokens(letters, tools), asked, reply, *reverse_tokens(letters, messages[-1])
    return hashlib.sha256("".join(chr(letter) for part in parts for letter in part).encode()).hexdigest()


class _Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) for letter in text]


def _markup(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _text(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
