"""The KV cache of the last few tool lists, so that their prompts are not computed again for each request."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.recent import Recent

Buffers = Sequence[NDArray[np.float32]]  # keys or values of a layer, (1, heads, tokens, size)


class Prefixes:
    """The prefix in use stays at the start of `buffers`, without a copy: most agents have one list of tools.

    When another replaces it, it is copied. `limit` is how many are kept, including the one in use.
    """

    def __init__(self, buffers: Buffers, limit: int) -> None:
        self._buffers, self._limit = buffers, limit
        self._others = Recent[tuple[int, ...], Buffers](max(0, limit - 1))
        self.current: tuple[int, ...] = ()

    def __contains__(self, prefix: tuple[int, ...]) -> bool:
        return self._limit > 0 and (prefix == self.current or prefix in self._others)

    def begin(self, prefix: tuple[int, ...], compute: Callable[[tuple[int, ...]], object]) -> None:
        """Use `prefix`; if it is not kept, `compute` writes its keys and values to the buffers."""
        if prefix == self.current and self._limit:
            return
        if self.current and self._limit > 1:
            self._others.put(self.current, [buffer[:, :, : len(self.current)].copy() for buffer in self._buffers])
        self.current = ()  # stays empty if what follows fails
        kept = self._others.take(prefix)
        if kept is None:
            compute(prefix)
        else:
            for buffer, part in zip(self._buffers, kept, strict=True):
                buffer[:, :, : len(prefix)] = part
        self.current = prefix
