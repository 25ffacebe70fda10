"""llama.cpp through the C interface of llama-cpp-python, with its own grammar sampler, prefix cache and batches.

As in llama.cpp's own server, decoding is greedy, and the grammar checks the likeliest token first; only if it is not
allowed, the whole vocabulary.
"""

import ctypes
import math
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import harness
import llama_cpp as lib
import numpy as np


@dataclass
class Sequence:
    """A request that is being answered."""

    asked: harness.Asked
    at: int  # its index among all requests
    start: float
    feed: list[int]
    position: int
    sampler: Any = None
    tokens: list[int] = field(default_factory=list)
    first_token_s: float = 0.0


class LlamaCpp:
    prefix_cache = True

    def __init__(self, work: dict[str, Any]) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(work["model"].encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {work['model']}")
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self._n_vocabulary = lib.llama_vocab_n_tokens(self._vocabulary)
        settings = lib.llama_context_default_params()
        settings.n_seq_max = work["clients"] + 1
        behind_prefix = work["longest"] - min(asked["prefix"] for asked in work["requests"])
        settings.n_ctx = work["longest"] + 2 * harness.PREFILL_TOKENS + work["clients"] * behind_prefix
        settings.kv_unified = True
        settings.n_batch = settings.n_ctx
        settings.n_threads = settings.n_threads_batch = work["threads"]
        self._context = lib.llama_init_from_model(self._model, settings)
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(settings.n_batch, 0, 1)
        self._prefix: list[int] = []
        self._samplers: dict[str, Any] = {}
        self._eos = work["end"]
        self.grammar = work["grammar"]
        self.version = version("llama-cpp-python")
        self.build = f"{work['build']}; {lib.llama_print_system_info().decode().strip()}"

    def reply(self, asked: harness.Asked) -> harness.Reply:
        return self._answer([asked], 1)[0]

    def many(self, asked: list[harness.Asked], clients: int) -> float:
        start = time.perf_counter()
        self._answer(asked, clients)
        return time.perf_counter() - start

    def _answer(self, asked: list[harness.Asked], clients: int) -> list[harness.Reply]:
        """Requests join as soon as a place is free. Sequence 0 holds the prefix that all others begin with."""
        waiting = deque(enumerate(asked))
        running: dict[int, Sequence] = {}
        replies: dict[int, harness.Reply] = {}
        while waiting or running:
            for place in range(1, clients + 1):
                if waiting and place not in running and (not running or _prefix(waiting[0][1]) == self._prefix):
                    running[place] = self._join(place, *waiting.popleft())
            for place, row in self._step(running).items():
                sequence = running[place]
                if self._take(sequence, row):
                    total_s = time.perf_counter() - sequence.start
                    replies[sequence.at] = harness.Reply(sequence.tokens, sequence.first_token_s, total_s)
                    if sequence.sampler:
                        lib.llama_sampler_free(sequence.sampler)
                    del running[place]
        return [replies[at] for at in range(len(asked))]

    def _join(self, place: int, at: int, asked: harness.Asked) -> Sequence:
        start = time.perf_counter()
        prefix = _prefix(asked)
        if prefix != self._prefix:
            lib.llama_memory_clear(self._memory, False)
            self._decode([(token, position, 0) for position, token in enumerate(prefix)], [])
            self._prefix = prefix
        lib.llama_memory_seq_rm(self._memory, place, -1, -1)
        lib.llama_memory_seq_cp(self._memory, 0, place, 0, len(prefix))
        sequence = Sequence(asked, at, start, asked["prompt"][len(prefix) :], len(prefix))
        if self.grammar and asked["grammar"]:
            sequence.sampler = lib.llama_sampler_clone(self._sampler(asked["grammar"]))
        return sequence

    def _sampler(self, grammar: str) -> Any:
        if grammar not in self._samplers:
            made = lib.llama_sampler_init_grammar(self._vocabulary, grammar.encode(), b"root")
            if not made:
                raise RuntimeError("llama.cpp does not read the grammar")
            self._samplers[grammar] = made
        return self._samplers[grammar]

    def _step(self, running: dict[int, Sequence]) -> dict[int, Any]:
        """Logits (vocabulary,) of each sequence, by place."""
        tokens, last = [], []
        for place, sequence in running.items():
            tokens += [(token, sequence.position + at, place) for at, token in enumerate(sequence.feed)]
            sequence.position += len(sequence.feed)
            last.append(len(tokens) - 1)
        self._decode(tokens, last)
        found = (lib.llama_get_logits_ith(self._context, at) for at in last)
        return {
            place: np.ctypeslib.as_array(logits, shape=(self._n_vocabulary,))
            for place, logits in zip(running, found, strict=True)
        }

    def _decode(self, tokens: list[tuple[int, int, int]], last: list[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, (token, position, place) in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, place, False
        for at in last:
            batch.logits[at] = True
        if lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens")

    def _take(self, sequence: Sequence, logits: Any) -> bool:
        """Append the likeliest allowed token. Does the reply end with it?"""
        token = int(logits.argmax())
        if sequence.sampler:
            if not self._allowed(sequence.sampler, [token], logits[[token]])[0] > -math.inf:
                token = int(self._allowed(sequence.sampler, range(len(logits)), logits).argmax())
            lib.llama_sampler_accept(sequence.sampler, token)
        if not sequence.tokens:
            sequence.first_token_s = time.perf_counter() - sequence.start
        sequence.tokens.append(token)
        sequence.feed = [token]
        return bool(token == self._eos or len(sequence.tokens) == sequence.asked["max_new_tokens"])

    def _allowed(self, sampler: Any, tokens: Any, logits: Any) -> Any:
        """`logits`, set to minus infinity for tokens that the grammar does not allow."""
        rows = np.zeros(len(logits), np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        rows["id"], rows["logit"] = tokens, logits
        data = rows.ctypes.data_as(lib.llama_token_data_p)
        candidates = lib.llama_token_data_array(data=data, size=len(rows), selected=-1, sorted=False)
        lib.llama_sampler_apply(sampler, ctypes.byref(candidates))
        return rows["logit"]


def quantize(source: str, out: str) -> None:
    """Q4_K_M, which only llama.cpp itself can write."""
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def _prefix(asked: harness.Asked) -> list[int]:
    return list(asked["prompt"][: asked["prefix"]])


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
    else:
        harness.main(LlamaCpp)
