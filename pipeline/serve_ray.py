"""The server on many machines: an application for Ray Serve. Not a stage.

TOOL_CALLER_API_KEY=... serve run pipeline.serve_ray:application serve.model=models/release ray.replicas=4
Each replica loads serve.model, which has to be at the same path on every machine. The address is set in Ray
(`serve start --http-host`), so serve.host and serve.port have no effect.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from pipeline import config
from pipeline.runtime.generation import Techniques
from pipeline.serve import KEY, ServeConfig, gpu_utilisation, limits, start_engine
from pipeline.serving.app import Server

ROOT = Path(__file__).parents[1]


@dataclass
class RayConfig:
    replicas: int

    def __post_init__(self) -> None:
        config.require_range("ray.replicas", self.replicas, 1, 100_000)


@dataclass
class Params:
    paths: config.Paths
    techniques: Techniques
    serve: ServeConfig
    ray: RayConfig


@serve.ingress()
class Replica:
    """The whole server, on `serve.threads` cores of one machine."""

    def __init__(self, tools: Path, techniques: Techniques, cfg: ServeConfig, api_key: str) -> None:
        engine = start_engine(tools, techniques, cfg)
        gpu = gpu_utilisation(cfg.device)
        self._server = Server(engine, cfg.name, limits(cfg), api_key, cfg.log_contents, gpu)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._server.app()

    def check_health(self) -> None:
        """Raises RuntimeError once the engine's thread has ended: Ray then starts another replica."""
        if not self._server.engine.ready:
            raise RuntimeError("the engine is not ready")


def application(overrides: dict[str, str]) -> Application:
    """The application that `serve run` starts, from params.yaml with `overrides`, such as {"ray.replicas": "4"}.

    Raises ValueError without an API key: others can reach a cluster.
    """
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        raw = compose("params", [f"{key}={value}" for key, value in overrides.items()])
    params = config.load(raw, Params)
    cfg = replace(params.serve, model=params.serve.model.absolute())
    api_key = os.environ.get(KEY)
    if not api_key:
        raise ValueError(f"set {KEY} to a key that clients must send: others can reach a cluster")
    deployment = serve.deployment(
        Replica,
        name=cfg.name,
        num_replicas=params.ray.replicas,
        ray_actor_options={"num_cpus": cfg.threads, "num_gpus": int(cfg.device == "cuda")},
        max_ongoing_requests=cfg.together + cfg.queue_length,
        max_queued_requests=params.ray.replicas * cfg.queue_length,  # else Ray's proxies queue without limit
        graceful_shutdown_timeout_s=cfg.drain_timeout_s,
    )
    return deployment.bind(params.paths.tools.absolute(), params.techniques, cfg, api_key)
