"""transformers with PyTorch: eager with a growing cache, or compiled with one of fixed size."""

import time
from importlib.metadata import version
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


class Transformers:
    prefix_cache, grammar = True, False

    def __init__(self, work: dict[str, Any]) -> None:
        torch.set_num_threads(work["threads"])
        self._model: Any = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32).eval()
        self._compiled = work["compile"]
        self._cache: Any = DynamicCache()
        self._decode = self._model
        if self._compiled:
            # As transformers' own generate() does: steps of one token are compiled, prompts of any length are not.
            self._cache = StaticCache(self._model.config, max_cache_len=work["longest"] + harness.PREFILL_TOKENS)
            self._decode = torch.compile(self._model, fullgraph=True)
        self._prefix: list[int] = []
        self._end = work["end"]
        self.version = version("transformers")
        how = "torch.compile (inductor) of the decode step, static cache" if self._compiled else "eager, dynamic cache"
        self.build = f"torch {torch.__version__}, float32, {how}"

    @torch.inference_mode()
    def reply(self, asked: harness.Asked) -> harness.Reply:
        start = time.perf_counter()
        prefix = asked["prompt"][: asked["prefix"]]
        if prefix != self._prefix:
            self._cut(0)
            self._step(self._model, prefix, 0)
            self._prefix = prefix
        self._cut(len(prefix))
        at = len(asked["prompt"])
        tokens = [self._step(self._model, asked["prompt"][len(prefix) :], len(prefix))]
        first_token_s = time.perf_counter() - start
        while tokens[-1] != self._end and len(tokens) < asked["max_new_tokens"]:
            tokens.append(self._step(self._decode, tokens[-1:], at))
            at += 1
        return harness.Reply(tokens, first_token_s, time.perf_counter() - start)

    def many(self, asked: list[harness.Asked], clients: int) -> None:
        """One at a time."""

    def _cut(self, length: int) -> None:
        if not self._compiled:  # in a static cache positions are overwritten, and later ones are masked
            self._cache.crop(length)

    def _step(self, model: Any, tokens: list[int], at: int) -> int:
        positions = torch.arange(at, at + len(tokens))
        output = model(
            input_ids=torch.tensor([tokens]),
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(output.logits[0, -1].argmax())


if __name__ == "__main__":
    harness.main(Transformers)
