"""Requests decoded together on the CPU: their tokens share one KV cache, and an attention bias keeps them apart.

In a batch, GroupQueryAttention takes one new token per row, but forced tokens and drafts are several. So the model
reads one sequence, in which a token sees the prefix, stored once, and the earlier tokens of its own request. A token's
position is a separate input, independent of its place in the KV cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline.runtime.conversations import Conversations, shared
from pipeline.runtime.generation import LONGEST_DRAFT, Row, Step
from pipeline.runtime.ort import last_output, lean_options, lengths, past_inputs
from pipeline.runtime.prefixes import Prefixes

HIDDEN = np.finfo(np.float32).min
CONTEXTS = 4  # that the requests may fill together; memory never written to is not resident


class PackedRuntime:
    def __init__(self, folder: Path, threads: int, prefixes: int, conversation_tokens: int = 0) -> None:
        self._session = _open(folder, threads)
        buffer_tokens, self.context_tokens = lengths(folder, CONTEXTS)
        self._binding = self._session.io_binding()
        self._buffers = []
        for name, (heads, size) in past_inputs(self._session).items():
            buffer = np.zeros((1, heads, buffer_tokens, size), np.float32)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)  # shares its memory
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
            self._buffers.append(buffer)
        self._mask = np.ones((1, buffer_tokens), np.int64)
        self._prefixes = Prefixes(self._buffers, prefixes)
        self._conversations = Conversations(self._buffers, conversation_tokens)
        self.rows: list[Row] = []

    def keeps(self, prefix: Sequence[int]) -> bool:
        return tuple(prefix) in self._prefixes

    def has_room(self, prefix: int, own: Sequence[int]) -> bool:
        return prefix + sum(own) <= self._mask.size - LONGEST_DRAFT

    def begin(self, prefix: Sequence[int]) -> None:
        """End all requests; those that join from now on have `prefix`."""
        self.rows = []
        self._prefixes.begin(tuple(prefix), self._compute)

    def _compute(self, prefix: tuple[int, ...]) -> None:
        n = len(prefix)
        self._run(list(prefix), np.arange(n), np.zeros((n, n), np.float32), 1)

    def join(self, asked: Sequence[int] = ()) -> Row:
        used = self._close_gaps()
        known = self._conversations.restore(self._prefixes.current, asked, used)
        self.rows.append(Row(list(range(used, used + len(known))), known, len(asked)))
        return self.rows[-1]

    def leave(self, row: Row) -> None:
        self.rows.remove(row)
        if row.asked:
            self._keep(row)

    def _keep(self, row: Row) -> None:
        self._conversations.keep(self._prefixes.current, row.tokens, row.places[: len(row.tokens)], row.asked)

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        """For one request alone."""
        row = self.rows[0] if self.rows else self.join()
        feed = len(tokens) - keep + 1
        return self.step_together([(row, Step(list(tokens[:feed]), list(tokens[feed:]), at))])[0]

    def step_together(self, steps: Sequence[tuple[Row, Step]]) -> list[NDArray[np.float32]]:
        begin = len(self._prefixes.current)
        read: list[tuple[Row, int]] = []
        for row, step in steps:
            at = step.at - begin
            known = at + shared(row.tokens[at:], step.feed[:-1])
            if known < min(row.asked, len(row.tokens)):  # scored in reverse order from now on
                self._keep(row)
                row.asked = 0
            del row.places[known:], row.tokens[known:]
            read += [(row, token) for token in step.feed[known - at : -1]]
        used = self._close_gaps()
        # Tokens whose logits are not needed come first: the head computes only the last ones.
        asked = [(row, token) for row, step in steps for token in [step.feed[-1], *step.draft]]
        new = [*read, *asked]
        positions = np.empty(len(new), np.int64)
        for at, (row, _) in enumerate(new):
            positions[at] = begin + len(row.places)
            row.places.append(used + at)
        bias = np.full((len(new), used + len(new)), HIDDEN, np.float32)
        bias[:, :begin] = 0
        for at, (row, _) in enumerate(new):
            bias[at, row.places] = 0
        logits = self._run([token for _, token in new], positions, bias, len(asked))
        for row, token in new:
            row.tokens.append(token)
        return np.split(logits, np.cumsum([step.keep for _, step in steps])[:-1])

    def _close_gaps(self) -> int:
        """Move the last tokens to places that wrong drafts and ended requests left; returns where the tokens then end.

        Attention takes time for every place, masked or not.
        """
        taken = {place for row in self.rows for place in row.places}
        begin, end = len(self._prefixes.current), len(self._prefixes.current) + len(taken)
        gaps = [place for place in range(begin, end) if place not in taken]
        moved = [place for place in taken if place >= end]
        if not moved:
            return end
        for buffer in self._buffers:
            buffer[:, :, gaps] = buffer[:, :, moved]
        new = dict(zip(moved, gaps, strict=True))
        for row in self.rows:
            row.places = [new.get(place, place) for place in row.places]
        return end

    def _run(
        self, tokens: list[int], positions: NDArray[Any], bias: NDArray[np.float32], keep: int
    ) -> NDArray[np.float32]:
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self._mask[:, : bias.shape[1]]))
        binding.bind_cpu_input("position_ids", positions[None])
        binding.bind_cpu_input("attention_bias", bias[None, None])
        binding.bind_cpu_input("keep", np.array([keep], np.int64))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return last_output(binding)[0]


def _open(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """The fused graph, with positions and an attention bias as further inputs."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = onnx.helper.make_tensor_value_info
    model.graph.input.extend(
        [
            tensor("position_ids", onnx.TensorProto.INT64, [1, "sequence_length"]),
            tensor("attention_bias", onnx.TensorProto.FLOAT, [1, 1, "sequence_length", "total_sequence_length"]),
        ]
    )
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[9:11] = ["position_ids", "attention_bias"]
    options = lean_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
