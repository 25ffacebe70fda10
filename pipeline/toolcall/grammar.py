"""What a call may look like, token by token, from the tools' JSON schemas (llguidance).

Free text stays free: the grammar holds a reply only once it has begun with `<tool_call>`. A parameter that its
schema marks `"x-copy": "span"` can only be a span of the request, one marked "path" also two spans with a
slash between ("api.md in docs"): small models misspell what they copy.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from numpy.typing import NDArray

from pipeline.toolcall.reply import CLOSING, OPENING
from pipeline.toolcall.tool import Tool


class Grammar:
    """The grammar of one list of tools. Raises ValueError naming the tool whose schema it cannot express."""

    def __init__(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        self._vocabulary = from_tokenizer(tokenizer, n_vocab=len(tokenizer))
        for tool in tools:
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


SPACES = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def _lark(tools: Sequence[Tool], text: str = "") -> str:
    # Chunks and not characters of the escaped text: a span must not end within an escape.
    spans = {"substring_chunks": [json.dumps(char, ensure_ascii=False)[1:-1] for char in text]}
    rules = [
        f"start: {json.dumps(OPENING)} call {json.dumps(CLOSING)}",
        "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
        'path: "\\"" SPAN ("/" SPAN)? "\\""\nspan: "\\"" SPAN "\\""',
        f"SPAN: %regex {json.dumps(spans)}",
    ]
    for number, tool in enumerate(tools):
        opening = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        rules.append(f'call{number}: {json.dumps(opening)} arguments{number} "}}"')
        if _copied(tool):
            rules += _arguments(number, tool)
        else:
            # An argument that the schema does not name is never right, whatever JSON Schema's default says.
            schema = {"additionalProperties": False, **tool.parameters, "x-guidance": SPACES}
            rules.append(f"arguments{number}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _copied(tool: Tool) -> dict[str, str]:
    """The parameters that are copied from the request, and how."""
    properties = tool.parameters.get("properties", {})
    return {
        name: schema["x-copy"] for name, schema in properties.items() if isinstance(schema, dict) and "x-copy" in schema
    }


def _arguments(number: int, tool: Tool) -> list[str]:
    """An object's rules, property by property: `first` where none stands before, `more` where a comma is needed."""
    required = tool.parameters.get("required", [])
    properties = list(tool.parameters["properties"].items())
    rules = [f'arguments{number}: "{{" first{number}_0 "}}"']
    for at, (name, schema) in enumerate(properties):
        value = f"value{number}_{at}"
        held = _copied(tool).get(name) or f"%json {json.dumps({**schema, 'x-guidance': SPACES})}"
        pair = json.dumps(f"{json.dumps(name, ensure_ascii=False)}: ")
        rest = f"more{number}_{at + 1}"
        skip = {kind: "" if name in required else f" | {kind}{number}_{at + 1}" for kind in ("first", "more")}
        rules += [
            f"{value}: {held}",
            f"first{number}_{at}: {pair} {value} {rest}{skip['first']}",
            f'more{number}_{at}: ", " {pair} {value} {rest}{skip["more"]}',
        ]
    return [*rules, f'first{number}_{len(properties)}: ""', f'more{number}_{len(properties)}: ""']
