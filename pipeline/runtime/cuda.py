"""ONNX Runtime on a GPU: the KV cache stays there; token ids go in, logits come out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipeline import files
from pipeline.runtime.ort import last_output, lengths, open_session, past_inputs


@dataclass
class _Buffers:
    """The KV cache of one prefix and of the request after it, bound as past and present."""

    binding: onnxruntime.IOBinding  # for steps of any length
    fixed: onnxruntime.IOBinding | None  # for steps of one token, where shapes and addresses never change
    options: onnxruntime.RunOptions | None  # for `fixed`


class CudaRuntime:
    """A float16 graph with GroupQueryAttention. Each kept prefix has its own buffers: a change of tools copies nothing.

    With `cuda_graph` in toolcaller.json a step of one token replays a CUDA graph, which needs fixed shapes and
    addresses. GroupQueryAttention allows it: the mask has the length of the whole buffer, and its sum says how much of
    the past is used. Each set of buffers has its own graph, and there are never more sets than `prefixes`.

    On the CPU the same code runs the same graph, for comparison.
    """

    def __init__(self, folder: Path, device: str, threads: int, prefixes: int) -> None:
        fixed = bool(files.read_json(folder / "toolcaller.json").get("cuda_graph"))
        options = {"enable_cuda_graph": "1"} if fixed and device == "cuda" else {}
        self._session = open_session(folder / "model.onnx", device, threads, options)
        self._device, self._prefixes = device, prefixes
        self._buffer_tokens, self.context_tokens = lengths(folder)
        self._ones = self._on_device(np.ones((1, self._buffer_tokens), np.int64))
        self._kept: dict[tuple[int, ...], _Buffers] = {}  # the most recently used last
        self._made = 0
        self._options = _graph(-1) if fixed else None
        if fixed:
            vocabulary = self._session.get_outputs()[0].shape[-1]
            self._token = self._on_device(np.zeros((1, 1), np.int64))
            self._mask = self._on_device(np.zeros((1, self._buffer_tokens), np.int64))
            self._logits = self._on_device(np.zeros((1, 1, vocabulary), np.float16))

    def keeps(self, prefix: Sequence[int]) -> bool:
        return self._prefixes > 0 and tuple(prefix) in self._kept

    def begin(self, prefix: Sequence[int]) -> None:
        wanted, kept = tuple(prefix), self.keeps(prefix)
        self._now = self._kept.pop(wanted) if wanted in self._kept else self._free()
        if not kept:
            self._extend(wanted, len(wanted), 1)
        self._kept[wanted] = self._now

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        if len(tokens) == 1 and self._now.fixed:
            return self._extend_by_one(tokens[0], at + 1, self._now.fixed)
        return self._extend(tokens, at + len(tokens), keep)

    def _extend(self, new: Sequence[int], length: int, keep: int) -> NDArray[np.float32]:
        """Logits (keep, vocabulary) of the last `keep` of `new`, which end at position `length`."""
        binding = self._now.binding
        binding.bind_cpu_input("input_ids", np.array([new], np.int64))
        binding.bind_input("attention_mask", self._device, 0, np.int64, (1, length), self._ones.data_ptr())
        binding.bind_cpu_input("start", np.array([-keep], np.int64))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding, self._options)
        return last_output(binding)[0].astype(np.float32)

    def _extend_by_one(self, token: int, length: int, binding: onnxruntime.IOBinding) -> NDArray[np.float32]:
        self._token.update_inplace(np.array([[token]], np.int64))
        self._mask.update_inplace((np.arange(self._buffer_tokens) < length).astype(np.int64)[None])
        self._session.run_with_iobinding(binding, self._now.options)
        logits: NDArray[np.float32] = self._logits.numpy()[0].astype(np.float32)
        return logits

    def _free(self) -> _Buffers:
        """New buffers, or the least recently used if there are as many as allowed."""
        if len(self._kept) >= max(1, self._prefixes):
            return self._kept.pop(next(iter(self._kept)))
        self._made += 1
        past = {
            name: self._on_device(np.zeros((1, heads, self._buffer_tokens, size), np.float16))
            for name, (heads, size) in past_inputs(self._session).items()
        }
        if not self._options:
            return _Buffers(self._bound(past), None, None)
        fixed = self._bound(past)
        fixed.bind_ortvalue_input("input_ids", self._token)
        fixed.bind_ortvalue_input("attention_mask", self._mask)
        fixed.bind_cpu_input("start", np.array([-1], np.int64))
        fixed.bind_ortvalue_output("logits", self._logits)
        return _Buffers(self._bound(past), fixed, _graph(self._made))

    def _bound(self, past: dict[str, onnxruntime.OrtValue]) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        return binding

    def _on_device(self, values: NDArray[np.generic]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, self._device)


def _graph(number: int) -> onnxruntime.RunOptions:
    """-1: no graph is captured. Source: onnxruntime.ai, CUDA Execution Provider, "Using CUDA Graphs"."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
