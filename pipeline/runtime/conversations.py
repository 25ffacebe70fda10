"""The KV cache of the last conversations: a request that goes on with one computes only what is new in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.prefixes import Buffers

# Unrelated requests begin alike, with a word or two. To copy that saves nothing, and with int8 the rounding of the step
# in which it was computed would tell in the reply.
LEAST = 16


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


@dataclass(eq=False)
class _Kept:
    prefix: tuple[int, ...]
    tokens: list[int]  # behind the prefix
    parts: list[NDArray[np.float32]]  # keys or values of a layer, (1, heads, tokens, size)


class Conversations:
    """Copies of at most `limit` tokens together; the one that was not gone on with for the longest goes first."""

    def __init__(self, buffers: Buffers, limit: int) -> None:
        self._buffers, self._limit = buffers, limit
        self._kept: list[_Kept] = []

    def keep(self, prefix: tuple[int, ...], tokens: Sequence[int], places: Sequence[int]) -> None:
        """`tokens` behind `prefix` stand at `places` of the buffers. Takes the place of what it goes on with."""
        if not LEAST < len(tokens) <= self._limit:
            return
        self._kept = [
            one for one in self._kept if one.prefix != prefix or 2 * shared(one.tokens, tokens) < len(one.tokens)
        ]
        self._kept.append(_Kept(prefix, list(tokens), [buffer[:, :, places] for buffer in self._buffers]))
        while sum(len(one.tokens) for one in self._kept) > self._limit:
            del self._kept[0]

    def restore(self, prefix: tuple[int, ...], asked: Sequence[int], at: int) -> list[int]:
        """Tokens that `asked` begins with, whose keys and values the buffers then hold from `at` on."""
        found = max(
            (one for one in self._kept if one.prefix == prefix), key=lambda one: shared(one.tokens, asked), default=None
        )
        n = shared(found.tokens, asked[:-1]) if found else 0  # the last is fed: its logits are asked for
        if found is None or n < LEAST:
            return []
        self._kept.append(self._kept.pop(self._kept.index(found)))
        for buffer, part in zip(self._buffers, found.parts, strict=True):
            buffer[:, :, at : at + n] = part[:, :, :n]
        return found.tokens[:n]
