"""OpenVINO GenAI's pipeline with continuous batching and a prefix cache; it reads a GGUF file directly."""

import time
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import numpy as np
import openvino
import openvino_genai as genai

STATUS = genai.GenerationStatus


class OpenVino:
    prefix_cache = True

    def __init__(self, work: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2048
        scheduler.cache_size = 1  # GB
        settings = {"INFERENCE_NUM_THREADS": work["threads"]}
        if work["exact"]:
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self._pipeline = genai.ContinuousBatchingPipeline(Path(work["model"]), scheduler, "CPU", settings)
        self._end = work["end"]
        self.grammar = work["grammar"]
        self.version = version("openvino-genai")
        self.build = f"wheel; OpenVINO {openvino.__version__}, {settings}"

    def reply(self, asked: harness.Asked) -> harness.Reply:
        start = time.perf_counter()
        handle = self._add(0, asked)
        tokens: list[int] = []
        first_token_s = 0.0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            while handle.can_read():
                for output in handle.read().values():
                    first_token_s = first_token_s or time.perf_counter() - start
                    tokens += output.generated_ids
        return harness.Reply(tokens, first_token_s, time.perf_counter() - start)

    def many(self, asked: list[harness.Asked], clients: int) -> float:
        start = time.perf_counter()
        waiting = deque(enumerate(asked))
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < clients:
                running.append(self._add(*waiting.popleft()))
            self._pipeline.step()
            statuses = [handle.get_status() for handle in running]
            if lost := [status for status in statuses if status not in (STATUS.RUNNING, STATUS.FINISHED)]:
                raise RuntimeError(f"OpenVINO ended a request unanswered: {lost[0]}")
            running = [handle for handle, status in zip(running, statuses, strict=True) if status == STATUS.RUNNING]
        return time.perf_counter() - start

    def _add(self, number: int, asked: harness.Asked) -> Any:
        config = genai.GenerationConfig()
        config.do_sample, config.max_new_tokens, config.eos_token_id = False, asked["max_new_tokens"], self._end
        config.stop_token_ids = {self._end}
        if self.grammar and asked["grammar"]:
            config.structured_output_config = genai.StructuredOutputConfig(grammar=asked["grammar"])
        return self._pipeline.add_request(number, openvino.Tensor(np.array([asked["prompt"]], np.int64)), config)


if __name__ == "__main__":
    harness.main(OpenVino)
