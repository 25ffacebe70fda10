"""make peers with scripts in place of the real peers: nothing is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, files, peers
from pipeline.bench import side_by_side
from pipeline.benchmark import BenchmarkConfig
from pipeline.peers import LeftOutError, Peer, PeersConfig, Scored, Workshop, run
from pipeline.runtime.generation import ALL
from pipeline.toolcall.conversation import parse_request
from pipeline.toolcall.tokenizer import Tokenizer

TOOL = {
    "name": "Read",
    "description": "Read a file.",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string", "x-copy": "path"}},
        "required": ["path"],
    },
}
RIGHT = "<tool_call>Read\npath = a.py"
KEYS = {  # DESIGN.md
    *("version", "weights", "model_bytes", "exact_call_fraction", "call_s"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "calls_per_s_at_20"),
}
BENCHMARK = BenchmarkConfig("cpu", 1, 0, 2, 0.0, [1], 1, 1, 1, 0.0, 1, 4)
# Says what WORK's "model", a file of tokens, says; or nothing but an error.
ECHO = """
import json, harness
class Echo:
    version, build, prefix_cache, grammar = "1.0", "none", True, False
    def __init__(self, work):
        self.tokens = json.load(open(work["model"]))
    def reply(self, asked):
        return harness.Reply(self.tokens, 0.1, 0.3)
    def many(self, asked, clients):
        return 0.5 * len(asked)
harness.main(Echo)
"""


def request(name: str = "Read") -> dict[str, Any]:
    expected = {"name": name, "arguments": {"path": "a.py"}}
    messages = [{"role": "user", "content": "Show a.py"}]
    return {"id": "1", "category": name, "messages": messages, "tools": [TOOL], "expected": expected}


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> config.Paths:
    scripts, models = tmp_path / "scripts", tmp_path / "models"
    files.write_text(scripts / "echo.py", ECHO)
    files.write_text(scripts / "broken.py", "raise SystemExit('no such library')")
    files.write_text(scripts / "harness.py", (peers.SCRIPTS / "harness.py").read_text())
    models.mkdir()
    (models / "tuned").symlink_to(tiny_base, target_is_directory=True)
    files.write_jsonl(tmp_path / "test.jsonl", [request()])
    files.write_json(tmp_path / "tools.json", [TOOL])
    monkeypatch.setattr(peers, "SCRIPTS", scripts)
    monkeypatch.setattr(peers, "FOLDERS", {"torch-fp32": "tuned"})
    monkeypatch.setattr(Workshop, "model", lambda _self, _peer, weights: tmp_path / f"{weights}.json")
    return config.Paths(tmp_path / "tools.json", tmp_path, tmp_path, tmp_path, models, tmp_path / "reports")


def test_report_has_the_keys_others_read_and_says_who_is_left_out_and_why(
    paths: config.Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokenizer(paths.models / "tuned").encode(RIGHT)
    files.write_json(tmp_path / "right.json", tokens)
    monkeypatch.setattr(
        peers,
        "PEERS",
        {
            "same": Peer("echo", "right", "ours"),
            "other-model": Peer("echo", "right", "right"),
            "broken": Peer("broken", "right", "right"),
        },
    )
    measured = Workshop.measure

    def remember(self: Workshop, script: Sequence[str], work: dict[str, Any]) -> dict[str, Any]:
        found = measured(self, script, work)
        if script[-1] == "pipeline.peer.run_ours":  # what "same" says with weights in full precision
            files.write_json(tmp_path / "ours.json", found["replies"][0]["tokens"])
        return found

    monkeypatch.setattr(Workshop, "measure", remember)
    report = run(paths, ALL, BENCHMARK, PeersConfig(list(peers.PEERS), tmp_path, None, 1, 0.9))
    assert files.read_json(paths.reports / "peers.json") == report
    assert report["peers"].keys() == {"same"}
    same = report["peers"]["same"]
    assert same.keys() >= KEYS
    assert report["ours"]["torch-fp32"].keys() >= KEYS
    assert (same["exact_call_fraction"], same["same_reply_fraction"]) == (1.0, 1.0)
    assert same["call_s"]["p50"] == 0.3
    assert same["decode_tokens_per_s"] == pytest.approx((len(tokens) - 1) / 0.2)
    assert same["calls_per_s_at_20"] == pytest.approx(2.0)  # half a second each
    assert report["left_out"] == {
        "other-model": "with right weights 0% of its replies are torch-fp32's, under 90%",
        "broken": "broken.py ended with 1: no such library",
    }
    page = (paths.reports / "peers.md").read_text()
    assert "- broken: broken.py ended with 1: no such library" in page
    assert (paths.reports / "peers.png").exists()


def test_a_reply_is_scored_as_ours_are(tiny_base: Path) -> None:
    tokenizer = Tokenizer(tiny_base)
    scored = Scored([parse_request(request(), (), "here")] * 2, tokenizer)
    replies = [
        {"tokens": [*tokenizer.encode(text), tokenizer.eos_token_id], "first_token_s": 0.1, "total_s": 0.2}
        for text in (RIGHT, "<tool_call>Read\npath = b.py")
    ]
    found = scored.figures({"replies": replies, "calls_per_s_many": 3.0})
    assert found["exact_call_fraction"] == 0.5
    assert found["calls_per_s_at_20"] == 3.0


def test_without_a_compiler_llama_cpp_is_left_out(
    paths: config.Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(LeftOutError, match=r"no C\+\+ compiler was found"):
        Workshop(paths, tmp_path / "environments").python(Peer("run_llama_cpp", "Q8_0", "F32", peers.LLAMA_CPP))
    assert not (tmp_path / "environments").exists()


def test_where_a_peer_is_better_the_page_says_so() -> None:
    ours = {"call_s": {"p50": 0.1, "p95": 0.2}, "prefill_tokens_per_s": 50.0, "decode_tokens_per_s": 10.0}
    ours |= {"calls_per_s_at_20": 4.0, "model_bytes": 1e6, "peak_rss_bytes": 2e6, "load_s": 1.0}
    theirs = ours | {"call_s": {"p50": 0.3, "p95": 0.2}, "prefill_tokens_per_s": 100.0}
    lines = side_by_side.best({"ours": {"int8": ours}, "peers": {"llama.cpp": theirs}})
    assert lines[0] == "- p50 ms: int8 100, llama.cpp 300: 3.00 times better"
    assert lines[2] == "- prefill tokens/s: int8 50, llama.cpp 100: **the peer is 2.00 times better**"


def test_peers_that_are_less_right_are_not_compared() -> None:
    ours = {"int8": {"exact_call_fraction": 0.8, "call_s": {"p50": 0.1}}}
    peers = {
        "fast": {"exact_call_fraction": 0.7, "call_s": {"p50": 0.05}},
        "right": {"exact_call_fraction": 0.8, "call_s": {"p50": 0.3}},
    }
    lines = side_by_side.as_right({"ours": ours, "peers": peers})
    assert lines == ["- int8, 80.0% exact, 100 ms: right, 300 ms: 3.00 times our time"]
    del peers["right"]
    assert side_by_side.as_right({"ours": ours, "peers": peers}) == ["- int8, 80.0% exact, 100 ms: none"]


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"peers\.names must be one of .*llama\.cpp-Q8_0.*, got 'vllm'"):
        PeersConfig(["vllm"], Path(), None, 1, 0.9)
