from pathlib import Path

import pytest

from pipeline import files
from pipeline.bench.memory import peak_of_calls_bytes
from pipeline.runtime.generation import PLAIN
from pipeline.toolcall.conversation import parse_request

ROOT = Path(__file__).parents[2]
MANY = "x " * 4000  # does not fit the context


def test_peak_is_that_of_a_process_that_makes_the_calls(tiny_fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = {
        "folder": tiny_fused,
        "tools": ROOT / "data/tools.json",
        "device": "cpu",
        "threads": 1,
        "techniques": PLAIN,
    }
    tools = files.read_json(ROOT / "data/tools.json")
    asked = {"id": "1", "category": "none", "expected": None, "tools": tools}
    requests = [
        parse_request({**asked, "messages": [{"role": "user", "content": text}]}, (), "x") for text in (MANY, "show a")
    ]
    here = bytearray(300_000_000)
    here[::4096] = b"x" * len(here[::4096])  # what this process holds does not count
    assert 30e6 < peak_of_calls_bytes(model, requests, 4) < 250e6
    with pytest.raises(RuntimeError, match=r"(?s)pipeline\.bench\.memory, nowhere: .*nowhere holds no model"):
        peak_of_calls_bytes({**model, "folder": Path("nowhere")}, requests, 4)
