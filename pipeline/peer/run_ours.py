"""Our own variants in the same harness, with all techniques or with none.

A call includes more than a peer's: tokenizing the request and parsing the reply are timed too.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.bench.load import serve
from pipeline.peer import harness
from pipeline.runtime.caller import ToolCaller
from pipeline.runtime.generation import PLAIN, Choice, Prompt, Techniques, Token, generate
from pipeline.serving.engine import Asked, Engine
from pipeline.toolcall.reply import parse_call


class Ours:
    prefix_cache = True

    def __init__(self, work: dict[str, Any]) -> None:
        self._work = work
        self._techniques = Techniques(**work["techniques"]) if work["techniques"] else PLAIN
        self._caller = self._load(together=1)
        self.grammar = self._techniques.grammar
        self.version = version("tool-caller-pipeline")
        self.build = f"onnxruntime {version('onnxruntime')}, {asdict(self._techniques)}"

    def _load(self, together: int) -> ToolCaller:
        folder, tools, threads = Path(self._work["model"]), self._work["tools"], self._work["threads"]
        return ToolCaller.load(folder, tools, "cpu", threads, self._techniques, together)

    def reply(self, asked: harness.Asked) -> harness.Reply:
        tools, most = self._caller.tools, asked["max_new_tokens"]
        start = time.perf_counter()
        if "messages" not in asked:  # a prompt of random tokens
            prompt = Prompt(asked["prompt"][:1], asked["prompt"][1:], self._caller.tokenizer.eos_token_id, "")
            stream: Iterator[Token] = islice(generate(self._caller.runtime, prompt, None, PLAIN), most)
        else:
            stream = self._caller.stream(self._caller.prompt(asked["messages"], tools, most, Choice.AUTO), tools, most)
        tokens: list[Token] = []
        first_token_s = 0.0
        for token in stream:
            first_token_s = first_token_s or time.perf_counter() - start
            tokens.append(token)
        parse_call(self._caller.decode(tokens, tools)[0])
        return harness.Reply([token.id for token in tokens], first_token_s, time.perf_counter() - start)

    def many(self, asked: list[harness.Asked], clients: int) -> float | None:
        """Through the server's engine, without HTTP; None if the runtime answers one at a time."""
        if not self._work["together"]:
            return None
        context_tokens = self._caller.runtime.context_tokens
        engine = Engine(lambda: self._load(self._work["together"]), clients, context_tokens, self._work["together"])
        engine.wait_until_loaded()

        async def answer(number: int) -> None:
            request = asked[number]
            messages, most = tuple(request["messages"]), request["max_new_tokens"]
            await engine.whole(Asked(messages, self._caller.tools, Choice.AUTO, most, stream=False))

        asyncio.run(answer(0))  # computes the prefix, which the peers have cached by now
        served = asyncio.run(serve(answer, clients, len(asked)))
        engine.stop()
        if served.errors:
            raise RuntimeError(f"{served.errors} of {len(asked)} calls failed")
        return served.wall_s


if __name__ == "__main__":
    harness.main(Ours)
