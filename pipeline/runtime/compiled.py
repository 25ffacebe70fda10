"""PyTorch in float16 with a static KV cache and compiled one-token steps: the strong baseline on a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import StaticCache

from pipeline.model.base import load_tuned
from pipeline.runtime.ort import lengths
from pipeline.runtime.recent import Recent

Kept = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer


class CompiledRuntime:
    """Steps of several tokens are not compiled: each length would need a compilation of its own.

    On the CPU, the reference for the GPU, the same weights run in float32 and nothing is compiled.
    """

    def __init__(self, folder: Path, device: str, threads: int, prefixes: int) -> None:
        torch.set_num_threads(threads)
        model, _ = load_tuned(folder)
        self._device, on_gpu = device, device == "cuda"
        self._model: Any = model.to(device, torch.float16 if on_gpu else torch.float32)
        self._one_token = torch.compile(self._model, mode="reduce-overhead") if on_gpu else self._model
        buffer_tokens, self.context_tokens = lengths(folder)
        self._cache = StaticCache(config=model.config, max_cache_len=buffer_tokens)
        self._prefixes = Recent[tuple[int, ...], Kept](prefixes)
        self._prefix: tuple[int, ...] = ()

    def keeps(self, prefix: Sequence[int]) -> bool:
        return tuple(prefix) in self._prefixes

    @torch.inference_mode()
    def begin(self, prefix: Sequence[int]) -> None:
        wanted = tuple(prefix)
        if wanted != self._prefix or not self._prefixes.limit:
            self._prefix = ()  # stays empty if the next line fails
            kept = self._prefixes.get(wanted, lambda: self._begun(wanted))
            for layer, (keys, values) in zip(self._cache.layers, kept, strict=True):
                layer.keys[:, :, : len(wanted)].copy_(keys)  # in place: the compiled step knows the address
                layer.values[:, :, : len(wanted)].copy_(values)
            self._prefix = wanted

    def _begun(self, prefix: tuple[int, ...]) -> Kept:
        self.step(prefix, 0, 1)
        until = slice(len(prefix))
        return [(layer.keys[:, :, until].clone(), layer.values[:, :, until].clone()) for layer in self._cache.layers]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        """Older entries of the cache behind these tokens are masked by `cache_position`."""
        model = self._one_token if len(tokens) == 1 else self._model
        output = model(
            input_ids=torch.tensor([list(tokens)], device=self._device),
            cache_position=torch.arange(at, at + len(tokens), device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: NDArray[np.float32] = output.logits[0].float().cpu().numpy()
        return logits
