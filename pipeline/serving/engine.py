"""One thread that owns the model; requests wait for it in a queue of limited length.

If the runtime can decode requests together, they join and leave between two steps of the model.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, chain, takewhile

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.caller import ToolCaller, TooLongError
from pipeline.runtime.generation import Choice, Decoding, Prompt, Row, Runtime, TogetherRuntime, Token
from pipeline.toolcall.conversation import Message
from pipeline.toolcall.prompt import request_tokens, system_prompt
from pipeline.toolcall.reply import OPENING, write_call
from pipeline.toolcall.tool import Tool, ToolCall

CUT = "\n[cut]"
NICE = 5
# A token has fewer, except for the longest runs of blanks and dashes. Encoding a megabyte holds Python's GIL for a
# second, so text with too many characters to fit is not encoded.
CHARACTERS = 64


class BusyError(Exception):
    """The queue is full."""


class DrainingError(Exception):
    """The server is about to stop and takes no new requests."""


@dataclass(frozen=True)
class Said:
    """A message of a client's conversation."""

    role: str
    text: str
    calls: tuple[tuple[str, ToolCall], ...] = ()  # (id, call)
    answers: str | None = None  # for a tool result: the id of its call


@dataclass(frozen=True)
class Asked:
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]  # empty: those the model was trained with
    choice: Choice
    max_new_tokens: int
    stream: bool  # True: every piece of the reply; False: only the last


@dataclass(frozen=True)
class Piece:
    """A reply so far."""

    text: str  # a call in it is JSON in the last piece, before that as the model writes it
    prompt_tokens: int  # without the prefix
    prefix_tokens: int
    prefix_kept: bool  # its KV cache was kept from an earlier request
    new_tokens: int = 0
    confidence: float = 1.0
    finished: bool = False  # it ended by itself: it was not cut
    last: bool = False
    changed: int = 0  # tokens that the model would not have chosen
    call: ToolCall | None = None  # only in the last piece
    kept_tokens: int = 0  # of prompt_tokens: their KV cache was kept from earlier in this conversation

    @property
    def cached_tokens(self) -> int:
        """Of prefix and prompt together."""
        return self.kept_tokens + (self.prefix_tokens if self.prefix_kept else 0)

    @property
    def may_be_call(self) -> bool:
        return self.text.startswith(OPENING) or OPENING.startswith(self.text)

    @property
    def is_cut_call(self) -> bool:
        """A call cut at its length limit is of no use."""
        return self.last and not self.finished and self.may_be_call


@dataclass(eq=False)
class _Job:
    asked: Asked
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece | Exception]" = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    prompted: Prompt | None = None  # set once tokenized

    def put(self, piece: Piece | Exception) -> None:
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def fail(self, error: Exception) -> None:
        """ONNX Runtime's exceptions share no base class: callers get them as RuntimeError."""
        known = isinstance(error, (ValueError, RuntimeError, MemoryError))
        self.put(error if known else RuntimeError(f"{type(error).__name__}: {error}"))


@dataclass(eq=False)
class _Running:
    job: _Job
    tools: tuple[Tool, ...]
    prompted: Prompt
    prefix_kept: bool
    decoding: Decoding
    row: Row | None  # None: the runtime answers one request at a time
    tokens: list[Token]
    kept_tokens: int = 0
    failed: bool = False
    sent_s: float = 0.0

    @property
    def ended(self) -> bool:
        full = len(self.tokens) >= self.job.asked.max_new_tokens
        return self.decoding.step is None or full or self.failed or self.job.cancelled

    def read(self, logits: NDArray[np.float32]) -> None:
        if self.decoding.step:
            self.tokens += self.decoding.read(self.decoding.step, logits)

    def fail(self, error: Exception) -> None:
        self.failed = True
        self.job.fail(error)

    def tell(self, caller: ToolCaller, last: bool) -> None:
        """Send the reply so far to whoever waits for it."""
        if self.failed or self.job.cancelled:
            return
        # Forced tokens come all at once: a message for each would only cost time.
        if last or (self.job.asked.stream and time.perf_counter() - self.sent_s > 0.002):
            self.job.put(self._piece(caller, last))
            self.sent_s = time.perf_counter()

    def _piece(self, caller: ToolCaller, last: bool) -> Piece:
        tokens = self.tokens[: self.job.asked.max_new_tokens]
        text, confidence = caller.decode(tokens, self.tools) if last else (caller.written(tokens), 1.0)
        finished = bool(tokens) and tokens[-1].id == self.prompted.end
        sizes = len(self.prompted.asked), len(self.prompted.prefix), self.prefix_kept, len(tokens)
        changed = sum(token.changed for token in tokens)
        call = caller.call(tokens, self.tools, self.job.asked.choice) if last else None
        return Piece(text, *sizes, confidence, finished, last, changed, call, self.kept_tokens)


class Engine:
    """Begins to answer requests in order of arrival."""

    def __init__(
        self, load: Callable[[], ToolCaller], queue_length: int, tool_result_tokens: int, together: int = 1
    ) -> None:
        """`load` is called on the engine's own thread. Wait for `ready` before asking.

        `together`: at most this many requests are decoded together; more than 1 needs a TogetherRuntime.
        """
        self._load, self._queue_length, self._tool_result_tokens = load, queue_length, tool_result_tokens
        self._together = together
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._loaded = threading.Event()
        self._failure: Exception | None = None
        self.on_step: Callable[[int], None] = lambda _: None
        self.caller: ToolCaller | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Also True once told to stop."""
        return self._stopping or self._thread.is_alive()

    @property
    def ready(self) -> bool:
        return self.caller is not None and not self._stopping and self._thread.is_alive()

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    def wait_until_loaded(self) -> ToolCaller:
        """Raises the exception that loading raised."""
        self._loaded.wait()
        if self.caller is None:
            raise self._failure or RuntimeError("the model was not loaded")
        return self.caller

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """The reply piece by piece; closing the iterator cancels the request.

        Raises BusyError if the queue is full, DrainingError if the server is stopping, ValueError if the
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

    def fit(self, caller: ToolCaller, asked: Asked) -> Prompt:
        """Raises TooLongError as the function `fit` does, ValueError for a call that is nested too deep."""
        try:
            return fit(caller, asked, asked.tools or caller.tools, self._tool_result_tokens)
        except RecursionError as error:
            raise ValueError(f"messages: nested too deep: {error}") from error

    def require_place(self) -> None:
        """Raises BusyError if the queue is full. Checked before a request is parsed too, to refuse it early."""
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

    def _next(self, wait: bool) -> _Job | None:
        """The next job; None if none is waiting and the server stops or `wait` is False."""
        with self._changed:
            while wait and not self._waiting and not self._stopping:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _work(self) -> None:
        try:
            # The model's threads inherit this priority, so that reading and refusing requests comes first.
            nice = max(NICE, os.getpriority(os.PRIO_PROCESS, 0))  # the process may have been started with a lower one
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            self.caller = self._load()
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits for the model
            self._failure = error
            return
        finally:
            self._loaded.set()
        running: list[_Running] = []
        while self._admit(self.caller, running):
            if stepping := [one for one in running if not one.ended]:
                self.on_step(len(stepping))
                _advance(self.caller.runtime, stepping)
            ended = [one for one in running if one.ended]
            for one in running:
                try:
                    one.tell(self.caller, last=one in ended)
                except Exception as error:  # noqa: BLE001 - this request's; the others go on
                    one.fail(error)
            for one in ended:
                if one.row and isinstance(self.caller.runtime, TogetherRuntime):
                    self.caller.runtime.leave(one.row)
            running = [one for one in running if one not in ended]

    def _admit(self, caller: ToolCaller, running: list[_Running]) -> bool:
        """Let waiting jobs join, in order, as long as they can. False: all are answered and the server stops."""
        while len(running) < self._together:
            job = self._next(wait=not running)
            if job is None:
                break
            if job.cancelled:
                continue
            try:
                if not self._joins(caller, job, running):
                    with self._changed:
                        self._waiting.appendleft(job)
                    break
            except Exception as error:  # noqa: BLE001 - this request's; the others go on
                job.fail(error)
        return bool(running)

    def _joins(self, caller: ToolCaller, job: _Job, running: list[_Running]) -> bool:
        """False: it must wait until running requests end, as its tools differ or its tokens do not fit with theirs."""
        tools = job.asked.tools or caller.tools
        prompted = job.prompted = job.prompted or self.fit(caller, job.asked)
        if running and prompted.prefix != running[0].prompted.prefix:
            return False
        runtime = caller.runtime
        own = [(one.prompted, one.job.asked) for one in running] + [(prompted, job.asked)]
        tokens = [len(prompt.asked) + asked.max_new_tokens for prompt, asked in own]
        if isinstance(runtime, TogetherRuntime) and not runtime.has_room(len(prompted.prefix), tokens):
            return False
        kept = runtime.keeps(prompted.prefix)
        decoding = caller.decoding(prompted, tools)
        if not running:
            runtime.begin(prompted.prefix)
        row = runtime.join(prompted.asked) if isinstance(runtime, TogetherRuntime) else None
        opening, known = list(decoding.opening), len(row.tokens) if row else 0
        running.append(_Running(job, tools, prompted, kept, decoding, row, opening, known))
        return True


def in_turn(conversation: Iterable[Said]) -> tuple[Message, ...]:
    """One message per call, followed by the result with its id: the model makes one call at a time.

    A message's text stands before its first call. Results of unknown calls keep their order, after all earlier calls.
    Raises ValueError unless the conversation ends with the user or a result.
    """
    turns: list[list[Message]] = []
    calls: dict[str | None, list[Message]] = {}  # those without a result so far
    for said in conversation:
        if said.answers in calls:
            calls.pop(said.answers).append({"role": said.role, "content": said.text})
            continue
        text = said.text
        for call_id, call in said.calls:
            content = "\n".join(part for part in (text, write_call(call)) if part)
            calls[call_id] = [{"role": said.role, "content": content}]
            turns.append(calls[call_id])
            text = ""
        if text or said.role == "tool":
            turns.append([{"role": said.role, "content": text}])
    messages = tuple(chain.from_iterable(turns))
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("messages: must end with a text from the user or the results of all calls")
    return messages


def _advance(runtime: Runtime, running: list[_Running]) -> None:
    """One step of each request. If it fails, each is stepped alone, to find the request at fault."""
    try:
        found = _logits(runtime, running)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's share no base class; the server goes on
        if len(running) == 1:
            running[0].fail(error)
        else:
            for one in running:
                _advance(runtime, [one])
        return
    for one, logits in zip(running, found, strict=True):
        try:
            one.read(logits)
        except Exception as error:  # noqa: BLE001 - of one request; the others go on
            one.fail(error)


def _logits(runtime: Runtime, running: list[_Running]) -> list[NDArray[np.float32]]:
    steps = [(one.row, one.decoding.step) for one in running]
    if isinstance(runtime, TogetherRuntime):
        return runtime.step_together([(row, step) for row, step in steps if row and step])
    return [runtime.step(step.tokens, step.at, step.keep) for _, step in steps if step]


def fit(caller: ToolCaller, asked: Asked, tools: tuple[Tool, ...], tool_result_tokens: int) -> Prompt:
    """The prompt, with as much of the conversation as fits: long tool results are cut, then old messages left out.

    Raises TooLongError naming both lengths if what must be kept (see `longer`) is too long.
    """
    context = caller.runtime.context_tokens
    if (characters := len(system_prompt(tools))) > CHARACTERS * context:
        raise TooLongError(f"tools of {characters} characters do not fit the context of {context} tokens")
    prefix, opening = caller.encode([], tools, asked.max_new_tokens)
    room = context - asked.max_new_tokens - len(prefix) - len(opening)
    message = cache(lambda at: _cut(caller, asked.messages[at], tool_result_tokens))

    @cache
    def tokens(at: int) -> int:
        part = {**message(at), "content": message(at)["content"][: CHARACTERS * context]}
        return len(request_tokens(caller.tokenizer, [part], tools)) - len(opening)

    def fits(kept: Sequence[int]) -> bool:
        return all(total <= room for total in accumulate(map(tokens, kept)))

    def prompt(kept: Sequence[int]) -> Prompt:
        return caller.prompt([message(at) for at in kept], tools, asked.max_new_tokens, asked.choice)

    ways = longer(asked.messages)
    found = [next(ways)]
    characters = sum(len(message(at)["content"]) for at in found[0])
    if characters > CHARACTERS * context:
        raise TooLongError(
            f"a request of {characters} characters and a reply of {asked.max_new_tokens} tokens do not fit "
            f"the context of {context} tokens"
        )
    found += takewhile(fits, ways)
    while len(found) > 1:
        with suppress(TooLongError):  # fits() can be wrong: a call's tokens depend on the messages that it copies from
            return prompt(found.pop())
    return prompt(found[0])


def longer(messages: Sequence[Message]) -> Iterator[Sequence[int]]:
    """Indices of the messages to keep, more each time: the user's last message with the last call and its result, then
    more calls of this turn, then earlier turns.
    """
    turns = [at for at, message in enumerate(messages) if at and message["role"] == "user"]
    last, end = turns[-1] if turns else 0, len(messages)
    calls = [at for at in range(last, end) if messages[at]["role"] == "assistant"]
    yield from ([last, *range(at, end)] for at in reversed(calls[1:]))
    yield from (range(at, end) for at in [*reversed(turns), 0])


def _cut(caller: ToolCaller, message: Message, tool_result_tokens: int) -> Message:
    if message["role"] != "tool":
        return message
    begin = message["content"][: CHARACTERS * tool_result_tokens]
    tokens = caller.tokenizer.encode(begin, add_special_tokens=False, split_special_tokens=True)
    if begin == message["content"] and len(tokens) <= tool_result_tokens:
        return message
    return {**message, "content": caller.tokenizer.decode(tokens[:tool_result_tokens]) + CUT}
