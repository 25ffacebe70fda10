"""The server as a process: started, loaded, stopped, killed."""

import asyncio
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline import config, files
from pipeline.load_test import LoadTestConfig, Served, overload, overrides, post
from pipeline.load_test import run as load_test
from pipeline.runtime.generation import ALL
from pipeline.serve import ServeConfig
from pipeline.serve import run as serve
from pipeline.toolcall.conversation import Request

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


def test_the_server_gets_every_setting(tmp_path: Path) -> None:
    """Threads and device were those of params.yaml, and of the command line in the process it was compared with."""
    cfg = replace(settings(tmp_path / "a, (b)=ü"), threads=7, device="cuda", name='a"b', read_timeout_s=0.5)
    parsed = OverridesParser.create().parse_overrides(overrides(cfg))
    assert {each.key_or_group: each.value() for each in parsed} == {
        f"serve.{key}": str(value) if key == "model" else value for key, value in asdict(cfg).items()
    }


def test_a_refusal_is_not_timed_as_a_reply() -> None:
    refuses = httpx.MockTransport(lambda _: httpx.Response(529))
    with httpx.Client(base_url="http://x", transport=refuses) as client, pytest.raises(httpx.HTTPStatusError):
        post(client, {})


def test_overload_where_nothing_is_accepted(tmp_path: Path) -> None:
    """The longest of no seconds was asked for, minutes into the test."""
    cfg = LoadTestConfig(1, 1, 3, 1, 1, 30)
    request = Request("r", "none", ({"role": "user", "content": "a"},), (), None)
    serve = settings(tmp_path)

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 529 Overloaded\r\n")

    async def asked() -> dict[str, Any]:
        async with await asyncio.start_server(refuse, "127.0.0.1", serve.port):
            return await overload(cast(Served, None), serve, cfg, [request])

    found = asyncio.run(asked())["overload"]
    assert (found["statuses"], found["accepted_longest_s"]) == ({"529": 3}, None)


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
    paths = config.Paths(ROOT / "data/tools.json", *[tmp_path] * 5)
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
