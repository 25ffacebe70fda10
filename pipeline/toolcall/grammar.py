"""What a call may look like, token by token, from the tools' JSON schemas (llguidance).

Free text stays free: the grammar holds a reply only once it has begun with `<tool_call>`. A parameter that its
schema marks `"x-copy": "span"` can only be a span of whole words of the request, one marked "path" also two spans
with a slash between ("api.md in docs"): small models misspell what they copy, and stop too soon.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from numpy.typing import NDArray

from pipeline.toolcall.compact import is_text
from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool


class Grammar:
    """The grammar of one list of tools. Raises ValueError naming the tool whose schema it cannot express."""

    def __init__(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        self._vocabulary = from_tokenizer(tokenizer, n_vocab=len(tokenizer))
        for tool in tools:
            if unknown := tool.parameters.keys() - KEYWORDS:
                raise ValueError(
                    f"tool {tool.name}: its parameters use {sorted(unknown)}, which the grammar cannot hold"
                )
            failed, why = LLMatcher.validate_grammar_with_warnings(_lark([tool]), self._vocabulary)
            if failed:
                raise ValueError(f"tool {tool.name}: its parameters make no grammar: {'; '.join(why)}")
        self._tools, self._copies = tools, any(map(_copied, tools))
        self._fresh = LLMatcher(self._vocabulary, _lark(tools))
        self.opening: list[int] = self._fresh.compute_ff_tokens()

    def start(self, text: str) -> "Guide":
        """`text`: the request, of which copied arguments are spans."""
        if self._copies:
            return Guide(LLMatcher(self._vocabulary, _lark(self._tools, text)))
        return Guide(self._fresh.deep_copy())


class Guide:
    """Follows one reply."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.changed = False  # was a token ruled out that the model would have chosen?

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def accept(self, tokens: Sequence[int]) -> None:
        """Raises RuntimeError where the grammar does not allow them: it never lets a call go on unheld."""
        if not self._matcher.consume_tokens(list(tokens)):
            raise RuntimeError(f"the grammar refused tokens {list(tokens)}: {self._matcher.get_error()}")

    def forced(self) -> list[int]:
        """The tokens that come next whatever the model thinks."""
        return list(self._matcher.compute_ff_tokens())

    def best(self, logits: NDArray[np.float32]) -> int:
        """The likeliest token that is allowed. `logits`: (vocabulary,)."""
        best = int(logits.argmax())
        if self._matcher.validate_tokens([best]) == 1:  # hundreds of times cheaper than a mask
            return best
        self.changed = True
        mask = allocate_token_bitmask(1, len(logits))
        fill_next_token_bitmask(self._matcher, mask)
        allowed = logits[None].copy()
        apply_token_bitmask_inplace(allowed, mask)
        return int(allowed.argmax())


# Of a tool's parameters. An argument that is not among the properties is never right, whatever they say.
KEYWORDS = {"type", "properties", "required", "additionalProperties", "description", "title", "$schema", "$defs"}
WORD = re.compile(r"\w+|\W")
SPACES = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def _lark(tools: Sequence[Tool], text: str = "") -> str:
    calls = [f"call{number}" for number in range(len(tools))]
    return "\n".join(
        [
            f"start: {json.dumps(OPENING)} ({' | '.join(calls)})",
            'PATH: SPAN ("/" SPAN)?',
            f"SPAN: %regex {json.dumps({'substring_chunks': WORD.findall(text)})}",
            "REST: /(?s:.*)/",
            *(rule for number, tool in enumerate(tools) for rule in _call(number, tool)),
        ]
    )


def _call(number: int, tool: Tool) -> list[str]:
    """A tool's rules. `after` an argument may come any later one up to the next that is required, or the end.

    A text goes on until the name of such an argument begins a line: that name is part of its token, because the
    lexer never goes back.
    """
    properties = list(tool.parameters.get("properties", {}).items())
    required = tool.parameters.get("required", [])

    def following(at: int) -> tuple[list[int], bool]:
        """Numbers of the arguments that may come after the first `at`, and whether the end may."""
        found: list[int] = []
        for later in range(at, len(properties)):
            found.append(later)
            if properties[later][0] in required:
                return found, False
        return found, True

    def after(at: int) -> str:
        later, ends = following(at)
        ways = [f"{_key(properties[found][0])} value{number}_{found}" for found in later]
        return " | ".join([*ways, *(['""'] if ends else [])])

    rules = [f"call{number}: {json.dumps(tool.name)} ({after(0)})"]
    for at, (name, schema) in enumerate(properties):
        rule = f"value{number}_{at}"
        held = _held(schema, tool)
        if held is not None:
            rules.append(f"{rule}: {held} ({after(at + 1)})")
            continue
        later, ends = following(at + 1)
        copied = _copied(tool).get(name, "").upper()
        until = f"{'UNTIL' if copied else 'until'}{number}_{at}"  # llguidance: a terminal, or a rule that can be lazy
        ways = [f"{until}_{found} value{number}_{found}" for found in later]
        rules.append(f"{rule}: {' | '.join([*ways, *([copied or 'REST'] if ends else [])])}")
        for found in later:
            key = properties[found][0]
            free = f"{until}_{found}[lazy]: /(?s:.*)\\n{re.escape(key)}: /"
            rules.append(f"{until}_{found}: {copied} {_key(key)}" if copied else free)
    return rules


def _key(name: str) -> str:
    return json.dumps(f"\n{name}: ", ensure_ascii=False)


def _held(schema: Any, tool: Tool) -> str | None:
    """The rule of a value that is no text, or one of a few."""
    if not is_text(schema):
        named = {"$defs": tool.parameters["$defs"]} if "$defs" in tool.parameters else {}
        wanted = schema if isinstance(schema, dict) else {}
        return f"%json {json.dumps({**wanted, **named, 'x-guidance': SPACES})}"
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return "(" + " | ".join(json.dumps(value, ensure_ascii=False) for value in allowed) + ")"
    return None


def _copied(tool: Tool) -> dict[str, str]:
    """The parameters that are copied from the request, and how."""
    properties = tool.parameters.get("properties", {})
    return {
        name: schema["x-copy"] for name, schema in properties.items() if isinstance(schema, dict) and "x-copy" in schema
    }
