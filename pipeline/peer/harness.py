"""Shared by the peers' scripts: reads a file of work, writes a file of timed replies.

python SCRIPT.py WORK.json REPLIES.json        (pipeline/peers.py writes the first and reads the second)

Except for run_ours.py, the scripts import nothing of the project: some run in environments of their own.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

PREFILL_TOKENS, DECODE_TOKENS = 256, 64

Asked = dict[str, Any]  # prompt: token ids; prefix: how many of them all requests share; max_new_tokens; grammar


@dataclass
class Reply:
    tokens: list[int]  # with the end token, unless cut off
    first_token_s: float
    total_s: float


class Peer(Protocol):
    version: str
    build: str  # flags and settings needed to reproduce it
    prefix_cache: bool
    grammar: bool

    def reply(self, asked: Asked) -> Reply: ...

    def many(self, asked: list[Asked], clients: int) -> float | None:
        """Seconds to answer them all, `clients` at a time; None if it can only answer one at a time."""


def main(load: Callable[[dict[str, Any]], Peer]) -> None:
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(measure(load, work)), encoding="utf-8")


def measure(load: Callable[[dict[str, Any]], Peer], work: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    peer = load(work)
    load_s = time.perf_counter() - start
    requests: list[Asked] = work["requests"]
    for asked in work["warmup"]:
        peer.reply(asked)
    # No request is repeated: some peers cache whole prompts, which would not help a user's next request.
    replies = [peer.reply(asked) for asked in requests]
    found: dict[str, Any] = {
        "version": peer.version,
        "build": peer.build,
        "prefix_cache": peer.prefix_cache,
        "grammar": peer.grammar,
        "load_s": load_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "replies": [asdict(reply) for reply in replies],
    }
    if not work["speed"]:
        return found
    wall_s = peer.many(work["many"], work["clients"])
    found["together"] = wall_s is not None
    in_turn_per_s = len(replies) / sum(reply.total_s for reply in replies)
    found["calls_per_s_many"] = len(work["many"]) / wall_s if wall_s else in_turn_per_s
    return found | speeds(peer, work)


def speeds(peer: Peer, work: dict[str, Any]) -> dict[str, float]:
    """Speeds on five prompts of random tokens: nothing cached, no grammar, one token per step."""
    rng = random.Random(0)
    replies = []
    for _ in range(5):
        prompt = [rng.randrange(100, work["vocabulary"]) for _ in range(PREFILL_TOKENS)]
        replies.append(peer.reply({"prompt": prompt, "prefix": 1, "max_new_tokens": DECODE_TOKENS, "grammar": None}))
    steps = sum(len(reply.tokens) - 1 for reply in replies)
    return {
        "prefill_tokens_per_s": PREFILL_TOKENS / statistics.median(reply.first_token_s for reply in replies),
        "decode_tokens_per_s": steps / sum(reply.total_s - reply.first_token_s for reply in replies),
    }


def peak_rss_bytes() -> int | None:
    """None except on Linux. getrusage would count the parent's memory from before it started this process."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
