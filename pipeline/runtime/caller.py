"""The API a user calls: a model folder, a request, a reply with its call, confidence and time.

caller = ToolCaller.load("models/int8")
reply = caller.reply("Find TODO in src")
reply.call.name, reply.call.arguments, reply.confidence, reply.total_s
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline import files
from pipeline.runtime.generation import Runtime, Token
from pipeline.toolcall import prompt
from pipeline.toolcall.conversation import Message
from pipeline.toolcall.reply import parse_call
from pipeline.toolcall.tool import Tool, ToolCall, parse_tools

SETTINGS = "toolcaller.json"  # in a model folder: the runtime it is for


@dataclass(frozen=True)
class Reply:
    text: str
    call: ToolCall | None
    confidence: float  # probability the model gave this whole reply, in (0, 1]
    first_token_s: float
    total_s: float
    prompt_tokens: int  # the prefix, whose cache is kept, apart
    new_tokens: int
    finished: bool  # False: cut off at max_new_tokens


class ToolCaller:
    """Not for several threads at once: its KV cache is one request's."""

    def __init__(self, runtime: Runtime, tokenizer: Any, tools: tuple[Tool, ...]) -> None:
        self.runtime, self.tokenizer, self.tools = runtime, tokenizer, tools
        self._prefixes: dict[tuple[str, ...], list[int]] = {}

    @classmethod
    def load(
        cls,
        folder: Path | str,
        tools: Path | str = "data/tools.json",
        device: str = "cpu",
        threads: int = 2,
    ) -> "ToolCaller":
        """Raises FileNotFoundError where `folder` holds no model that a stage of this project wrote."""
        folder = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found = parse_tools(files.read_json(Path(tools)), str(tools))
        return cls(load_runtime(folder, device, threads), tokenizer, found)

    def reply(
        self,
        messages: str | Sequence[Message],
        tools: tuple[Tool, ...] | None = None,
        max_new_tokens: int = 160,
    ) -> Reply:
        """Raises ValueError naming both lengths where the request does not fit the model's context."""
        start = time.perf_counter()
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prefix = self._prefix(tools or self.tools)
        asked = prompt.request_tokens(self.tokenizer, messages)
        room = self.runtime.context_tokens - len(prefix) - len(asked)
        if room < max_new_tokens:
            raise ValueError(
                f"a request of {len(prefix) + len(asked)} tokens and a reply of {max_new_tokens} do not fit "
                f"the context of {self.runtime.context_tokens} tokens"
            )
        tokens: list[Token] = []
        first_token_s = math.nan
        for token in self.runtime.generate(prefix, asked):
            if not tokens:
                first_token_s = time.perf_counter() - start
            tokens.append(token)
            if token.id == self.tokenizer.eos_token_id or len(tokens) == max_new_tokens:
                break
        finished = tokens[-1].id == self.tokenizer.eos_token_id
        ids = [token.id for token in tokens[: -1 if finished else None]]
        text = str(self.tokenizer.decode(ids))
        return Reply(
            text,
            parse_call(text),
            math.exp(sum(token.log_probability for token in tokens)),
            first_token_s,
            time.perf_counter() - start,
            len(asked),
            len(tokens),
            finished,
        )

    def _prefix(self, tools: tuple[Tool, ...]) -> list[int]:
        key = tuple(prompt.signature(tool) + tool.description for tool in tools)
        if key not in self._prefixes:
            self._prefixes[key] = prompt.prefix_tokens(self.tokenizer, tools)
        return self._prefixes[key]


def load_runtime(folder: Path, device: str, threads: int) -> Runtime:
    if (folder / SETTINGS).exists():
        from pipeline.runtime.ort import FusedRuntime, PortableRuntime

        kind = files.read_json(folder / SETTINGS)["runtime"]
        if kind == "portable":
            return PortableRuntime(folder, device, threads)
        return FusedRuntime(folder, device, threads)
    if (folder / "model.safetensors").exists():
        from pipeline.runtime.pytorch import PytorchRuntime

        return PytorchRuntime(folder, device, threads)
    raise FileNotFoundError(f"{folder} holds neither {SETTINGS} nor model.safetensors: no model of ours")
