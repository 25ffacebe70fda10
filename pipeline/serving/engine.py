"""One thread that owns the model; requests wait for it in a queue of limited length."""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from pipeline.runtime.caller import ToolCaller
from pipeline.runtime.generation import Choice, Prompt, Token
from pipeline.toolcall.conversation import Message
from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool

CUT = "\n[cut]"
NICE = 5


class BusyError(Exception):
    """The queue is full."""


class DrainingError(Exception):
    """The server is about to stop and takes no new requests."""


@dataclass(frozen=True)
class Asked:
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]  # empty: those the model was trained with
    choice: Choice
    max_new_tokens: int
    stream: bool  # every piece of the reply, or the last only


@dataclass(frozen=True)
class Piece:
    """A reply as far as it has come."""

    text: str  # the last piece has a call as JSON, those before as the model writes it
    prompt_tokens: int  # the prefix apart
    prefix_tokens: int
    prefix_kept: bool  # its KV cache was there from an earlier request
    new_tokens: int = 0
    confidence: float = 1.0
    finished: bool = False  # it came to its own end
    last: bool = False

    @property
    def is_call(self) -> bool:
        return self.text.startswith(OPENING)


@dataclass(eq=False)
class _Job:
    asked: Asked
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece | Exception]" = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def put(self, piece: Piece | Exception) -> None:
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Engine:
    """Answers requests in the order they came, one at a time."""

    def __init__(self, load: Callable[[], ToolCaller], queue_length: int, tool_result_tokens: int) -> None:
        """`load` is called on the engine's own thread. Wait for `ready` before asking."""
        self._load, self._queue_length, self._tool_result_tokens = load, queue_length, tool_result_tokens
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._running = 0
        self._prefix: Sequence[int] = ()
        self._loaded = threading.Event()
        self._failure: Exception | None = None
        self.caller: ToolCaller | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self.caller is not None and not self._stopping

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    def wait_until_loaded(self) -> ToolCaller:
        """Raises what loading raised."""
        self._loaded.wait()
        if self.caller is None:
            raise self._failure or RuntimeError("the model was not loaded")
        return self.caller

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """The reply piece by piece; to close the iterator cancels the request.

        Raises BusyError where the queue is full, DrainingError where the server stops, ValueError where the
        request does not fit the model's context.
        """
        job = _Job(asked, asyncio.get_running_loop())
        self._submit(job)
        try:
            while True:
                piece = await job.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.last:
                    return
        finally:
            self._cancel(job)

    async def whole(self, asked: Asked) -> Piece:
        """The last piece. Raises as `answer` does."""
        async with aclosing(self.answer(asked)) as pieces:
            async for piece in pieces:
                if piece.last:
                    return piece
        raise RuntimeError("the engine ended a reply without a last piece")

    def stop(self) -> None:
        """Take no new requests; those accepted are still answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def require_place(self) -> None:
        """Raises BusyError where the queue is full: to know that before a request is read is soon for its client."""
        if len(self._waiting) >= self._queue_length:
            raise BusyError(f"{len(self._waiting)} requests are waiting, and no more may")

    def _submit(self, job: _Job) -> None:
        with self._changed:
            if self._stopping:
                raise DrainingError("the server is about to stop")
            self.require_place()
            self._waiting.append(job)
            self._changed.notify()

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._waiting:
                if self._stopping:
                    return None
                self._changed.wait()
            return self._waiting.popleft()

    def _work(self) -> None:
        # The model's threads, which begin with this one's priority, leave the processor to who reads and refuses.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            self.caller = self._load()
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits for the model
            self._failure = error
            return
        finally:
            self._loaded.set()
        while job := self._next():
            try:
                self._answer(self.caller, job)
            except (ValueError, RuntimeError, MemoryError) as error:  # this request's; the others go on
                job.put(error)

    def _answer(self, caller: ToolCaller, job: _Job) -> None:
        tools = job.asked.tools or caller.tools
        prompted = fit(caller, job.asked, tools, self._tool_result_tokens)
        kept = list(prompted.prefix) == list(self._prefix)
        self._prefix = prompted.prefix
        tokens: list[Token] = []

        def piece(last: bool) -> Piece:
            text, confidence = caller.decode(tokens, tools) if last else (caller.written(tokens), 1.0)
            finished = bool(tokens) and tokens[-1].id == prompted.end
            sizes = len(prompted.asked), len(prompted.prefix), kept, len(tokens)
            return Piece(text, *sizes, confidence, finished, last)

        sent_s = 0.0
        for token in caller.stream(prompted, tools, job.asked.max_new_tokens):
            if job.cancelled:
                return
            tokens.append(token)
            # What is forced comes at once: a message for each of its tokens would only cost time.
            if job.asked.stream and time.perf_counter() - sent_s > 0.002:
                job.put(piece(last=False))
                sent_s = time.perf_counter()
        job.put(piece(last=True))


def fit(caller: ToolCaller, asked: Asked, tools: tuple[Tool, ...], tool_result_tokens: int) -> Prompt:
    """The prompt of as much of the conversation as fits: long tool results are cut, then the oldest messages left out.

    Raises ValueError naming both lengths where the last message alone is too long.
    """
    messages = [_cut(caller, message, tool_result_tokens) for message in asked.messages]
    while True:
        try:
            return caller.prompt(messages, tools, asked.max_new_tokens, asked.choice)
        except ValueError:
            later = [at for at, message in enumerate(messages) if at and message["role"] == "user"]
            if not later:
                raise
            messages = messages[later[0] :]


def _cut(caller: ToolCaller, message: Message, tool_result_tokens: int) -> Message:
    if message["role"] != "tool":
        return message
    tokens = caller.tokenizer.encode(message["content"], add_special_tokens=False, split_special_tokens=True)
    if len(tokens) <= tool_result_tokens:
        return message
    return {**message, "content": caller.tokenizer.decode(tokens[:tool_result_tokens]) + CUT}
