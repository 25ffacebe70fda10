"""How the server listens."""

from pathlib import Path

import pytest
import uvicorn
import yaml

from pipeline import serve
from pipeline.runtime.generation import ALL
from pipeline.serving.engine import Engine

ROOT = Path(__file__).parents[2]
LOAD_BALANCER_IDLE_S = 60  # of nginx and AWS's


def test_connections_outlive_those_of_load_balancers(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn closes an idle one after 5 s: a request that a load balancer sends meanwhile is lost."""
    asked: list[uvicorn.Config] = []

    class Listening:
        def __init__(self, settings: uvicorn.Config, *_: object) -> None:
            asked.append(settings)

        def run(self) -> None:
            pass

    def no_model() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(serve, "DrainingServer", Listening)
    monkeypatch.setattr(serve, "start_engine", lambda *_: Engine(no_model, 1, 1))  # type: ignore[arg-type]
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["serve"]
    serve.run(ROOT / "data/tools.json", ALL, serve.ServeConfig(**values), None)
    assert asked[0].timeout_keep_alive > LOAD_BALANCER_IDLE_S
