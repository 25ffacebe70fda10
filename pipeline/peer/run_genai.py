"""onnxruntime-genai's runtime with the graph of its own model builder.

    python run_genai.py build TUNED OUT PRECISION

A grammar is bound to a generator, and a new generator has an empty cache: the cached prefix saves more, so no grammar.
"""

import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import harness
import onnxruntime_genai as genai


class Genai:
    prefix_cache, grammar = True, False

    def __init__(self, work: dict[str, Any]) -> None:
        config = genai.Config(work["model"])
        config.overlay(
            f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {work["threads"]}}}}}}}}}'
        )
        self._model = genai.Model(config)
        params = genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=work["longest"] + harness.PREFILL_TOKENS, batch_size=1)
        self._generator = genai.Generator(self._model, params)
        self._prefix: list[int] = []
        self._end = work["end"]
        self.version = version("onnxruntime-genai")
        self.build = f"wheel; {work['build']}"

    def reply(self, asked: harness.Asked) -> harness.Reply:
        start = time.perf_counter()
        prefix = asked["prompt"][: asked["prefix"]]
        if prefix != self._prefix:
            self._generator.rewind_to(0)
            self._generator.append_tokens(prefix)
            self._prefix = prefix
        self._generator.rewind_to(len(prefix))
        self._generator.append_tokens(asked["prompt"][len(prefix) :])
        tokens: list[int] = []
        first_token_s = 0.0
        while len(tokens) < asked["max_new_tokens"] and tokens[-1:] != [self._end]:
            self._generator.generate_next_token()
            tokens.append(int(self._generator.get_next_tokens()[0]))
            first_token_s = first_token_s or time.perf_counter() - start
        return harness.Reply(tokens, first_token_s, time.perf_counter() - start)

    def many(self, asked: list[harness.Asked], clients: int) -> None:
        """One at a time."""


def build(tuned: str, out: str, precision: str) -> None:
    from onnxruntime_genai.models.builder import create_model

    with tempfile.TemporaryDirectory() as cache:
        # No hub is asked: the model is a local folder, and code in it is never run.
        create_model("", tuned, out, precision, "cpu", cache, hf_remote=False, hf_token="false")  # noqa: S106


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(*sys.argv[2:])
    else:
        harness.main(Genai)
