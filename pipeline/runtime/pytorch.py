"""PyTorch eager: the baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from pipeline.model.base import load_tuned
from pipeline.runtime.generation import Ids
from pipeline.runtime.recent import Recent


class PytorchRuntime:
    def __init__(self, folder: Path, device: str, threads: int, prefixes: int) -> None:
        torch.set_num_threads(threads)
        model, _ = load_tuned(folder)
        self._model: Any = model.to(device)
        self._device = device
        self.context_tokens = int(model.config.max_position_embeddings)
        self._prefixes = Recent[tuple[int, ...], DynamicCache](prefixes)
        self._cache = DynamicCache()

    def keeps(self, prefix: Sequence[int]) -> bool:
        return tuple(prefix) in self._prefixes

    def begin(self, prefix: Sequence[int]) -> None:
        self._cache = self._prefixes.get(tuple(prefix), lambda: self._begun(prefix))  # `step` crops what came after it

    def _begun(self, prefix: Sequence[int]) -> DynamicCache:
        cache = DynamicCache()
        self._forward(torch.tensor([list(prefix)]), cache, 1)
        return cache

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        self._cache.crop(at)
        return self._forward(torch.tensor([list(tokens)]), self._cache, keep)[0]

    @torch.inference_mode()
    def begin_rows(self, prefix: Sequence[int], rows: int) -> None:
        self._cache = self._begun(prefix)  # that of all rows from now on
        self._cache.batch_repeat_interleave(rows)

    @torch.inference_mode()
    def step_rows(self, tokens: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        more = {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
        return self._forward(torch.from_numpy(tokens), self._cache, 1, **more)[:, 0]

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._cache.batch_select_indices(torch.tensor(rows, device=self._device))

    @torch.inference_mode()
    def _forward(
        self, tokens: torch.Tensor, cache: DynamicCache, keep: int, **more: torch.Tensor
    ) -> NDArray[np.float32]:
        """Logits (rows, keep, vocabulary) of the last `keep` positions."""
        more = {name: value.to(self._device) for name, value in more.items()}
        output = self._model(
            input_ids=tokens.to(self._device), past_key_values=cache, use_cache=True, logits_to_keep=keep, **more
        )
        logits: NDArray[np.float32] = output.logits.float().cpu().numpy()
        return logits
