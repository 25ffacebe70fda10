"""What a call may look like, token by token, from the tools' JSON schemas (llguidance).

Free text stays free: the grammar holds a reply only once it has begun with `<tool_call>`.
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
        self._fresh = LLMatcher(self._vocabulary, _lark(tools))
        self.opening: list[int] = self._fresh.compute_ff_tokens()

    def start(self) -> "Guide":
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


def _lark(tools: Sequence[Tool]) -> str:
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                # An argument that the schema does not name is never right, whatever JSON Schema's default says.
                "arguments": {"additionalProperties": False, **tool.parameters},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    spaces = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    schema = {"anyOf": calls, "x-guidance": spaces}
    return f"start: {json.dumps(OPENING)} call {json.dumps(CLOSING)}\ncall: %json {json.dumps(schema)}"
