"""What every peer's script shares: a file of work in, a file of replies with their times out.

python SCRIPT.py WORK.json REPLIES.json        (pipeline/peers.py writes the first and reads the second)

Scripts of this folder run in environments of their own and need nothing of the project.
"""

import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

PREFILL_TOKENS = 256

Asked = dict[str, Any]  # prompt: token ids; prefix: how many of them every request has; max_new_tokens; grammar


@dataclass
class Reply:
    tokens: list[int]  # with the end token, unless cut off
    first_token_s: float
    total_s: float


class Peer(Protocol):
    version: str
    build: str  # flags and settings that a reader needs to repeat it
    prefix_cache: bool
    grammar: bool

    def reply(self, asked: Asked) -> Reply: ...

    def many(self, asked: list[Asked], clients: int) -> float | None:
        """Seconds to answer them all, `clients` at a time. None where it cannot: requests wait their turn then."""


def main(load: Callable[[dict[str, Any]], Peer]) -> None:
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(measure(load, work)), encoding="utf-8")


def measure(load: Callable[[dict[str, Any]], Peer], work: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    peer = load(work)
    load_s = time.perf_counter() - start
    requests: list[Asked] = work["requests"]
    for asked in requests[: work["warmup_calls"]]:
        peer.reply(asked)
    replies: list[Reply] = []
    start = time.perf_counter()
    while not replies or time.perf_counter() - start < work["min_s"]:  # whole passes: the same requests for everybody
        replies += [peer.reply(asked) for asked in requests]
    one_client_s = time.perf_counter() - start
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {
        "version": peer.version,
        "build": peer.build,
        "prefix_cache": peer.prefix_cache,
        "grammar": peer.grammar,
        "load_s": load_s,
        "peak_rss_bytes": peak_rss_bytes,
        "replies": [asdict(reply) for reply in replies],
    }
    if not work["speed"]:
        return found
    found["prefill_tokens_per_s"] = prefill_tokens_per_s(peer, work)
    clients: int = work["clients"]
    asked_together = list(islice(cycle(requests), max(len(requests), clients * work["calls_per_client"])))
    wall_s = peer.many(asked_together, clients)
    found["together"] = wall_s is not None
    found["calls_per_s_many"] = len(asked_together) / wall_s if wall_s else len(replies) / one_client_s
    return found


def prefill_tokens_per_s(peer: Peer, work: dict[str, Any]) -> float:
    """Median of five prompts of random tokens, which no prefix cache knows."""
    rng = random.Random(0)
    times = []
    for _ in range(5):
        prompt = [rng.randrange(100, work["vocabulary"]) for _ in range(PREFILL_TOKENS)]
        asked = {"prompt": prompt, "prefix": 1, "max_new_tokens": 2, "grammar": None}
        times.append(peer.reply(asked).first_token_s)
    return PREFILL_TOKENS / statistics.median(times)
