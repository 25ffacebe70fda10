"""optimum's ORTModelForCausalLM on its own graph; its generate() has no prefix cache, so it reads whole prompts."""

import time
from importlib.metadata import version
from typing import Any

import harness
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM


class Clock:
    """A streamer for generate(), which passes it the prompt, then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Optimum:
    prefix_cache, grammar = False, False

    def __init__(self, work: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = work["threads"]
        self._model: Any = ORTModelForCausalLM.from_pretrained(work["model"], session_options=options)
        self._end = work["end"]
        self.version = version("optimum-onnx")
        self.build = f"wheel; onnxruntime {onnxruntime.__version__}, float32"

    def reply(self, asked: harness.Asked) -> harness.Reply:
        streamer = Clock()
        start = time.perf_counter()
        prompt = torch.tensor([asked["prompt"]])
        tokens = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=asked["max_new_tokens"],
            eos_token_id=self._end,
            pad_token_id=self._end,
            streamer=streamer,
        )
        total_s = time.perf_counter() - start
        return harness.Reply(tokens[0, prompt.shape[1] :].tolist(), streamer.times[1] - start, total_s)

    def many(self, asked: list[harness.Asked], clients: int) -> None:
        """One at a time."""


if __name__ == "__main__":
    harness.main(Optimum)
