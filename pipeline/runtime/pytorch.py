"""PyTorch eager: the baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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

    def begin(self, prefix: Sequence[int]) -> None:
        if list(prefix) != self._prefix:
            self._cache, self._prefix = DynamicCache(), []  # stays empty if the next line fails
            self._forward(torch.tensor([list(prefix)]), self._cache, 1)
            self._prefix = list(prefix)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], at: int, keep: int) -> NDArray[np.float32]:
        self._cache.crop(at)
        return self._forward(torch.tensor([list(tokens)]), self._cache, keep)[0]

    @torch.inference_mode()
    def generate_together(
        self, prefix: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, end: int
    ) -> list[list[Token]]:
        """The greedy replies to `prompts`, each up to its `end` token, in one batch padded on the left."""
        rows, longest = len(prompts), max(map(len, prompts))
        pads = torch.tensor([longest - len(asked) for asked in prompts])
        tokens = torch.tensor([[end] * (longest - len(asked)) + list(asked) for asked in prompts])
        mask = torch.ones((rows, len(prefix) + longest), dtype=torch.long)
        mask[:, len(prefix) :] = torch.arange(longest)[None] >= pads[:, None]
        positions = (mask.cumsum(-1) - 1)[:, len(prefix) :]
        cache = DynamicCache()
        self._forward(torch.tensor([list(prefix)]), cache, 1)
        cache.batch_repeat_interleave(rows)
        replies: list[list[Token]] = [[] for _ in prompts]
        for _ in range(max_new_tokens):
            logits = self._forward(tokens, cache, 1, attention_mask=mask, position_ids=positions)[:, 0]
            found = [greedy(row) for row in logits]
            for reply, token in zip(replies, found, strict=True):
                if not reply or reply[-1].id != end:
                    reply.append(token)
            if all(reply[-1].id == end for reply in replies):
                break
            tokens = torch.tensor([[token.id] for token in found])
            mask = torch.cat([mask, torch.ones((rows, 1), dtype=torch.long)], 1)
            positions = positions[:, -1:] + 1
        return replies

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
