"""PyTorch eager: the baseline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from pipeline.model.base import load_tuned
from pipeline.runtime.generation import Token, greedy


class PytorchRuntime:
    def __init__(self, folder: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        model, _ = load_tuned(folder)
        self._model: Any = model.to(device)
        self._device = device
        self.context_tokens = int(model.config.max_position_embeddings)
        self._prefix: list[int] = []
        self._cache = DynamicCache()

    def generate(self, prefix: Sequence[int], prompt: Sequence[int]) -> Iterator[Token]:
        if list(prefix) != self._prefix:
            self._cache, self._prefix = DynamicCache(), list(prefix)
        else:
            self._cache.crop(len(prefix))
        new = [*prefix, *prompt][self._cache.get_seq_length() :]
        while True:
            token = self._step(new)
            yield token
            new = [token.id]

    @torch.inference_mode()
    def _step(self, new: list[int]) -> Token:
        output = self._model(
            input_ids=torch.tensor([new], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return greedy(output.logits[0, -1].float().cpu().numpy())
