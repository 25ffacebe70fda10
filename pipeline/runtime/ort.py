"""ONNX Runtime: the portable graph, which copies its KV cache at each step, and the fused one, which does not."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipeline import files
from pipeline.runtime.conversations import LEAST, shared
from pipeline.runtime.generation import LONGEST_DRAFT, Ids
from pipeline.runtime.prefixes import Prefixes
from pipeline.runtime.recent import Recent

BUFFER_TOKENS = 2048
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(
    path: Path, device: str, threads: int, options: dict[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """`options`: the provider's. Raises RuntimeError if `device` is missing: ONNX Runtime would use the CPU."""
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        found = onnxruntime.get_available_providers()
        raise RuntimeError(f"benchmark.device is {device}, but ONNX Runtime offers only {found}")
    if device == "cuda":
        onnxruntime.preload_dlls()  # CUDA's libraries, from where pip put them for PyTorch
        options = {"arena_extend_strategy": "kSameAsRequested", **(options or {})}  # or memory grows in powers of two
    providers = [(PROVIDERS[device], options or {})]
    session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=providers)
    if PROVIDERS[device] not in session.get_providers():
        raise RuntimeError(f"{path}: {PROVIDERS[device]} did not start (a driver too old, or libraries missing?)")
    return session


def session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def lean_options(threads: int) -> onnxruntime.SessionOptions:
    """With these, a long prompt's memory returns to the system, a twentieth of the process's; no call is slower."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold = -3  # malloc.h; once set, malloc no longer raises it after frees
        libc.mallopt(m_mmap_threshold, 128 * 1024)
    options = session_options(threads)
    options.enable_cpu_mem_arena = False
    return options


def past_inputs(session: onnxruntime.InferenceSession) -> dict[str, tuple[int, int]]:
    """Name of each input of past keys or values -> number of heads, size of a head."""
    return {
        found.name: (found.shape[1], found.shape[3])
        for found in session.get_inputs()
        if found.name.startswith("past_key_values")
    }


class PortableRuntime:
    """Any decoder graph with past in and present out, as optimum exports it."""

    def __init__(self, folder: Path, device: str, threads: int, prefixes: int) -> None:
        self._session = open_session(folder / "model.onnx", device, threads)
        self._heads = past_inputs(self._session)
        self._inputs = {found.name for found in self._session.get_inputs()}
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._heads)]
        self.context_tokens = int(files.read_json(folder / "config.json")["max_position_embeddings"])
        self._prefixes = Recent[tuple[int, ...], dict[str, NDArray[np.float32]]](prefixes)
        self._past = self._empty()
        self._length = 0

    def keeps(self, prefix: Sequence[int]) -> bool:
        return tuple(prefix) in self._prefixes

    def begin(self, prefix: Sequence[int]) -> None:
        self._past, self._length = self._prefixes.get(tuple(prefix), lambda: self._begun(prefix)), len(prefix)

    def _begun(self, prefix: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        return self._extend(np.array([prefix]), *_unpadded(0, len(prefix)), self._empty())[1]

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        if at < self._length:
            self._past = {name: value[:, :, :at] for name, value in self._past.items()}
        logits, self._past = self._extend(np.array([tokens]), *_unpadded(at, len(tokens)), self._past)
        self._length = at + len(tokens)
        return logits[0, -keep:]

    def begin_rows(self, prefix: Sequence[int], rows: int) -> None:
        self.begin(prefix)
        self._past = {name: np.repeat(value, rows, 0) for name, value in self._past.items()}

    def step_rows(self, tokens: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        logits, self._past = self._extend(tokens, mask, positions, self._past)
        return logits[:, -1]

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._past = {name: value[rows] for name, value in self._past.items()}

    def _empty(self) -> dict[str, NDArray[np.float32]]:
        return {name: np.zeros((1, heads, 0, size), np.float32) for name, (heads, size) in self._heads.items()}

    def _extend(
        self, tokens: Ids, mask: Ids, positions: Ids, past: dict[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Logits (rows, new, vocabulary) of `tokens`, and the past including them."""
        feed: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, **past}
        if "position_ids" in self._inputs:
            feed["position_ids"] = positions
        logits, *present = self._session.run(self._outputs, feed)
        return logits, dict(zip(past, present, strict=True))


def _unpadded(at: int, new: int) -> tuple[Ids, Ids]:
    """Mask and positions of one row's `new` tokens from position `at` on."""
    return np.ones((1, at + new), np.int64), np.arange(at, at + new, dtype=np.int64)[None]


class FusedRuntime:
    """A graph with GroupQueryAttention on the CPU: KV buffers per layer, bound as past and present, never copied.

    The prefix stays at the start of the buffers from one request to the next; other prefixes are kept as copies. With
    `conversation` the last request stays too: a request that continues it computes only its new tokens.
    """

    def __init__(self, folder: Path, threads: int, prefixes: int, conversation: bool = False) -> None:
        model, providers = str(folder / "model.onnx"), [PROVIDERS["cpu"]]
        self._session = onnxruntime.InferenceSession(model, lean_options(threads), providers=providers)
        buffer_tokens, self.context_tokens = lengths(folder)
        self._binding = self._session.io_binding()
        buffers = []
        for name, (heads, size) in past_inputs(self._session).items():
            buffers.append(np.zeros((1, heads, buffer_tokens, size), np.float32))
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffers[-1])  # shares its memory
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._mask = np.ones((1, buffer_tokens), np.int64)
        self._prefixes = Prefixes(buffers, prefixes)
        self._conversation = conversation
        self._held: list[int] = []  # tokens in the buffers behind the prefix
        self._new = True  # the next step is the first of a request

    def keeps(self, prefix: Sequence[int]) -> bool:
        return tuple(prefix) in self._prefixes

    def begin(self, prefix: Sequence[int]) -> None:
        if tuple(prefix) != self._prefixes.current or not self._conversation:
            self._held = []
        self._new = True
        self._prefixes.begin(tuple(prefix), lambda new: self._extend(new, len(new), 1))

    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        start, known = at - len(self._prefixes.current), 0
        if self._new:
            known = shared(self._held, tokens[:-keep])
            known = known if known >= LEAST else 0
        self._new = False
        self._held = self._held[: start + known]  # stays so if what follows fails
        logits = self._extend(tokens[known:], at + len(tokens), keep)
        self._held += tokens[known:]
        return logits

    def _extend(self, new: Sequence[int], length: int, keep: int) -> NDArray[np.float32]:
        """Logits (keep, vocabulary) of the last `keep` of `new`, which end at position `length`."""
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.array([new], np.int64))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self._mask[:, :length]))
        binding.bind_cpu_input("keep", np.array([keep], np.int64))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return last_output(binding)[0]


def lengths(folder: Path, contexts: int = 1) -> tuple[int, int]:
    """Tokens in a KV buffer for `contexts` contexts, and in one context; neither exceeds the model's positions.

    A context is LONGEST_DRAFT shorter than its buffer, because drafts may reach beyond the end of a reply.
    """
    limit = int(files.read_json(folder / "config.json")["max_position_embeddings"])
    return min(limit, contexts * BUFFER_TOKENS), min(limit, BUFFER_TOKENS) - LONGEST_DRAFT


def last_output(binding: onnxruntime.IOBinding) -> NDArray[np.float32]:
    """The last bound output. IOBinding.get_outputs would make an object of each KV buffer, 60 us per step."""
    outputs = binding.get_outputs_as_ortvaluevector()
    found: NDArray[np.float32] = outputs[len(outputs) - 1].numpy()
    return found
