"""The decode loop, over every way to run the model: tokens in, tokens out, greedily.

A tool call is short and mostly known beforehand. Three techniques use that; they change when tokens
come, not which (the grammar apart, where the model would break a call's form):
- the grammar holds a call to the tools' schemas;
- tokens it forces are appended to the next step instead of being asked for one by one;
- drafts copied from the request are checked in one step; so is the opening of a call, together with the prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.toolcall.grammar import Grammar, Guide

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Token:
    id: int
    log_probability: float  # natural logarithm, under the model as it is (temperature 1); 0 where forced
    changed: bool = False  # the grammar ruled out what the model would have chosen


@dataclass
class Techniques:
    """Section `techniques` of params.yaml; not frozen because OmegaConf fills it."""

    prefixes: int  # tool lists whose KV cache is kept; 0: it is computed for each request
    grammar: bool
    forced: bool  # append what the grammar forces in one step
    draft_tokens: int  # at most this many copied from the request per step

    def __post_init__(self) -> None:
        for name in ("prefixes", "draft_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"techniques.{name} must be 0 or more, got {getattr(self, name)}")
        if not self.grammar and (self.forced or self.draft_tokens):
            raise ValueError("techniques.forced and techniques.draft_tokens need techniques.grammar")


PREFIXES = 8
PLAIN = Techniques(PREFIXES, grammar=False, forced=False, draft_tokens=0)
ALL = Techniques(PREFIXES, grammar=True, forced=True, draft_tokens=4)


class Runtime(Protocol):
    context_tokens: int  # the longest that prefix, prompt and reply may be together

    def keeps(self, prefix: Sequence[int]) -> bool:
        """Is its KV cache there from an earlier request?"""

    def begin(self, prefix: Sequence[int]) -> None:
        """Make the KV cache hold `prefix`; those of the last few are kept."""

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        """Logits (keep, vocabulary) after the last `keep` of `tokens`, which take the positions from `at` on.

        What the KV cache held from `at` on is dropped.
        """


@runtime_checkable
class RowsRuntime(Protocol):
    """Several requests behind one prefix, each a row."""

    def begin_rows(self, prefix: Sequence[int], rows: int) -> None:
        """Make the KV cache hold `prefix` for each row."""

    def step_rows(self, tokens: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        """Logits (rows, vocabulary) after the last of `tokens`.

        tokens, positions (rows, new); mask (rows, cached + new) has 0 where a row is padded.
        """

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop the others."""


class Choice(StrEnum):
    """Whether the reply may be a call."""

    AUTO = "auto"
    REQUIRED = "required"
    NONE = "none"


@dataclass
class Prompt:
    prefix: Sequence[int]
    asked: Sequence[int]
    end: int  # the token that ends a reply
    text: str  # the request: what copied arguments are spans of
    choice: Choice = Choice.AUTO


def generate(runtime: Runtime, prompt: Prompt, grammar: Grammar | None, use: Techniques) -> Iterator[Token]:
    """The greedy reply up to its end token; without one it goes on until the caller stops.

    Raises ValueError where a call is required and there is no grammar.
    """
    reply = _Reply(prompt, grammar if use.grammar else None)
    opening = reply.required()
    runtime.begin(prompt.prefix)
    yield from (Token(found, 0.0) for found in opening)
    if reply.grammar_finished:  # the only tool, and it takes no arguments
        yield Token(prompt.end, 0.0)
        return
    feed, draft, at = [*prompt.asked, *opening], reply.opening_draft(use), len(prompt.prefix)
    while True:
        logits = runtime.step([*feed, *draft], at, 1 + len(draft))
        at += len(feed)
        for row, guess in zip(logits, [*draft, None], strict=True):
            token = reply.choose(row)
            yield token
            if reply.finished:
                return
            if token.id != guess or reply.grammar_finished:
                break
            at += 1
        forced = reply.forced() if use.forced else []
        yield from (Token(found, 0.0) for found in forced)
        if reply.grammar_finished:
            yield Token(prompt.end, 0.0)
            return
        feed = [token.id, *forced]
        draft = reply.draft(use.draft_tokens)


def generate_together(
    runtime: RowsRuntime, prefix: Sequence[int], prompts: Sequence[Sequence[int]], end: int, max_new_tokens: int
) -> list[list[Token]]:
    """The greedy replies to `prompts`, each up to its `end` token, without any technique; padded on the left."""
    longest = max(map(len, prompts))
    tokens = np.array([[end] * (longest - len(asked)) + list(asked) for asked in prompts], np.int64)
    pads = np.array([longest - len(asked) for asked in prompts])
    mask = np.ones((len(prompts), len(prefix) + longest), np.int64)
    mask[:, len(prefix) :] = np.arange(longest)[None] >= pads[:, None]
    positions = (mask.cumsum(-1) - 1)[:, len(prefix) :]
    replies: list[list[Token]] = [[] for _ in prompts]
    unfinished = replies
    runtime.begin_rows(prefix, len(prompts))
    for _ in range(max_new_tokens):
        for reply, logits in zip(unfinished, runtime.step_rows(tokens, mask, positions), strict=True):
            reply.append(greedy(logits))
        left = [row for row, reply in enumerate(unfinished) if reply[-1].id != end]
        if not left:
            break
        if len(left) < len(unfinished):
            runtime.keep_rows(left)
            unfinished, mask, positions = [unfinished[row] for row in left], mask[left], positions[left]
        tokens = np.array([[reply[-1].id] for reply in unfinished], np.int64)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        positions = positions[:, -1:] + 1
    return replies


class _Reply:
    """What has been said so far, and who holds it."""

    def __init__(self, prompt: Prompt, grammar: Grammar | None) -> None:
        self._prompt, self._grammar = prompt, grammar
        self._guide: Guide | None = None
        self.tokens: list[int] = []

    @property
    def finished(self) -> bool:
        return self.tokens[-1] == self._prompt.end

    @property
    def grammar_finished(self) -> bool:
        return self._guide is not None and self._guide.finished

    def required(self) -> list[int]:
        """What the reply begins with, whatever the model thinks."""
        if self._prompt.choice != Choice.REQUIRED:
            return []
        if self._grammar is None:
            raise ValueError("a call is required, but without tools or their grammar none can be")
        self._take(self._grammar.opening)
        return self._grammar.opening

    def opening_draft(self, use: Techniques) -> list[int]:
        if self._grammar is None or not use.forced or self._prompt.choice != Choice.AUTO:
            return []
        return self._grammar.opening

    def choose(self, logits: NDArray[np.float32]) -> Token:
        if self._prompt.choice == Choice.NONE and self._grammar and not self.tokens:
            logits = logits.copy()
            logits[self._grammar.opening[0]] = -np.inf
        if self._guide:
            best = self._guide.best(logits)
            token = Token(best, _log_probability(logits, best), self._guide.changed)
        else:
            token = greedy(logits)
        self._take([token.id])
        return token

    def forced(self) -> list[int]:
        found = self._guide.forced() if self._guide else []
        if found:
            self._take(found)
        return found

    def draft(self, n: int) -> list[int]:
        """What follows, in the request, the longest match of the reply's last tokens there."""
        asked = list(self._prompt.asked)
        for length in (3, 2, 1) if n and self._guide else ():
            tail = self.tokens[-length:]
            for start in range(len(asked) - length, -1, -1):
                if asked[start : start + length] == tail:
                    return asked[start + length : start + length + n]
        return []

    def _take(self, tokens: list[int]) -> None:
        self.tokens += tokens
        if self._guide:
            self._guide.accept(tokens)
        elif self._grammar and self.tokens == self._grammar.opening:
            self._guide = self._grammar.start(self._prompt.text)
            self._guide.accept(self.tokens)


def greedy(logits: NDArray[np.float32]) -> Token:
    """`logits`: (vocabulary,)."""
    best = int(logits.argmax())
    return Token(best, _log_probability(logits, best))


def _log_probability(logits: NDArray[np.float32], token: int) -> float:
    top = float(logits.max())
    total = float(np.log(np.exp(logits - top, dtype=np.float32).sum(dtype=np.float64)))
    return float(logits[token]) - top - total


class NullRuntime:
    """Says the same to every request: with it the benchmark measures itself."""

    context_tokens = 1_000_000

    def __init__(self, reply: Sequence[int], vocabulary: int) -> None:
        self._reply, self._vocabulary = reply, vocabulary
        self._prompt_end = -1

    def keeps(self, prefix: Sequence[int]) -> bool:
        del prefix
        return True

    def begin(self, prefix: Sequence[int]) -> None:
        del prefix
        self._prompt_end = -1

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        if self._prompt_end < 0:
            self._prompt_end = at + len(tokens) - keep + 1
        logits = np.zeros((keep, self._vocabulary), np.float32)
        first = at + len(tokens) - keep + 1 - self._prompt_end
        for row in range(keep):
            logits[row, self._reply[min(first + row, len(self._reply) - 1)]] = 1.0
        return logits
