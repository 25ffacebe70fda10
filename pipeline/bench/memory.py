"""Peak memory of a process that only makes calls: python -m pipeline.bench.memory < asked.json

A process of its own, so that neither the measuring program's libraries nor an earlier model count.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.runtime.caller import ToolCaller
from pipeline.runtime.fixed import peak_rss_bytes
from pipeline.runtime.generation import Techniques
from pipeline.toolcall.conversation import Request, parse_request


def peak_of_calls_bytes(model: dict[str, Any], requests: Sequence[Request], max_new_tokens: int) -> int:
    """Peak resident memory of a process that loads `model` and answers `requests`, one after the other.

    `model`: arguments of ToolCaller.load. Raises RuntimeError with the process's stderr if it fails.
    """
    asked = {
        "model": {**model, "techniques": asdict(model["techniques"])},
        "requests": [request.to_json() for request in requests],
        "max_new_tokens": max_new_tokens,
    }
    command = [sys.executable, "-m", "pipeline.bench.memory"]
    given = json.dumps(asked, default=str)  # str: paths
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}, {model['folder']}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main(asked: dict[str, Any]) -> int:
    model, limit = asked["model"], asked["max_new_tokens"]
    requests = [parse_request(value, (), f"requests[{at}]") for at, value in enumerate(asked["requests"])]
    caller = ToolCaller.load(**{**model, "techniques": Techniques(**model["techniques"])})
    for request in requests:
        if caller.fits(request.messages, request.tools, limit):
            caller.reply(request.messages, request.tools, limit)
    return peak_rss_bytes()


if __name__ == "__main__":
    print(main(json.load(sys.stdin)))  # noqa: T201
