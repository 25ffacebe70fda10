"""The KV cache of recent conversations: a request that continues one computes only its new tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.prefixes import Buffers

# tokens. Unrelated requests share a first word or two: copying those saves nothing, and with int8 the reply would
# depend on the rounding of the step that computed them.
LEAST = 16


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens `a` and `b` share."""
    return next((at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


@dataclass(eq=False)
class _Kept:
    prefix: tuple[int, ...]
    tokens: list[int]  # behind the prefix
    asked: int  # how many of them come before the reply
    parts: list[NDArray[np.float32]]  # keys or values of a layer, (1, heads, tokens, size)


class Conversations:
    """Copies of at most `limit` tokens in all; the least recently kept or restored goes first."""

    def __init__(self, buffers: Buffers, limit: int) -> None:
        self._buffers, self._limit = buffers, limit
        self._kept: list[_Kept] = []

    def keep(self, prefix: tuple[int, ...], tokens: Sequence[int], places: Sequence[int], asked: int) -> None:
        """Copy what the buffers hold at `places`: `tokens` behind `prefix`, the first `asked` of them before the reply.

        Replaces the copy of the request that this one continues. If memory runs out, nothing is kept.
        """
        if not LEAST <= asked <= len(tokens) <= self._limit:
            return
        self._kept = [one for one in self._kept if one.prefix != prefix or shared(one.tokens, tokens) < one.asked]
        while sum(len(one.tokens) for one in self._kept) + len(tokens) > self._limit:
            del self._kept[0]
        begin, end = places[0], places[-1] + 1
        in_a_row = slice(begin, end) if list(places) == list(range(begin, end)) else list(places)
        try:
            parts = [buffer[:, :, in_a_row].copy() for buffer in self._buffers]
        except MemoryError:
            self._kept = []
            return
        self._kept.append(_Kept(prefix, list(tokens), asked, parts))

    def restore(self, prefix: tuple[int, ...], asked: Sequence[int], at: int) -> list[int]:
        """The first tokens of `asked` that are kept; their keys and values are copied to the buffers from `at` on."""
        found = max(
            (one for one in self._kept if one.prefix == prefix), key=lambda one: shared(one.tokens, asked), default=None
        )
        n = shared(found.tokens, asked[:-1]) if found else 0  # the last is computed again: its logits are needed
        if found is None or n < LEAST:
            return []
        self._kept.append(self._kept.pop(self._kept.index(found)))
        for buffer, part in zip(self._buffers, found.parts, strict=True):
            buffer[:, :, at : at + n] = part[:, :, :n]
        return found.tokens[:n]
