"""The server as a Ray Serve application, on a cluster of two nodes."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from anthropic import Anthropic
from ray import serve
from ray.cluster_utils import Cluster

from pipeline.serve_ray import application

KEY = "a-key-of-this-test"
REPLICA = "ray::ServeReplica:default:tool-caller"


def replicas() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if " ".join(process.cmdline()).startswith(REPLICA)]


def wait_for_replicas(count: int, without: int = 0) -> None:
    end = time.monotonic() + 60
    while len([process for process in replicas() if process.pid != without]) < count:
        assert time.monotonic() < end, f"fewer than {count} replicas after a minute"
        time.sleep(0.2)


def test_a_cluster_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOOL_CALLER_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set TOOL_CALLER_API_KEY"):
        application({"ray.replicas": "2"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # Ray's settings
def test_a_killed_replica_loses_no_request(tiny_fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("TOOL_CALLER_API_KEY", KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(cluster.address)
        serve.start(http_options={"port": port})
        settings = {"serve.model": str(tiny_fused), "serve.threads": "1", "ray.replicas": "2"}
        serve.run(application(settings))
        wait_for_replicas(2)
        # its own answer to what a replica's end interrupts is 5xx, which Anthropic's client tries again
        client = Anthropic(base_url=f"http://127.0.0.1:{port}", api_key=KEY, max_retries=8)

        def ask(number: int) -> str:
            reply = client.messages.create(
                model="tool-caller", max_tokens=40, messages=[{"role": "user", "content": f"hello {number % 5}"}]
            )
            return reply.model_dump_json(include={"content"}, exclude={"content": {"__all__": {"id"}}})

        alone = [ask(number) for number in range(5)]
        done = threading.Semaphore(0)

        def ask_under_load(number: int) -> str:
            text = ask(number)
            done.release()
            return text

        with ThreadPoolExecutor(6) as clients:
            answers = [clients.submit(ask_under_load, number) for number in range(120)]
            for _ in range(20):
                done.acquire()
            killed = replicas()[0]
            killed.kill()
            assert [answer.result() for answer in answers] == [alone[number % 5] for number in range(120)]
        wait_for_replicas(2, without=killed.pid)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
