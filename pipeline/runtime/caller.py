"""The Python API: from a model folder and a request to a reply with its call, confidence and time.

caller = ToolCaller.load("models/int8")
reply = caller.reply("Find TODO in src")
reply.call.name, reply.call.arguments, reply.confidence, reply.total_s
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.runtime.generation import (
    ALL,
    LONGEST_REVERSE,
    PREFIXES,
    Choice,
    Decoding,
    Prompt,
    Reverse,
    Runtime,
    Techniques,
    Token,
    generate,
)
from pipeline.runtime.manifest import check_manifest
from pipeline.runtime.recent import Recent
from pipeline.toolcall import compact, prompt
from pipeline.toolcall.conversation import Message
from pipeline.toolcall.draft import Drafter
from pipeline.toolcall.grammar import Grammar
from pipeline.toolcall.reply import write_call
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool, ToolCall, find_tool, parse_tools

SETTINGS = "toolcaller.json"  # in a model folder: the runtime to load it with
NO_DYNAMIC = "dynamic INT8 has no CUDA kernels (onnxruntime#7745, #10267)"


@dataclass(frozen=True)
class Reply:
    text: str  # a call in it is JSON
    written: str  # as the model wrote it (toolcall/compact.py)
    call: ToolCall | None
    confidence: float  # probability the model gave this whole reply, in (0, 1]
    first_token_s: float
    total_s: float
    prompt_tokens: int  # without the prefix, whose KV cache is kept
    new_tokens: int
    finished: bool  # False: cut off at max_new_tokens
    changed: bool  # by the grammar, to keep the call's form, or because another reply was likelier

    @property
    def milliseconds(self) -> float:
        return self.total_s * 1000


class TooLongError(ValueError):
    """The request does not fit the model's context."""


class ToolCaller:
    """Not thread-safe: the KV cache is that of one request."""

    def __init__(
        self, runtime: Runtime, tokenizer: Tokenizer, tools: tuple[Tool, ...], techniques: Techniques = ALL
    ) -> None:
        self.runtime, self.tokenizer, self.tools, self.techniques = runtime, tokenizer, tools, techniques
        lists = max(1, techniques.prefixes)
        self._prefixes, self._grammars = Recent[str, list[int]](lists), Recent[str, Grammar](lists)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        tools: Path | str | None = None,
        device: str = "cpu",
        threads: int = 2,
        techniques: Techniques = ALL,
        together: int = 1,
    ) -> "ToolCaller":
        """`tools`: a tools file; by default the one in `folder`, else data/tools.json. `together`: how many requests an
        Engine answers at a time, at most. A model that has not learnt the reverse order does not score calls in it,
        whatever `techniques` say.

        Raises FileNotFoundError if `folder` holds no model written by a stage of this project, ValueError if a
        released model was changed.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no model: no config.json")
        check_manifest(folder)
        own = folder / "tools.json"
        tools = tools or (own if own.exists() else Path("data/tools.json"))
        tokenizer = Tokenizer(folder)
        found = parse_tools(files.read_json(Path(tools)), str(tools))
        if not files.read_json(folder / "config.json").get(prompt.REVERSE_REQUESTS):
            techniques = replace(techniques, reverse_weight=0)
        if techniques.grammar:
            _ = tokenizer.vocabulary  # before the model, which reuses the memory that this frees
        runtime = load_runtime(folder, device, threads, techniques.prefixes, together, techniques.conversation_tokens)
        return cls(runtime, tokenizer, found, techniques)

    def reply(
        self,
        messages: str | Sequence[Message],
        tools: tuple[Tool, ...] | None = None,
        max_new_tokens: int = 160,
        choice: Choice = Choice.AUTO,
    ) -> Reply:
        """Raises TooLongError naming both lengths if the request does not fit the model's context."""
        start = time.perf_counter()
        prompted = self.prompt(messages, tools or self.tools, max_new_tokens, choice)
        tokens: list[Token] = []
        first_token_s = math.nan
        for token in self.stream(prompted, tools or self.tools, max_new_tokens):
            if not tokens:
                first_token_s = time.perf_counter() - start
            tokens.append(token)
        text, confidence = self.decode(tokens, tools or self.tools)
        total_s = time.perf_counter() - start
        return Reply(
            text,
            self.written(tokens),
            self.call(tokens, tools or self.tools, choice),
            confidence,
            first_token_s,
            total_s,
            len(prompted.asked),
            len(tokens),
            finished=tokens[-1].id == prompted.end,
            changed=any(token.changed for token in tokens),
        )

    def generate_response(self, request: str) -> Reply:
        """The reply to one request: `.call.name`, `.call.arguments`, `.confidence`, `.milliseconds`."""
        return self.reply(request)

    def prompt(
        self, messages: str | Sequence[Message], tools: tuple[Tool, ...], max_new_tokens: int, choice: Choice
    ) -> Prompt:
        """Raises TooLongError as `reply` does."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prefix, asked = self.encode(messages, tools, max_new_tokens)
        text, end = prompt.request_text(messages), self.tokenizer.eos_token_id
        drafter = Drafter(self.tokenizer, tools, text, end)
        single = len(messages) == 1 and len(asked) <= LONGEST_REVERSE  # only single requests are learnt so
        reverse = Reverse(*prompt.reverse_tokens(self.tokenizer, messages[0])) if single else None
        return Prompt(prefix, asked, end, text, choice, max_new_tokens, drafter, reverse)

    def stream(self, prompted: Prompt, tools: tuple[Tool, ...], max_new_tokens: int) -> Iterator[Token]:
        """The reply token by token; the end token comes last unless it is cut off."""
        return islice(generate(self.runtime, prompted, self._grammar(tools), self.techniques), max_new_tokens)

    def decoding(self, prompted: Prompt, tools: tuple[Tool, ...]) -> Decoding:
        """A decoding whose steps the caller runs."""
        return Decoding(prompted, self._grammar(tools), self.techniques)

    def encode(
        self, messages: Sequence[Message], tools: tuple[Tool, ...], max_new_tokens: int
    ) -> tuple[list[int], list[int]]:
        """Tokens of the prefix and of the request."""
        prefix = self._prefixes.get(_key(tools), lambda: prompt.prefix_tokens(self.tokenizer, tools))
        asked = prompt.request_tokens(self.tokenizer, messages, tools)
        if self.runtime.context_tokens < len(prefix) + len(asked) + max_new_tokens:
            raise TooLongError(
                f"a request of {len(prefix) + len(asked)} tokens and a reply of {max_new_tokens} do not fit "
                f"the context of {self.runtime.context_tokens} tokens"
            )
        return prefix, asked

    def fits(self, messages: Sequence[Message], tools: tuple[Tool, ...], max_new_tokens: int) -> bool:
        """Does the request with its reply fit the model's context?"""
        try:
            self.encode(messages, tools, max_new_tokens)
        except TooLongError:
            return False
        return True

    def _grammar(self, tools: tuple[Tool, ...]) -> Grammar | None:
        if not self.techniques.grammar or not tools:
            return None
        return self._grammars.get(_key(tools), lambda: Grammar(self.tokenizer.vocabulary, tools))

    def decode(self, tokens: Sequence[Token], tools: tuple[Tool, ...]) -> tuple[str, float]:
        """A reply's text, with a complete call as JSON, and its confidence."""
        text = self.written(tokens)
        call = compact.read(text, tools) if self._whole(tokens) else None
        return write_call(call) if call else text, math.exp(sum(token.log_probability for token in tokens))

    def call(self, tokens: Sequence[Token], tools: tuple[Tool, ...], choice: Choice) -> ToolCall | None:
        """The call of a complete reply if its tool is on offer and its arguments fit the schema; else it is text."""
        call = compact.read(self.written(tokens), tools) if choice != Choice.NONE else None
        tool = find_tool(tools, call.name) if call else None
        return call if self._whole(tokens) and call and tool and not tool.fault(call.arguments) else None

    def _whole(self, tokens: Sequence[Token]) -> bool:
        """Whether the reply was not cut off."""
        return bool(tokens) and tokens[-1].id == self.tokenizer.eos_token_id

    def written(self, tokens: Sequence[Token]) -> str:
        """The reply as the model wrote it."""
        ids = [token.id for token in tokens if token.id != self.tokenizer.eos_token_id]
        return str(self.tokenizer.decode(ids))


def _key(tools: tuple[Tool, ...]) -> str:
    return json.dumps([tool.to_json() for tool in tools])


def load_runtime(
    folder: Path,
    device: str,
    threads: int,
    prefixes: int = PREFIXES,
    together: int = 1,
    conversation_tokens: int = 0,
) -> Runtime:
    """`prefixes`: how many to keep. `together`: how many requests to answer at a time. `conversation_tokens`: tokens of
    earlier requests to keep, if the runtime can.

    Raises FileNotFoundError if `folder` holds no model, ValueError if the model cannot answer requests together or
    has no kernels on `device`.
    """
    settings = _settings(folder)
    kind = str(settings["runtime"])
    if device == "cuda":
        _require_cuda_kernels(folder, settings)
    if together > 1:
        return _load_together(folder, kind, device, threads, (prefixes, together, conversation_tokens))
    if kind == "PyTorch":
        from pipeline.runtime.pytorch import PytorchRuntime

        return PytorchRuntime(folder, device, threads, prefixes)
    if kind == "compiled":
        from pipeline.runtime.compiled import CompiledRuntime

        return CompiledRuntime(folder, device, threads, prefixes)
    if kind == "cuda":
        from pipeline.runtime.cuda import CudaRuntime

        return CudaRuntime(folder, device, threads, prefixes)
    from pipeline.runtime.ort import FusedRuntime, PortableRuntime

    if kind == "portable":
        return PortableRuntime(folder, device, threads, prefixes)
    return FusedRuntime(folder, threads, prefixes, conversation_tokens > 0)


def _load_together(folder: Path, kind: str, device: str, threads: int, counts: tuple[int, int, int]) -> Runtime:
    prefixes, rows, conversation_tokens = counts
    if kind == "cuda":
        from pipeline.runtime.cuda_rows import CudaRowsRuntime

        return CudaRowsRuntime(folder, device, threads, rows)
    if kind != "fused":
        raise ValueError(f"{folder}: only a fused model answers requests together, not one for {kind}")
    from pipeline.runtime.packed import PackedRuntime

    return PackedRuntime(folder, threads, prefixes, conversation_tokens)


def _settings(folder: Path) -> dict[str, Any]:
    if (folder / SETTINGS).exists():
        found: dict[str, Any] = files.read_json(folder / SETTINGS)
        return found
    if (folder / "model.safetensors").exists():
        return {"runtime": "PyTorch"}
    raise FileNotFoundError(f"{folder} holds neither {SETTINGS} nor model.safetensors: no model of ours")


def _require_cuda_kernels(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if one is missing: ONNX Runtime would silently run its operator on the CPU, with copies."""
    if settings.get("quantize", {}).get("dynamic"):
        raise ValueError(f"{folder}: {NO_DYNAMIC}; quantize.device=cuda makes it weight-only")
    if settings["runtime"] == "fused":
        raise ValueError(
            f"{folder}: CUDA's GroupQueryAttention takes float16 only, and this graph is for the CPU; "
            "export.device=cuda makes one for CUDA"
        )
