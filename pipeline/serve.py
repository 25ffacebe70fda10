"""Serve a model folder over HTTP: Anthropic's Messages API and OpenAI's chat completions. Not a stage.

python -m pipeline.serve serve.model=models/int8
Nothing is executed: the server proposes calls, its clients make them.
"""

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from omegaconf import DictConfig

from pipeline import config
from pipeline.runtime.caller import ToolCaller
from pipeline.runtime.generation import Techniques
from pipeline.serving.app import Limits, Server
from pipeline.serving.engine import Engine

log = logging.getLogger(__name__)

KEY = "TOOL_CALLER_API_KEY"  # an environment variable: params.yaml is in git


@dataclass
class ServeConfig:
    model: Path  # a folder that a stage, or `make release`, wrote
    name: str  # the model's name for clients; agents need one without a slash that does not begin with claude-
    host: str
    port: int
    device: str
    threads: int
    max_new_tokens: int
    tool_result_tokens: int  # longer tool results are cut
    together: int  # requests decoded together; more than 1 needs a fused model
    queue_length: int  # requests that may wait; more are refused
    body_bytes: int
    read_timeout_s: float
    request_timeout_s: float
    drain_timeout_s: float  # for accepted requests, once the server is told to stop
    log_contents: bool

    def __post_init__(self) -> None:
        config.require_range("serve.port", self.port, 0, 65535)
        config.require_one_of("serve.device", self.device, ["cpu", "cuda"])
        config.require_range("serve.threads", self.threads, 1, 1024)
        config.require_range("serve.max_new_tokens", self.max_new_tokens, 1, 100_000)
        config.require_range("serve.tool_result_tokens", self.tool_result_tokens, 1, 1_000_000)
        config.require_range("serve.together", self.together, 1, 64)
        config.require_range("serve.queue_length", self.queue_length, 1, 1_000_000)
        config.require_range("serve.body_bytes", self.body_bytes, 1, 2**32)
        for name in ("read", "request", "drain"):
            config.require_range(f"serve.{name}_timeout_s", getattr(self, f"{name}_timeout_s"), 0.001, 86_400)


@dataclass
class Params:
    paths: config.Paths
    techniques: Techniques
    serve: ServeConfig


class DrainingServer(uvicorn.Server):
    """On a stop signal, answers accepted requests, and new ones with 503, before it closes its socket."""

    def __init__(self, settings: uvicorn.Config, server: Server, drain_timeout_s: float) -> None:
        super().__init__(settings)
        self._server, self._drain_timeout_s = server, drain_timeout_s
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own handler closes the socket at once. A second signal ends the wait for accepted requests."""
        del sig, frame
        if self._draining:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = self._draining or asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        log.info("stopping: %d requests are still answered", self._server.open_requests)
        self._server.engine.stop()
        end = asyncio.get_running_loop().time() + self._drain_timeout_s
        while self._server.open_requests and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def run(tools: Path, techniques: Techniques, cfg: ServeConfig, api_key: str | None) -> None:
    """Raises ValueError if others can reach serve.host and there is no API key."""
    if not is_loopback(cfg.host) and not api_key:
        raise ValueError(f"serve.host is {cfg.host}, which others can reach: set {KEY} to a key that clients must send")
    engine = start_engine(tools, techniques, cfg)
    server = Server(engine, cfg.name, limits(cfg), api_key, cfg.log_contents, gpu_utilisation(cfg.device))
    settings = uvicorn.Config(
        server.app(),
        host=cfg.host,
        port=cfg.port,
        # uvicorn would take whichever is installed; the measurements were made with these
        loop="asyncio",
        http="h11",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
        # above the 60 s of nginx and AWS's load balancers: a connection closed here first costs them a request
        timeout_keep_alive=75,
    )
    log.info("%s at http://%s:%d as %s", cfg.model, cfg.host, cfg.port, cfg.name)
    DrainingServer(settings, server, cfg.drain_timeout_s).run()


def gpu_utilisation(device: str) -> Callable[[], float] | None:
    """Raises RuntimeError if the device is cuda and NVML finds no GPU."""
    if device != "cuda":
        return None
    from pipeline.bench.gpu import Gpu

    gpu = Gpu()
    return lambda: gpu.sample().utilisation_fraction or 0.0


def limits(cfg: ServeConfig) -> Limits:
    return Limits(cfg.body_bytes, cfg.read_timeout_s, cfg.request_timeout_s, cfg.max_new_tokens)


def start_engine(tools: Path, techniques: Techniques, cfg: ServeConfig) -> Engine:
    """An engine that has loaded serve.model. `tools`: the file to read if its folder has no tools.json."""
    own = cfg.model / "tools.json"

    def load() -> ToolCaller:
        return ToolCaller.load(
            cfg.model, own if own.exists() else tools, cfg.device, cfg.threads, techniques, cfg.together
        )

    engine = Engine(load, cfg.queue_length, cfg.tool_result_tokens, cfg.together)
    engine.wait_until_loaded()
    return engine


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.tools, params.techniques, params.serve, os.environ.get(KEY) or None)


if __name__ == "__main__":
    main()
