"""A server over a runtime that says what a script tells it to: what is tested is the serving, not the model."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray

from pipeline import files
from pipeline.runtime.caller import ToolCaller
from pipeline.serving.app import Limits, Server
from pipeline.serving.engine import Engine
from pipeline.toolcall import compact
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import ToolCall, parse_tools

ROOT = Path(__file__).parents[2]
LIMITS = Limits(body_bytes=200_000, read_timeout_s=1.0, request_timeout_s=20.0, max_new_tokens=300)
Script = Callable[[str], str]


def script(asked: str) -> str:
    """The reply to a conversation, given as the text of its tokens."""
    *_, last = asked.removesuffix("<|im_start|>assistant\n").split("<|im_start|>")
    role, _, text = last.partition("\n")
    text = text.removesuffix("<|im_end|>\n")
    if role == "tool":
        return f"It said: {text}"
    match text.split(" ", 1):
        case ["read", path]:
            return compact.write(ToolCall("Read", {"file_path": path}), ())
        case ["run", command]:
            return compact.write(ToolCall("Bash", {"command": command}), ())
        case ["echo", word]:
            return compact.write(ToolCall("mcp__box__echo", {"text": word}), ())
    return f"You wrote: {text}"


class ScriptedRuntime:
    """Takes `step_s` for each step, however many tokens it has."""

    def __init__(self, tokenizer: Any, say: Script = script, step_s: float = 0.0) -> None:
        self._tokenizer, self._say, self._step_s = tokenizer, say, step_s
        self.context_tokens = 8192
        self.steps = 0
        self._reply: list[int] | None = None
        self._reply_at = 0

    def begin(self, prefix: Sequence[int]) -> None:
        del prefix
        self._reply = None

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        self.steps += 1
        time.sleep(self._step_s)
        if self._reply is None:
            asked = str(self._tokenizer.decode(tokens))
            asked = asked[: asked.rindex("assistant\n") + len("assistant\n")]
            reply = self._tokenizer.encode(self._say(asked), add_special_tokens=False, split_special_tokens=True)
            self._reply = [*reply, self._tokenizer.eos_token_id]
            self._reply_at = at + len(self._tokenizer.encode(asked, add_special_tokens=False))
        logits = np.zeros((keep, len(self._tokenizer)), np.float32)
        first = at + len(tokens) - keep + 1 - self._reply_at
        for row in range(keep):
            logits[row, self._reply[min(max(first + row, 0), len(self._reply) - 1)]] = 100
        return logits


@dataclass
class Served:
    url: str
    server: Server
    engine: Engine
    runtime: ScriptedRuntime
    uvicorn: uvicorn.Server

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tiny_base: Path) -> Iterator[Serve]:
    tokenizer = Tokenizer(tiny_base)
    tools = parse_tools(files.read_json(ROOT / "data/tools.json"), "data/tools.json")
    stops: list[tuple[uvicorn.Server, threading.Thread, Engine]] = []

    def start(
        step_s: float = 0.0, queue_length: int = 8, api_key: str | None = None, say: Script = script, **limits: Any
    ) -> Served:
        runtime = ScriptedRuntime(tokenizer, say, step_s)
        engine = Engine(lambda: ToolCaller(runtime, tokenizer, tools), queue_length, tool_result_tokens=300)
        engine.wait_until_loaded()
        server = Server(engine, "tool-caller", replace(LIMITS, **limits), api_key)
        running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_config=None))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.005)
        stops.append((running, thread, engine))
        port = running.servers[0].sockets[0].getsockname()[1]
        return Served(f"http://127.0.0.1:{port}", server, engine, runtime, running)

    yield start
    for running, thread, engine in stops:
        running.should_exit = True
        engine.stop()
        thread.join(5)
        engine.join(5)
