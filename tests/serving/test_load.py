"""The server as a process: started, loaded, stopped, killed."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline import config, files
from pipeline.load_test import LoadTestConfig
from pipeline.load_test import run as load_test
from pipeline.runtime.generation import ALL
from pipeline.serve import ServeConfig
from pipeline.serve import run as serve

ROOT = Path(__file__).parents[2]


def settings(model: Path) -> ServeConfig:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["serve"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ServeConfig(**values | {"model": model, "port": port, "queue_length": 8})


def test_address_that_others_reach_needs_a_key(tiny_fused: Path) -> None:
    with pytest.raises(ValueError, match=r"serve.host is 0.0.0.0, .* set TOOL_CALLER_API_KEY"):
        serve(ROOT / "data/tools.json", ALL, replace(settings(tiny_fused), host="0.0.0.0"), None)  # noqa: S104 - is refused


@pytest.mark.slow
def test_load_and_faults(tiny_fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tools = files.read_json(ROOT / "data/tools.json")
    rows = [
        {
            "id": f"r{number}",
            "category": "none",
            "messages": [{"role": "user", "content": f"hello {number}"}],
            "tools": tools,
            "expected": None,
        }
        for number in range(6)
    ]
    files.write_jsonl(tmp_path / "test.jsonl", rows)
    paths = config.Paths(ROOT / "data/tools.json", tmp_path, tmp_path, tmp_path, tmp_path)
    cfg = LoadTestConfig(
        clients=4, endurance_s=4, overload_clients=30, malformed_requests=40, overhead_requests=2, max_new_tokens=30
    )
    found = load_test(paths, tmp_path / "serving.json", settings(tiny_fused), cfg)
    assert found["requests"] > 4
    assert found["errors"] == 0
    assert found["malformed"]["answered_5xx"] == 0
    assert set(found["overload"]["statuses"]) <= {"200", "529"}
    assert found["overload"]["statuses"]["529"] > 0
    assert (found["drained_lost"], found["exit_code"]) == (0, 0)
    assert found["ready_after_kill_s"] < 30
    assert files.read_json(tmp_path / "serving.json")["requests"] == found["requests"]
