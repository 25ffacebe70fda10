"""The decode loop, on top of any runtime: tokens in, tokens out.

A tool call is short and mostly predictable. Three techniques use that; they change when tokens come, but not which
ones (except that the grammar replaces tokens that would break a call's form):
- the grammar constrains a call to the tools' schemas;
- tokens it forces are appended to the next step instead of being computed one by one;
- drafts are checked in one step: likely copies (toolcall/draft.py), what follows the same text in the request, and a
  call's opening.

Two more make calls right more often: of several candidate calls the likeliest is chosen, not always the greedy one; and
where several are nearly as likely, it counts too how likely the request is after each of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.toolcall.draft import Drafter
from pipeline.toolcall.grammar import Grammar, Guide

Ids = NDArray[np.int64]
LONGEST_DRAFT = 32  # tokens: KV buffers are this much longer than the context


@dataclass(frozen=True)
class Token:
    id: int
    log_probability: float  # natural logarithm, from the unconstrained model at temperature 1; 0 if forced
    changed: bool = False  # not the greedy choice: the grammar ruled that out, or another reply was chosen


@dataclass
class Techniques:
    """Section `techniques` of params.yaml; not frozen because OmegaConf fills it."""

    prefixes: int  # how many tool lists' KV caches are kept; 0: computed for each request
    conversation_tokens: int  # of recent requests; their KV cache is kept for requests that continue them
    grammar: bool
    forced: bool  # append all tokens that the grammar forces in one step
    draft_tokens: int  # per step, copied from what follows the reply's last tokens in the request; doubled while right
    guess_tokens: int  # per step at most, where toolcall/draft.py guesses what a call copies
    alternatives: int  # at most this many calls are tried beside the greedy one, if the model is unsure
    reverse_weight: float  # of log P(request | call), added to log P(call | request) for calls nearly as likely; 0: off

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"techniques.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("draft_tokens", "guess_tokens"):
            if getattr(self, name) > LONGEST_DRAFT:
                raise ValueError(f"techniques.{name} must be at most {LONGEST_DRAFT}, got {getattr(self, name)}")
        if not self.grammar and (self.forced or self.draft_tokens or self.guess_tokens or self.alternatives):
            raise ValueError("techniques.forced, draft_tokens, guess_tokens and alternatives need techniques.grammar")
        if not self.reverse_weight <= 10:
            raise ValueError(f"techniques.reverse_weight must be from 0 to 10, got {self.reverse_weight}")
        if self.reverse_weight and not self.alternatives:
            raise ValueError("techniques.reverse_weight needs techniques.alternatives: it chooses among several calls")


PREFIXES = 8
PLAIN = Techniques(PREFIXES, 0, False, False, draft_tokens=0, guess_tokens=0, alternatives=0, reverse_weight=0)
ALL = Techniques(PREFIXES, 4096, True, True, draft_tokens=4, guess_tokens=16, alternatives=4, reverse_weight=0.07)
SURE = math.log(0.98)  # a token likelier than this has no second choice worth trying
NEAR = 0.5  # nats: calls that are less likely than the likeliest by more than this are not scored in reverse order
LONGEST_REVERSE = 256  # tokens of a request: longer ones would take longer to score than to answer


def ablations(use: Techniques) -> dict[str, Techniques]:
    """`use` as it is, without each of its techniques, and without any. Those that need the grammar go with it."""
    return {
        "all": use,
        "without prefix cache": replace(use, prefixes=0),
        "without forced tokens": replace(use, forced=False),
        "without drafts": replace(use, draft_tokens=0, guess_tokens=0),
        "without guesses": replace(use, guess_tokens=0),
        "without reverse order": replace(use, reverse_weight=0),
        "without alternatives": replace(use, alternatives=0, reverse_weight=0),
        "without grammar": replace(PLAIN, prefixes=use.prefixes, conversation_tokens=use.conversation_tokens),
        "none": replace(PLAIN, prefixes=0),
    }


class Runtime(Protocol):
    context_tokens: int  # limit for prefix, prompt and reply together

    def keeps(self, prefix: Sequence[int]) -> bool:
        """Whether the KV cache of `prefix` is kept from an earlier request."""

    def begin(self, prefix: Sequence[int]) -> None:
        """Make the KV cache hold `prefix`; the last few prefixes are kept."""

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        """Logits (keep, vocabulary) after the last `keep` of `tokens`, which take the positions from `at` on.

        What the KV cache held from `at` on is dropped.
        """


@runtime_checkable
class RowsRuntime(Protocol):
    """Several requests with one prefix, each a row of a batch."""

    def begin_rows(self, prefix: Sequence[int], rows: int) -> None:
        """Make the KV cache hold `prefix` for each row."""

    def step_rows(self, tokens: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        """Logits (rows, vocabulary) after the last of `tokens`.

        tokens, positions (rows, new); mask (rows, cached + new) has 0 where a row is padded.
        """

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop the others."""


@dataclass(eq=False)
class Row:
    """A request that is decoded together with others."""

    places: list[int] = field(default_factory=list)  # of its tokens in the KV cache, in the order of their positions
    tokens: list[int] = field(default_factory=list)  # its tokens in the KV cache
    asked: int = 0  # how many tokens come before its reply


@runtime_checkable
class TogetherRuntime(Protocol):
    """Several requests with one prefix, each at its own pace. `begin` ends them all."""

    def has_room(self, prefix: int, own: Sequence[int]) -> bool:
        """Whether a prefix of `prefix` tokens and requests of `own` tokens each, with their replies, fit together."""

    def join(self, asked: Sequence[int] = ()) -> Row:
        """Add a request. `asked`: its first tokens; an earlier request may have left the KV cache of some of them."""

    def leave(self, row: Row) -> None:
        """End the request; its place is free at once."""

    def step_together(self, steps: Sequence[tuple[Row, "Step"]]) -> list[NDArray[np.float32]]:
        """Logits (keep, vocabulary) of each request after its step. A call that failed can be repeated."""


class Choice(StrEnum):
    """Whether the reply may be a call."""

    AUTO = "auto"
    REQUIRED = "required"
    NONE = "none"


@dataclass(frozen=True)
class Reverse:
    """The parts of a request when the call stands before it (toolcall/prompt.py)."""

    opening: list[int]
    between: list[int]
    request: list[int]


@dataclass
class Prompt:
    prefix: Sequence[int]
    asked: Sequence[int]
    end: int  # the token that ends a reply
    text: str  # the request's text, which arguments are copied from
    choice: Choice = Choice.AUTO
    max_new_tokens: int = 1_000_000  # of a reply
    drafter: Drafter | None = None
    reverse: Reverse | None = None  # None: calls are not scored in reverse order


def generate(runtime: Runtime, prompt: Prompt, grammar: Grammar | None, use: Techniques) -> Iterator[Token]:
    """The reply up to its end token, or cut at the prompt's max_new_tokens.

    Raises ValueError if a call is required and there is no grammar.
    """
    decoding = Decoding(prompt, grammar, use)
    yield from decoding.opening
    if decoding.step:
        runtime.begin(prompt.prefix)
    while step := decoding.step:
        yield from decoding.read(step, runtime.step(step.tokens, step.at, step.keep))


@dataclass(frozen=True)
class Step:
    """The tokens that the model reads next."""

    feed: list[int]
    draft: list[int]  # a guess at how the reply goes on
    at: int  # position of the first token; the KV cache from there on is dropped

    @property
    def tokens(self) -> list[int]:
        return [*self.feed, *self.draft]

    @property
    def keep(self) -> int:
        """How many logits are needed: after the last token of `feed` and after each of `draft`."""
        return 1 + len(self.draft)


class Decoding:
    """Decodes one reply, one step of the model at a time.

    With alternatives, the reply is the likeliest of several candidate calls, by best-first search: if the model was
    unsure of a token, a candidate with its second choice is finished greedily too, as long as it may become likelier
    than the best call so far. If text as a whole is likelier than that call, the reply is text. So a call is returned
    only when complete; text comes token by token.

    With a reverse weight, candidates up to NEAR less likely than the best are completed too, and the model then reads
    each of them followed by the request: P(call | request) P(request | call)^weight decides among them (a noisy
    channel; in translation: Yee, Dauphin and Auli 2019).
    """

    def __init__(self, prompt: Prompt, grammar: Grammar | None, use: Techniques) -> None:
        """Raises ValueError as `generate` does."""
        self._prompt, self._use = prompt, use
        self._grammar = grammar if use.grammar else None
        self._reply = _Reply(prompt, self._grammar, use)
        self._forks: list[list[Token]] = []  # beginnings of other candidates
        self._left = use.alternatives
        self._calls: list[list[Token]] = []  # candidates that are finished or cut off
        self._reverse = (
            _ReverseScores(prompt.reverse, len(prompt.prefix)) if prompt.reverse and use.reverse_weight else None
        )
        self._cached: list[int] = []  # tokens of the reply in the KV cache
        self._copied = 0  # how many drafts in a row were right as a whole: each doubles the next
        self._text: tuple[float, Token] | None = None  # log-probability of any text, and its likeliest first token
        required = self._reply.required()
        self.opening = [Token(found, 0.0) for found in required]  # whatever the model prefers
        self._said = list(self.opening)  # tokens of this candidate
        self._told = len(self._said)  # how many of them were returned
        first = [*prompt.asked, *required]
        self.step: Step | None = Step(first, self._room(self._reply.opening_draft()), len(prompt.prefix))  # None: ended
        if self._reply.grammar_finished:  # the only tool, and it takes no arguments
            self.opening.append(self._end())

    def read(self, step: Step, logits: NDArray[np.float32]) -> list[Token]:
        """The tokens to return after `step`, given its `logits` (keep, vocabulary); sets `self.step` to the next."""
        if self._reverse and self._reverse.calls:
            return self._score(self._reverse, step, logits)
        for row, guess in zip(logits, [*step.draft, None], strict=True):
            token = self._choose(row)
            self._said.append(token)
            if self._reply.finished or token.id != guess or self._reply.grammar_finished:
                break
        self._copied = self._copied + 1 if step.draft and guess is None else 0
        self._cached = [token.id for token in self._said[:-1]]
        self._go_on(len(self._cached))
        if not self._use.alternatives or not self._reply.is_call:
            return self._tell()
        return [] if self.step else self._likeliest()

    def _tell(self) -> list[Token]:
        told, self._told = self._told, len(self._said)
        return self._said[told:]

    def _choose(self, logits: NDArray[np.float32]) -> Token:
        first = not self._said and self._grammar is not None and self._left > 0
        token, second = self._reply.choose(logits)
        if first and self._grammar and token.id == self._grammar.opening[0]:
            others = logits.copy()
            others[token.id] = -np.inf
            text = int(others.argmax())
            self._text = (
                math.log1p(-min(math.exp(token.log_probability), 1 - 1e-9)),
                Token(text, _log_probability(logits, text), changed=True),
            )
        if second:
            self._forks.append([*self._said, second])
        return token

    def _go_on(self, fed: int) -> None:
        """Set the next step, given that the KV cache holds the first `fed` tokens of the reply."""
        self.step = None
        if self._reply.finished:
            return
        if self._use.forced:
            self._said += [Token(found, 0.0) for found in self._reply.forced()]
        if self._reply.grammar_finished:
            self._said.append(self._end())
        elif len(self._said) < self._prompt.max_new_tokens:
            at = len(self._prompt.prefix) + len(self._prompt.asked) + fed
            feed = [token.id for token in self._said[fed:]]
            self.step = Step(feed, self._room(self._reply.draft(min(self._copied, 3))), at)

    def _room(self, draft: list[int]) -> list[int]:
        """`draft`, cut to the room left for the reply: a request decoded with others must not take more."""
        return draft[: max(0, self._prompt.max_new_tokens - len(self._said))]

    def _likeliest(self) -> list[Token]:
        """After the end of a call: go on to the next candidate, score several, or return the best reply."""
        self._calls.append(self._said)
        while True:
            best = max(self._calls, key=self._rank)
            text = self._text if self._text and self._text[0] > _total(best) else None
            least = self._rank(best)[1] - (NEAR if self._reverse and not text else 0)
            fork = max(self._forks, key=_total, default=None)
            if not self._left or fork is None or _total(fork) <= least:
                break
            self._left -= 1
            self._forks.remove(fork)
            self._begin(fork)
            if self.step:
                return []
            self._calls.append(self._said)
        if text:
            self._begin([text[1]])
            return self._tell()
        near = [call for call in self._calls if self._rank(call)[1] > least]
        if self._reverse and len(near) > 1:
            self.step = self._reverse.begin(near)
            return []
        return self._end_with(best)

    def _score(self, reverse: "_ReverseScores", step: Step, logits: NDArray[np.float32]) -> list[Token]:
        """After a step in reverse order."""
        self.step = reverse.read(step, logits)
        if self.step:
            return []
        totals = [
            _total(call) + self._use.reverse_weight * score
            for call, score in zip(reverse.calls, reverse.scores, strict=True)
        ]
        return self._end_with(reverse.calls[totals.index(max(totals))])

    def _end_with(self, call: list[Token]) -> list[Token]:
        self._said, self.step = call, None
        return self._tell()

    def _rank(self, said: list[Token]) -> tuple[bool, float]:
        """For comparison: a call that was cut off ranks below every complete one."""
        whole = bool(said) and said[-1].id == self._prompt.end
        return whole, _total(said) if whole else -math.inf

    def _begin(self, said: list[Token]) -> None:
        """Go on with the candidate that begins with `said`."""
        ids = [token.id for token in said]
        fed = 0
        while fed < min(len(ids) - 1, len(self._cached)) and ids[fed] == self._cached[fed]:
            fed += 1
        self._reply = _Reply(self._prompt, self._grammar, self._use)
        self._reply.take(ids)
        self._said = said
        self._copied = 0
        self._go_on(fed)

    def _end(self) -> Token:
        self.step = None
        return Token(self._prompt.end, 0.0)


def _total(said: Sequence[Token]) -> float:
    return sum(token.log_probability for token in said)


class _ReverseScores:
    """The log-probability of the request after each of several calls."""

    def __init__(self, parts: Reverse, prefix: int) -> None:
        self._parts, self._prefix = parts, prefix
        self.calls: list[list[Token]] = []
        self.scores: list[float] = []  # of the calls read so far; the last may be incomplete

    def begin(self, calls: list[list[Token]]) -> Step:
        self.calls = calls
        return self._first()

    def read(self, step: Step, logits: NDArray[np.float32]) -> Step | None:
        """The next step, after `logits` (keep, vocabulary) of `step`; None: all calls are scored."""
        self.scores[-1] += sum(map(_log_probability, logits, step.draft))
        if self._left:  # the row after the last token of the draft predicts the next part's first
            token = self._left.pop(0)
            self.scores[-1] += _log_probability(logits[-1], token)
            if self._left:
                return self._part([token], step.at + len(step.tokens))
        return self._first() if len(self.scores) < len(self.calls) else None

    def _first(self) -> Step:
        call = [token.id for token in self.calls[len(self.scores)]]
        self.scores.append(0.0)
        self._left = list(self._parts.request)
        return self._part([*self._parts.opening, *call, *self._parts.between], self._prefix)

    def _part(self, feed: list[int], at: int) -> Step:
        """As many tokens of the request as a draft may have: KV buffers and logits need no more room."""
        draft, self._left = self._left[:LONGEST_DRAFT], self._left[LONGEST_DRAFT:]
        return Step(feed, draft, at)


def generate_together(
    runtime: RowsRuntime, prefix: Sequence[int], prompts: Sequence[Sequence[int]], end: int, max_new_tokens: int
) -> list[list[Token]]:
    """The greedy replies to `prompts`, each up to its `end` token, without techniques. Prompts are padded left."""
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
    """The reply so far, and the state of its grammar."""

    def __init__(self, prompt: Prompt, grammar: Grammar | None, use: Techniques) -> None:
        self._prompt, self._grammar, self._use = prompt, grammar, use
        self._guide: Guide | None = None
        self.tokens: list[int] = []

    @property
    def finished(self) -> bool:
        return self.tokens[-1] == self._prompt.end

    @property
    def grammar_finished(self) -> bool:
        return self._guide is not None and self._guide.finished

    @property
    def is_call(self) -> bool:
        """Whether it is a call or may become one."""
        opening = self._grammar.opening if self._grammar else []
        return bool(opening) and self.tokens[: len(opening)] == opening[: len(self.tokens)]

    def required(self) -> list[int]:
        """What the reply must begin with, whatever the model prefers."""
        if self._prompt.choice != Choice.REQUIRED:
            return []
        if self._grammar is None:
            raise ValueError("a call is required, but without tools or their grammar none can be")
        self.take(self._grammar.opening)
        return [*self._grammar.opening, *(self.forced() if self._use.forced else [])]

    def opening_draft(self) -> list[int]:
        if self._grammar is None or not self._use.forced or self._prompt.choice != Choice.AUTO:
            return []
        return self._grammar.opening

    def choose(self, logits: NDArray[np.float32]) -> tuple[Token, Token | None]:
        """The likeliest allowed token, and the second likeliest if the model is unsure."""
        if self._prompt.choice == Choice.NONE and self._grammar and not self.tokens:
            logits = logits.copy()
            logits[self._grammar.opening[0]] = -np.inf
        second = None
        if not self._guide:
            token = greedy(logits)
        elif forced := self._guide.forced():  # within a draft, or if they are not appended
            token = Token(forced[0], 0.0)
        else:
            token = _best(self._guide, logits)
            if self._use.alternatives and token.log_probability < SURE:
                others = logits.copy()
                others[token.id] = -np.inf
                found = _best(self._guide, others)
                if found.log_probability > -math.inf:  # else no other token is allowed
                    second = Token(found.id, _log_probability(logits, found.id), changed=True)
        self.take([token.id])
        return token, second

    def forced(self) -> list[int]:
        found = self._guide.forced() if self._guide else []
        if found:
            self.take(found)
        return found

    def draft(self, doublings: int) -> list[int]:
        """The drafter's guess; else what follows the longest match of the reply's last tokens in the request."""
        if self._guide and self._use.guess_tokens and self._prompt.drafter:
            guess = self._prompt.drafter.after(self.tokens, self._use.guess_tokens)
            if guess:
                return guess
        asked, n = list(self._prompt.asked), min(self._use.draft_tokens << doublings, LONGEST_DRAFT)
        for length in (3, 2, 1) if n and self._guide else ():
            tail = self.tokens[-length:]
            for start in range(len(asked) - length, -1, -1):
                if asked[start : start + length] == tail:
                    return asked[start + length : start + length + n]
        return []

    def take(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            if self._guide:
                self._guide.accept([token])
            elif self._grammar and self._grammar.opens(self.tokens):
                self._guide = self._grammar.start(self._prompt.text)
                self._guide.accept(self.tokens)


def _best(guide: Guide, logits: NDArray[np.float32]) -> Token:
    best, changed = guide.best(logits)
    return Token(best, _log_probability(logits, best), changed)


def greedy(logits: NDArray[np.float32]) -> Token:
    """`logits`: (vocabulary,)."""
    best = int(logits.argmax())
    return Token(best, _log_probability(logits, best))


def _log_probability(logits: NDArray[np.float32], token: int) -> float:
    top = float(logits.max())
    return float(logits[token]) - top - math.log(np.exp(logits - top).sum())


class NullRuntime:
    """Gives every request the same reply: with it the benchmark measures its own overhead."""

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
            logits[row, self._reply[min(first + row, len(self._reply) - 1)]] = 30.0  # it is sure
        return logits
