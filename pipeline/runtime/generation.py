"""What every way to generate has in common: token ids in, tokens out, one at a time, greedily."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Token:
    id: int
    log_probability: float  # natural logarithm, under the model as it is (temperature 1)


class Runtime(Protocol):
    context_tokens: int  # the longest that prefix, prompt and reply may be together

    def generate(self, prefix: Sequence[int], prompt: Sequence[int]) -> Iterator[Token]:
        """The greedy continuation of `prefix` and `prompt`, without end: the caller stops it.

        The KV cache of `prefix` is kept for the next request. The seam for grammar, drafts and
        batching: they change when tokens come, never which.
        """


def greedy(logits: NDArray[np.float32]) -> Token:
    """`logits`: (vocabulary,)."""
    best = int(logits.argmax())
    top = float(logits[best])
    return Token(best, -float(np.log(np.exp(logits - top, dtype=np.float32).sum(dtype=np.float64))))
