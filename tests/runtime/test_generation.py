"""Each technique changes when tokens come, never which."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.runtime import generation
from pipeline.runtime.generation import (
    ALL,
    LONGEST_DRAFT,
    PLAIN,
    Choice,
    Decoding,
    NullRuntime,
    Prompt,
    Reverse,
    Step,
    Techniques,
    Token,
    _ReverseScores,
    ablations,
    generate,
)
from pipeline.toolcall import compact
from pipeline.toolcall.draft import Drafter
from pipeline.toolcall.grammar import Grammar
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import Tool

GRAMMAR_ONLY = replace(PLAIN, grammar=True)
TEXTS = {"pattern": {"type": "string", "x-copy": "regex"}, "path": {"type": "string", "x-copy": "path"}}
TOOLS = (
    Tool("Grep", "Search.", {"type": "object", "properties": TEXTS, "required": []}),
    Tool(
        "Wait",
        "Wait.",
        {"type": "object", "properties": {"seconds": {"type": "integer"}}, "required": ["seconds"]},
    ),
)


class RandomRuntime:
    """A model with random logits that depend on all tokens before; it likes calls, and copies from its prompt."""

    context_tokens = 10_000

    def __init__(self, seed: int, opening: Sequence[int], liked: Sequence[int], vocabulary: int) -> None:
        self._seed, self._opening, self._liked, self._vocabulary = seed, list(opening), list(liked), vocabulary
        self._cache: list[int] = []
        self._asked = 0
        self.steps = 0

    def keeps(self, prefix: Sequence[int]) -> bool:
        del prefix
        return False

    def begin(self, prefix: Sequence[int]) -> None:
        self._cache, self._asked = list(prefix), 0

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        self.steps += 1
        assert at <= len(self._cache), "a position was left out"
        self._cache = [*self._cache[:at], *tokens]
        if not self._asked:  # the first step ends with the prompt and the drafts
            self._asked = len(self._cache) - keep + 1
        ends = range(len(self._cache) - keep + 1, len(self._cache) + 1)
        return np.stack([self._logits(self._cache[:end]) for end in ends])

    def _logits(self, before: list[int]) -> NDArray[np.float32]:
        rng = np.random.default_rng([self._seed, *before])
        logits = rng.normal(size=self._vocabulary).astype(np.float32)
        logits[self._liked] += 3
        said = before[self._asked :]
        if len(said) < len(self._opening) and said == self._opening[: len(said)]:
            logits[self._opening[len(said)]] += 100
        return logits


@pytest.fixture
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer(tiny_base)


TEXT = 'find "ab" in cd/ef'
PREFIX = [1, 2, 3]
REVERSE = Reverse([4, 5], [6], list(range(7, 90)))  # a request of three drafts


def replies(tokenizer: Tokenizer, use: Techniques, seed: int) -> tuple[list[Token], int]:
    grammar = Grammar(tokenizer.vocabulary, TOOLS)
    asked = tokenizer.encode(TEXT, add_special_tokens=False)
    runtime, end = random_runtime(tokenizer, seed), tokenizer.eos_token_id
    drafter = Drafter(tokenizer, TOOLS, TEXT, end)
    prompt = Prompt(PREFIX, asked, end, TEXT, max_new_tokens=300, drafter=drafter, reverse=REVERSE)
    return list(islice(generate(runtime, prompt, grammar, use), 300)), runtime.steps


def random_runtime(tokenizer: Tokenizer, seed: int) -> RandomRuntime:
    liked = tokenizer.encode('"abcdef}', add_special_tokens=False)
    return RandomRuntime(seed, Grammar(tokenizer.vocabulary, TOOLS).opening, liked, len(tokenizer))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("draft_tokens", [0, 4])
@pytest.mark.parametrize("guess_tokens", [0, 16])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("alternatives", [0, 3])
def test_techniques_leave_the_reply_as_it_is(
    tokenizer: Tokenizer, seed: int, draft_tokens: int, guess_tokens: int, forced: bool, alternatives: int
) -> None:
    expected, steps = replies(tokenizer, replace(GRAMMAR_ONLY, alternatives=alternatives), seed)
    found, fewer = replies(tokenizer, Techniques(1, 0, True, forced, draft_tokens, guess_tokens, alternatives, 0), seed)
    assert [token.id for token in found] == [token.id for token in expected]
    assert probability(found) == pytest.approx(probability(expected))
    assert fewer <= steps
    assert fewer < steps or not forced


@pytest.mark.parametrize("seed", range(20))
def test_grammar_makes_every_finished_call_fit_its_tool(tokenizer: Tokenizer, seed: int) -> None:
    found, _ = replies(tokenizer, GRAMMAR_ONLY, seed)
    assert any(token.changed for token in found), "random logits would have kept to the schema by chance"
    if found[-1].id == tokenizer.eos_token_id:
        call = compact.read(str(tokenizer.decode([token.id for token in found[:-1]])), TOOLS)
        assert call is not None
        tool = next(tool for tool in TOOLS if tool.name == call.name)
        assert tool.fault(call.arguments) is None


@pytest.mark.parametrize("seed", range(5))
def test_ablations_leave_the_reply_as_it_is_where_the_grammar_stays(tokenizer: Tokenizer, seed: int) -> None:
    found = {name: replies(tokenizer, use, seed) for name, use in ablations(ALL).items()}
    expected, fewest = found["all"]
    for name in ("without prefix cache", "without forced tokens", "without drafts", "without guesses"):
        assert [token.id for token in found[name][0]] == [token.id for token in expected]
    assert fewest < found["without forced tokens"][1]


def test_alternatives_find_a_likelier_call(tokenizer: Tokenizer) -> None:
    likelier = 0
    for seed in range(20):
        greedy, steps = replies(tokenizer, replace(ALL, alternatives=0, reverse_weight=0), seed)
        found, more = replies(tokenizer, replace(ALL, alternatives=8, reverse_weight=0), seed)
        if greedy[-1].id == tokenizer.eos_token_id:
            assert found[-1].id == tokenizer.eos_token_id
            assert probability(found) >= probability(greedy)
            assert more > steps
            likelier += probability(found) > probability(greedy)
            assert [token.id for token in found] == [token.id for token in greedy] or any(t.changed for t in found)
    assert likelier >= 5


def test_text_is_said_where_any_is_likelier_than_the_best_call(tokenizer: Tokenizer) -> None:
    """A model that begins a call with 60%, and can't say which: any one call is less likely than a text."""
    grammar = Grammar(tokenizer.vocabulary, TOOLS)
    text = tokenizer.encode("Which?", add_special_tokens=False)
    prompt = Prompt([1], [2, 3], tokenizer.eos_token_id, "", max_new_tokens=50)

    class Torn(NullRuntime):
        def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
            logits = np.zeros((keep, len(tokenizer)), np.float32)
            said = [*tokens][2:] if at == 1 else [*tokens]
            for row in range(keep):
                before = said[: len(said) - keep + 1 + row]
                if at == 1 and not before:
                    logits[row, [grammar.opening[0], text[0]]] = 20 + math.log(0.6), 20 + math.log(0.4)
                elif at == 1 and before == grammar.opening[: len(before)] != grammar.opening:
                    logits[row, grammar.opening[len(before)]] = 20
                elif before[-1:] == text[:1]:
                    logits[row, tokenizer.eos_token_id] = 20
            return logits

    found = list(generate(Torn([0], len(tokenizer)), prompt, grammar, ALL))
    assert [token.id for token in found] == [text[0], tokenizer.eos_token_id]
    assert found[0].changed
    greedy = next(generate(Torn([0], len(tokenizer)), prompt, grammar, replace(ALL, alternatives=0, reverse_weight=0)))
    assert greedy.id == grammar.opening[0]


def test_reverse_order_finds_calls_after_which_the_request_is_likelier(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, better = 2.0, 0  # a random model's calls are seldom nearer
    monkeypatch.setattr(generation, "NEAR", near)
    for seed in range(60):
        use = replace(ALL, alternatives=8, reverse_weight=0)
        likeliest, _ = replies(tokenizer, use, seed)
        found, _ = replies(tokenizer, replace(use, reverse_weight=1), seed)
        if likeliest[-1].id != tokenizer.eos_token_id:
            assert found == likeliest
        elif found != likeliest:
            before, after = request_after(likeliest, tokenizer, seed), request_after(found, tokenizer, seed)
            assert (
                math.log(probability(likeliest)) - near
                < math.log(probability(found))
                < math.log(probability(likeliest))
            )
            assert math.log(probability(found)) + after > math.log(probability(likeliest)) + before
            better += 1
    assert better >= 3


def request_after(call: list[Token], tokenizer: Tokenizer, seed: int) -> float:
    """The request's log-probability after `call`, in one step."""
    runtime = asked_runtime(tokenizer, seed)
    before = [*REVERSE.opening, *(token.id for token in call), *REVERSE.between]
    logits = runtime.step([*before, *REVERSE.request[:-1]], len(PREFIX), len(REVERSE.request)).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return float(sum(row[token] for row, token in zip(logits, REVERSE.request, strict=True)))


def asked_runtime(tokenizer: Tokenizer, seed: int) -> RandomRuntime:
    """After the first step: where the random model says an opening depends on the request's length."""
    runtime = random_runtime(tokenizer, seed)
    runtime.begin(PREFIX)
    runtime.step(tokenizer.encode(TEXT, add_special_tokens=False), len(PREFIX), 1)
    return runtime


@pytest.mark.parametrize("length", [1, 32, 33, 34, 65, 66, 83])
def test_request_is_scored_in_parts_as_in_one(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setitem(globals(), "REVERSE", replace(REVERSE, request=REVERSE.request[:length]))
    calls = [[Token(9, -1.0), Token(8, -1.0)], [Token(7, -1.0)]]
    runtime, scores = asked_runtime(tokenizer, 0), _ReverseScores(REVERSE, len(PREFIX))
    steps = 0
    step: Step | None = scores.begin(calls)
    while step:
        assert len(step.draft) <= LONGEST_DRAFT
        step, steps = scores.read(step, runtime.step(step.tokens, step.at, step.keep)), steps + 1
    assert scores.scores == pytest.approx([request_after(call, tokenizer, 0) for call in calls])
    assert steps == 2 * math.ceil(length / (LONGEST_DRAFT + 1))


def test_reverse_order_needs_alternatives_and_a_finite_weight() -> None:
    with pytest.raises(ValueError, match=r"techniques\.reverse_weight needs techniques\.alternatives"):
        replace(ALL, alternatives=0)
    for weight in (-0.1, 11, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"techniques\.reverse_weight must be"):
            replace(ALL, reverse_weight=weight)


def probability(tokens: list[Token]) -> float:
    return math.exp(sum(token.log_probability for token in tokens))


def test_some_random_calls_finish(tokenizer: Tokenizer) -> None:
    """Else the test above would assert nothing."""
    ends = [replies(tokenizer, GRAMMAR_ONLY, seed)[0][-1].id for seed in range(20)]
    assert ends.count(tokenizer.eos_token_id) >= 10


def test_text_stays_free(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode('<tool> is no {"call"', add_special_tokens=False)
    runtime = NullRuntime([*text, tokenizer.eos_token_id], len(tokenizer))
    prompt = Prompt([1], [2, 3], tokenizer.eos_token_id, "")
    for use in (PLAIN, ALL):
        found = list(generate(runtime, prompt, Grammar(tokenizer.vocabulary, TOOLS), use))
        assert [token.id for token in found] == [*text, tokenizer.eos_token_id]
        assert not any(token.changed for token in found)


def test_required_call_is_made_by_a_model_that_would_write_text(tokenizer: Tokenizer) -> None:
    runtime = NullRuntime([*tokenizer.encode("no", add_special_tokens=False), tokenizer.eos_token_id], len(tokenizer))
    prompt = Prompt([1], [2, 3], tokenizer.eos_token_id, "", Choice.REQUIRED, max_new_tokens=40)
    found = [token.id for token in islice(generate(runtime, prompt, Grammar(tokenizer.vocabulary, TOOLS), ALL), 40)]
    assert str(tokenizer.decode(found)).startswith(("<tool_call>Grep", "<tool_call>Wait"))
    with pytest.raises(ValueError, match="a call is required, but without tools"):
        next(generate(runtime, prompt, None, ALL))


@pytest.mark.parametrize("choice", [Choice.AUTO, Choice.REQUIRED])
@pytest.mark.parametrize("use", [ALL, GRAMMAR_ONLY])
def test_call_that_is_forced_as_a_whole_ends(tokenizer: Tokenizer, choice: Choice, use: Techniques) -> None:
    """Of the only tool on offer, without arguments: the grammar was asked for more after its end."""
    grammar = Grammar(tokenizer.vocabulary, [Tool("Stop", "", {"type": "object", "properties": {}})])
    runtime = NullRuntime([*grammar.opening, tokenizer.eos_token_id], len(tokenizer))
    prompt = Prompt([1], [2, 3], tokenizer.eos_token_id, "", choice)
    found = [token.id for token in generate(runtime, prompt, grammar, use)]
    assert found[-1] == tokenizer.eos_token_id
    assert str(tokenizer.decode(found[:-1])) == "<tool_call>Stop"


def test_only_tool_on_offer_is_named_whatever_the_model_writes(tokenizer: Tokenizer) -> None:
    """Once the marker was followed by another name than the only tool's, nothing held the reply."""
    said = tokenizer.encode("<tool_call>Launch\ntarget: all", add_special_tokens=False)
    runtime = NullRuntime([*said, tokenizer.eos_token_id], len(tokenizer))
    prompt = Prompt([1], [2, 3], tokenizer.eos_token_id, "", max_new_tokens=40)
    found = [token.id for token in generate(runtime, prompt, Grammar(tokenizer.vocabulary, TOOLS[:1]), GRAMMAR_ONLY)]
    assert str(tokenizer.decode(found)).startswith(f"<tool_call>{TOOLS[0].name}")


def test_marker_in_other_tokens_is_a_call_too(tokenizer: Tokenizer) -> None:
    grammar = Grammar(tokenizer.vocabulary, TOOLS)
    pieces = [tokenizer.encode(piece, add_special_tokens=False) for piece in ("<", "t", "ool_", "ca", "ll", ">")]
    assert grammar.opens([token for piece in pieces for token in piece])
    assert grammar.opens(grammar.opening)
    assert not grammar.opens(grammar.opening[:-1])


def test_forbidden_call_is_not_begun(tokenizer: Tokenizer) -> None:
    grammar = Grammar(tokenizer.vocabulary, TOOLS)
    runtime = NullRuntime([*grammar.opening, tokenizer.eos_token_id], len(tokenizer))
    prompt = Prompt([1], [2, 3], tokenizer.eos_token_id, "", Choice.NONE)
    found = next(generate(runtime, prompt, grammar, ALL))
    assert found.id != grammar.opening[0]


def test_draft_has_no_more_tokens_than_the_reply_may_have(tokenizer: Tokenizer) -> None:
    grammar = Grammar(tokenizer.vocabulary, TOOLS)
    asked = tokenizer.encode("some words " * 9)
    for limit in (1, 2, len(grammar.opening) + 2):
        prompt = Prompt([1], asked, tokenizer.eos_token_id, "some words " * 9, max_new_tokens=limit)
        decoding = Decoding(prompt, grammar, ALL)
        while step := decoding.step:
            assert len(step.feed) + len(step.draft) + step.at <= 1 + len(asked) + limit
            logits = np.zeros((step.keep, len(tokenizer)), np.float32)
            for row, token in zip(logits, [*step.draft, asked[0]], strict=True):
                row[token] = 30.0
            decoding.read(step, logits)


def test_grammar_names_the_tool_it_cannot_express(tokenizer: Tokenizer) -> None:
    odd = Tool("Odd", "Odd.", {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}})
    with pytest.raises(ValueError, match="tool Odd: its parameters make no grammar"):
        Grammar(tokenizer.vocabulary, [TOOLS[0], odd])
