"""Load and fault tests of the server: overhead, endurance, overload, malformed requests, stopping. Not a stage.

python -m pipeline.load_test serve.model=models/int8          writes reports/serving.json, in about 12 minutes
"""

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.provenance import provenance
from pipeline.runtime.caller import ToolCaller
from pipeline.serve import ServeConfig
from pipeline.toolcall.conversation import Request, parse_request

log = logging.getLogger(__name__)


@dataclass
class LoadTestConfig:
    clients: int
    endurance_s: float
    overload_clients: int
    malformed_requests: int
    overhead_requests: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("clients", "overload_clients", "malformed_requests", "overhead_requests", "max_new_tokens"):
            config.require_range(f"load_test.{name}", getattr(self, name), 1, 100_000)
        config.require_range("load_test.endurance_s", self.endurance_s, 1, 86_400)


@dataclass
class Params:
    paths: config.Paths
    serve: ServeConfig
    load_test: LoadTestConfig


class Served:
    """The server in its own process."""

    def __init__(self, cfg: ServeConfig) -> None:
        self.url = f"http://127.0.0.1:{cfg.port}"
        start = time.perf_counter()
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "pipeline.serve", *overrides(cfg)], stdout=subprocess.DEVNULL
        )
        while not self._ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode} before it was ready")
            time.sleep(0.02)
        self.ready_s = time.perf_counter() - start

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)  # nothing, if it has ended already
        return self.process.wait(60)


def overrides(cfg: ServeConfig) -> list[str]:
    """All of `cfg` in Hydra's grammar, but with the loopback host: the clients are on this machine."""
    settings = asdict(replace(cfg, host="127.0.0.1")).items()
    return [f"serve.{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in settings]


def run(paths: config.Paths, report: Path, serve: ServeConfig, cfg: LoadTestConfig) -> dict[str, Any]:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    requests = [parse_request(value, (), where) for where, value in files.read_jsonl(paths.prepared / "test.jsonl")]
    metrics: dict[str, Any] = {"model": serve.model.name, "overhead_p50_s": overhead_p50_s(paths, serve, cfg, requests)}
    served = Served(serve)
    try:
        for name, part in (("endurance", endurance), ("overload", overload), ("malformed", malformed)):
            log.info("%s ...", name)
            metrics |= asyncio.run(part(served, serve, cfg, requests))
        metrics |= asyncio.run(drain(served, cfg, requests))
        served = Served(serve)
        served.end(signal.SIGKILL)
        served = Served(serve)
        metrics["ready_after_kill_s"] = served.ready_s
    finally:
        served.end(signal.SIGKILL)
    files.write_json(report, metrics | {"provenance": provenance((serve, cfg))})
    log.info("%s", metrics)
    return metrics


def overhead_p50_s(paths: config.Paths, serve: ServeConfig, cfg: LoadTestConfig, requests: list[Request]) -> float:
    """Median over requests: the server's time minus that of the same call in this process, measured in turn."""
    some = requests[:: max(1, len(requests) // cfg.overhead_requests)][: cfg.overhead_requests]
    caller = ToolCaller.load(serve.model, paths.tools, serve.device, serve.threads)
    served = Served(serve)
    added = []
    try:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for request in [some[0], *some]:  # the first warms both up
                ours = _fastest_s(partial(caller.reply, request.messages, request.tools, cfg.max_new_tokens))
                added.append(_fastest_s(partial(post, client, body(request, cfg.max_new_tokens))) - ours)
    finally:
        served.end(signal.SIGTERM)
    return float(np.median(added[1:]))


def post(client: httpx.Client, content: dict[str, Any]) -> None:
    """Raises httpx.HTTPStatusError for a refusal: it is fast, but no reply."""
    client.post("/v1/messages", json=content).raise_for_status()


def _fastest_s(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def body(request: Request, max_new_tokens: int, before: str = "") -> dict[str, Any]:
    tools = [
        {"name": tool.name, "description": tool.description, "input_schema": tool.parameters} for tool in request.tools
    ]
    messages = [{"role": "user", "content": before + request.messages[-1]["content"]}]
    return {"model": "tool-caller", "max_tokens": max_new_tokens, "messages": messages, "tools": tools}


Answered = tuple[int, float]  # HTTP status, 0 without an answer; seconds


async def ask(client: httpx.AsyncClient, request: Request, cfg: LoadTestConfig, before: str = "") -> Answered:
    start = time.perf_counter()
    try:
        status = (await client.post("/v1/messages", json=body(request, cfg.max_new_tokens, before))).status_code
    except httpx.TransportError:
        status = 0
    return status, time.perf_counter() - start


async def endurance(served: Served, serve: ServeConfig, cfg: LoadTestConfig, requests: list[Request]) -> dict[str, Any]:
    """Each client sends its next request once the last is answered; memory after a minute and at the end."""
    del serve
    answers: list[Answered] = []
    start = time.perf_counter()
    end = start + cfg.endurance_s
    rss: list[int] = []

    async def client(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as http:
            while time.perf_counter() < end:
                # Each is unique: the server's KV cache of recent conversations would speed up a repetition.
                answers.append(await ask(http, rng.choice(requests), cfg, f"{len(answers)}.{number}: "))

    async def watch() -> None:
        await asyncio.sleep(min(60, cfg.endurance_s / 2))
        while time.perf_counter() < end:
            rss.append(served.rss_bytes)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(number) for number in range(cfg.clients)))
    took_s = time.perf_counter() - start
    seconds = [took for status, took in answers if status == 200]
    return {
        "clients": cfg.clients,
        "requests": len(answers),
        "errors": sum(status != 200 for status, _ in answers),
        "calls_per_s": len(seconds) / took_s,
        "reply_s": {"p50": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))} if seconds else None,
        "rss_bytes": rss[-1],
        "rss_growth_fraction": rss[-1] / rss[0] - 1,
    }


async def overload(served: Served, serve: ServeConfig, cfg: LoadTestConfig, requests: list[Request]) -> dict[str, Any]:
    """All clients at once: requests beyond the queue's length must be refused, and soon.

    Plain sockets: for 200 requests an HTTP client in Python takes seconds of the CPU time that the server needs.
    """
    port = serve.port
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(cfg.overload_clients)]

    async def send(at: int) -> Answered:
        reader, writer = opened[at]
        start = time.perf_counter()
        writer.write(sent[at])
        line = await reader.readline()
        took = time.perf_counter() - start
        writer.close()
        return int(line.split()[1]) if line else 0, took

    sent = [
        _http_post(body(requests[at % len(requests)], cfg.max_new_tokens), port) for at in range(cfg.overload_clients)
    ]
    answers = await asyncio.gather(*map(send, range(cfg.overload_clients)))
    del served
    statuses = Counter(status for status, _ in answers)
    refused = [took for status, took in answers if status == 529]
    return {
        "overload": {
            "clients": cfg.overload_clients,
            "queue_length": serve.queue_length,
            "statuses": {str(status): count for status, count in statuses.items()},
            "refused_p95_s": float(np.percentile(refused, 95)) if refused else None,
            "accepted_longest_s": max((took for status, took in answers if status == 200), default=None),
        }
    }


def _http_post(value: dict[str, Any], port: int) -> bytes:
    content = json.dumps(value).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def malformed(served: Served, serve: ServeConfig, cfg: LoadTestConfig, requests: list[Request]) -> dict[str, Any]:
    """Valid requests with a few bytes replaced, removed or inserted."""
    del serve
    rng = random.Random(0)
    statuses: Counter[int] = Counter()
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        for _ in range(cfg.malformed_requests):
            content = bytearray(json.dumps(body(rng.choice(requests), 1)).encode())
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(content))
                content[at : at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
            statuses[(await client.post("/v1/messages", content=bytes(content))).status_code] += 1
    counts = {str(status): count for status, count in sorted(statuses.items())}
    answered_5xx = sum(count for status, count in statuses.items() if status >= 500)
    return {"malformed": {"sent": cfg.malformed_requests, "statuses": counts, "answered_5xx": answered_5xx}}


async def drain(served: Served, cfg: LoadTestConfig, requests: list[Request]) -> dict[str, Any]:
    """SIGTERM under load: how many requests got neither their answer nor a refusal (503)?"""
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        asked: list[Awaitable[Answered]] = [
            asyncio.ensure_future(ask(client, requests[at % len(requests)], cfg)) for at in range(cfg.clients)
        ]
        await asyncio.sleep(0.3)
        os.kill(served.process.pid, signal.SIGTERM)
        statuses = [status for status, _ in await asyncio.gather(*asked)]
    code = served.process.wait(60)
    lost = sum(status not in (200, 503) for status in statuses)
    return {"drained_lost": lost, "drained_answered": statuses.count(200), "exit_code": code}


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths, params.paths.reports / "serving.json", params.serve, params.load_test)


if __name__ == "__main__":
    main()
