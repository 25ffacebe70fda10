"""Requests decoded together on a GPU, each in a row of the KV cache.

On CUDA, GroupQueryAttention takes no bias, so requests cannot share one sequence as in packed.py, and each row of a
batch takes one new token. But a GPU takes about as long for one token per row as for a single token: short steps run
token by token, all rows at once, and longer ones run alone.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipeline.runtime.generation import Row, Step
from pipeline.runtime.ort import last_output, lengths, open_session, past_inputs


class CudaRowsRuntime:
    """A float16 graph with GroupQueryAttention, for at most `rows` requests at a time.

    A row keeps its prefix for the next request with the same tools. On the CPU the same code runs the same graph.
    """

    def __init__(self, folder: Path, device: str, threads: int, rows: int) -> None:
        self._session = open_session(folder / "model.onnx", device, threads)
        self._device = device
        self._buffer_tokens, self.context_tokens = lengths(folder)
        self._past = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((rows, heads, self._buffer_tokens, size), np.float16), device
            )
            for name, (heads, size) in past_inputs(self._session).items()
        }
        self._bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}
        self._prefixes: list[tuple[int, ...]] = [()] * rows  # what each row begins with
        self._lengths = [0] * rows
        self._rows: dict[Row, int] = {}
        self._prefix: tuple[int, ...] = ()

    def keeps(self, prefix: Sequence[int]) -> bool:
        return tuple(prefix) in self._prefixes

    def has_room(self, prefix: int, own: Sequence[int]) -> bool:
        return prefix + max(own) <= self.context_tokens

    def begin(self, prefix: Sequence[int]) -> None:
        """End all requests; those that join from now on have `prefix`."""
        self._rows = {}
        self._prefix = tuple(prefix)

    def join(self, asked: Sequence[int] = ()) -> Row:
        del asked  # no conversations are kept
        free = set(range(len(self._prefixes))) - set(self._rows.values())
        at = min(free, key=lambda at: (self._prefixes[at] != self._prefix, at))
        if self._prefixes[at] != self._prefix:
            self._prefixes[at] = ()  # stays empty if the next line fails
            self._alone(at, self._prefix, 0, 1)
            self._prefixes[at] = self._prefix
        row = Row()
        self._rows[row], self._lengths[at] = at, len(self._prefix)
        return row

    def leave(self, row: Row) -> None:
        at = self._rows.pop(row)
        self._lengths[at] = len(self._prefixes[at])

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        """For one request alone."""
        row = next(iter(self._rows), None) or self.join()
        return self._alone(self._rows[row], tokens, at, keep)

    def step_together(self, steps: Sequence[tuple[Row, Step]]) -> list[NDArray[np.float32]]:
        turns = _turns([len(step.tokens) for _, step in steps])
        found: dict[int, list[NDArray[np.float32]]] = {self._rows[row]: [] for row, _ in steps}
        for row, step in steps:
            if len(step.tokens) > turns:
                found[self._rows[row]] = [self._alone(self._rows[row], step.tokens, step.at, step.keep)]
        for turn in range(turns):
            new = {
                self._rows[row]: (step.tokens[turn], step.at + turn)
                for row, step in steps
                if turn < len(step.tokens) <= turns
            }
            logits = self._one_each(new)
            for at in new:
                found[at].append(logits[at])
        return [np.concatenate(found[self._rows[row]])[-step.keep :] for row, step in steps]

    def _one_each(self, new: dict[int, tuple[int, int]]) -> NDArray[np.float32]:
        """Logits (rows, 1, vocabulary) of the first rows; `new`: row -> its token and the token's position.

        Rows not in `new` read a token too, at a place that their next token overwrites.
        """
        rows = max(new) + 1
        tokens, mask = np.zeros((rows, 1), np.int64), np.zeros((rows, self._buffer_tokens), np.int64)
        for at in range(rows):
            tokens[at, 0], position = new.get(at, (0, min(self._lengths[at], self._buffer_tokens - 1)))
            mask[at, : position + 1] = 1
        logits = self._run(self._binding(0, rows), tokens, mask, 1)
        for at, (_, position) in new.items():
            self._lengths[at] = position + 1
        return logits

    def _alone(self, row: int, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        """Logits (keep, vocabulary) of the last `keep` of `tokens`, which begin at position `at` of `row`."""
        length = at + len(tokens)
        mask = np.ones((1, length), np.int64)
        logits = self._run(self._binding(row, 1), np.array([tokens], np.int64), mask, keep)
        self._lengths[row] = length
        return logits[0]

    def _binding(self, first: int, rows: int) -> onnxruntime.IOBinding:
        """Bound to the KV cache of `rows` rows from `first` on."""
        if (first, rows) not in self._bindings:
            binding = self._bindings[first, rows] = self._session.io_binding()
            for name, value in self._past.items():
                shape = [rows, *value.shape()[1:]]
                place = value.data_ptr() + first * int(np.prod(shape[1:])) * np.dtype(np.float16).itemsize
                binding.bind_input(name, self._device, 0, np.float16, shape, place)
                present = name.replace("past_key_values", "present")
                binding.bind_output(present, self._device, 0, np.float16, shape, place)
        return self._bindings[first, rows]

    def _run(
        self, binding: onnxruntime.IOBinding, tokens: NDArray[np.int64], mask: NDArray[np.int64], keep: int
    ) -> NDArray[np.float32]:
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input("start", np.array([-keep], np.int64))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return last_output(binding).astype(np.float32)


def _turns(lengths: Sequence[int]) -> int:
    """Tokens up to which steps run together, one token per run, so that the model runs least often."""
    return min(range(max(lengths) + 1), key=lambda turns: turns + sum(length > turns for length in lengths))
