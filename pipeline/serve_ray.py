"""Serve a model folder on many machines with Ray Serve: replicas behind one address. No stage of dvc.yaml.

pip install 'ray[serve]', then on the head node: serve run pipeline.serve_ray:app replicas=4 model=models/release
"""

import os
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from ray import serve
from starlette.applications import Starlette

from pipeline import config
from pipeline.serve import KEY, ServeConfig, start_engine
from pipeline.serving.app import Limits, Server

ROOT = Path(__file__).parents[1]


def application(cfg: ServeConfig, tools: Path, replicas: int) -> serve.Application:
    """Each replica has `serve.threads` cores to itself, and a queue of its own that Ray does not fill to the brim."""

    def build() -> Starlette:
        limits = Limits(cfg.body_bytes, cfg.read_timeout_s, cfg.request_timeout_s, cfg.max_new_tokens)
        engine = start_engine(tools, cfg)
        return Server(engine, cfg.name, limits, os.environ.get(KEY), cfg.log_contents).app()

    @serve.deployment(
        name="tool-caller",
        num_replicas=replicas,
        max_ongoing_requests=cfg.queue_length,
        graceful_shutdown_timeout_s=cfg.drain_timeout_s,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": cfg.threads},
    )
    @serve.ingress(build)
    class Replica:
        """The server of pipeline.serve, started by Ray."""

    return Replica.bind()


def app(arguments: dict[str, str]) -> serve.Application:
    """`serve run` calls this with its arguments: replicas, model."""
    raw = OmegaConf.load(ROOT / "params.yaml")
    settings = OmegaConf.merge(OmegaConf.structured(ServeConfig), raw.serve)  # type: ignore[union-attr]
    cfg = cast(ServeConfig, OmegaConf.to_object(settings))
    cfg.model = Path(arguments.get("model", cfg.model)).absolute()
    config.require_range("replicas", int(arguments.get("replicas", "2")), 1, 10_000)
    return application(cfg, ROOT / "data/tools.json", int(arguments.get("replicas", "2")))
