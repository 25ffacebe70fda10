"""Calls of fixed lengths, to measure what length costs: no grammar, no drafts, one token per step."""

import resource
import time
from pathlib import Path

from pipeline.runtime.generation import Runtime


def call(runtime: Runtime, prefix: list[int], asked: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    start = time.perf_counter()
    runtime.begin(prefix)
    token = int(runtime.step(asked, len(prefix), 1)[0].argmax())
    first_s = time.perf_counter() - start
    for at in range(len(prefix) + len(asked), len(prefix) + len(asked) + new_tokens - 1):
        token = int(runtime.step([token], at, 1)[0].argmax())
    return first_s, time.perf_counter() - start


def peak_rss_bytes() -> int:
    """Of this process alone: on Linux, ru_maxrss of a new process starts at the memory of its parent."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return 1024 * (peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
