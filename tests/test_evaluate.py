import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import config, files
from pipeline.evaluate import Params, compare, different, run
from pipeline.runtime.generation import ALL

ROOT = Path(__file__).parents[1]
TOOL = {"name": "Read", "parameters": {"type": "object", "properties": {"file_path": {"type": "string"}}}}
RULE = {"tool": "Read", "words": "show", "arguments": {"file_path": r"(\w+\.py)"}}


@pytest.fixture
def paths(tmp_path: Path) -> config.Paths:
    files.write_json(tmp_path / "tools.json", [TOOL])
    names = ("tools.json", "rules.json", "requests", "prepared", "models", "reports")
    return config.Paths(*(tmp_path / name for name in names))


def score(paths: config.Paths, variant: str, *lines: dict[str, Any]) -> dict[str, Any]:
    raw = OmegaConf.merge(OmegaConf.load(ROOT / "params.yaml"), OmegaConf.load(ROOT / "tests/smoke.yaml"))
    cfg = config.load(raw, Params).evaluate  # type: ignore[arg-type]
    cfg.requests = paths.reports / "own.jsonl"
    files.write_jsonl(cfg.requests, lines)
    out = paths.reports / f"{variant}.json"
    return run(paths, out, variant, ALL, cfg) | {"provenance": files.read_json(out)["provenance"]}


def asked(text: str, file: str | None = None, **more: Any) -> dict[str, Any]:
    expected = {"name": "Read", "arguments": {"file_path": file}} if file else None
    messages = [{"role": "user", "content": text}]
    return {
        "id": text[:20],
        "category": "Read" if file else "none",
        "messages": messages,
        "expected": expected,
        **more,
    }


def logged(text: str, file: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "Read", "arguments": json.dumps({"file_path": file})}}
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [call]}]}


def test_a_file_of_both_forms_is_scored_and_twins_are_refused(paths: config.Paths) -> None:
    """Lines of OpenAI's form, of which prepare makes requests, were refused here."""
    files.write_json(paths.keywords, [RULE])
    found = score(paths, "keyword", asked("show a.py", "a.py"), logged("show b.py", "b.py"))
    assert (found["n"], found["exact_call_fraction"]) == (2, 1.0)
    with pytest.raises(ValueError, match=r"own\.jsonl:2: id: 'show a\.py' stands in the file twice"):
        score(paths, "keyword", asked("show a.py", "a.py"), asked("show a.py", "a.py"))


@pytest.mark.parametrize("rules", [None, [RULE | {"tool": "Grep"}]])
def test_without_a_rule_for_a_tool_on_offer_keyword_never_calls(
    paths: config.Paths, caplog: pytest.LogCaptureFixture, rules: Any
) -> None:
    """A set of tools without a file keywords.json beside it stopped the pipeline after its training."""
    if rules is not None:
        files.write_json(paths.keywords, rules)
    found = score(paths, "keyword", asked("show a.py", "a.py"), asked("thanks"))
    assert found["outcomes"] == {"silent": 1, "exact": 1}
    assert "rules.json: no rule for a tool on offer, so the keyword baseline never calls" in caplog.text


@pytest.mark.parametrize("variant", ["torch-fp32", "fused-fp32"])
def test_a_request_that_does_not_fit_the_context_is_wrong(
    paths: config.Paths, tiny_base: Path, tiny_fused: Path, caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    """It stopped the stage. torch-fp32 answers several requests together, fused-fp32 each alone."""
    paths.models.mkdir()
    (paths.models / "tuned").symlink_to(tiny_base, target_is_directory=True)
    (paths.models / "fused").symlink_to(tiny_fused, target_is_directory=True)
    long = "x" * 2000  # in a context of 2,048 bytes, with the prompt
    found = score(paths, variant, asked(f"chat {long}"), asked("show a.py", "a.py"), asked(f"show {long}", "a.py"))
    assert (found["n"], found["too_long"], found["outcomes"]["malformed"]) == (3, 2, 2)
    rows = [row for _, row in files.read_jsonl(paths.reports / f"{variant}.replies.jsonl")]
    assert [(row["outcome"], row["confidence"]) for row in rows[::2]] == [("malformed", 0.0)] * 2
    assert "do not fit the context: ['chat xxxxxxxxxxxxxxx', 'show xxxxxxxxxxxxxxx']" in caplog.text
    assert "too_long" not in score(paths, variant, asked("show a.py", "a.py"))


def opened(text: str, file: str) -> dict[str, Any]:
    call = json.dumps({"name": "Read", "arguments": {"file_path": "old.py"}})
    before = [
        {"role": "user", "content": "show old.py"},
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
        {"role": "tool", "content": "1\tx = 1"},
        {"role": "assistant", "content": "One line."},
    ]
    value = asked(text, file)
    return value | {"messages": [*before, *value["messages"]]}


def test_requests_later_in_a_conversation_are_scored_apart(paths: config.Paths) -> None:
    files.write_json(paths.keywords, [RULE])
    files.write_jsonl(paths.reports / "own-later.jsonl", [opened("show c.py", "c.py"), opened("and d.py", "d.py")])
    found = score(paths, "keyword", asked("show a.py", "a.py"), opened("show b.py", "b.py"))
    assert (found["n"], found["exact_call_fraction"]) == (2, 1.0)
    assert (found["later"]["n"], found["later"]["exact_call_fraction"]) == (3, 2 / 3)  # b.py, c.py and not d.py
    rows = [row for _, row in files.read_jsonl(paths.reports / "keyword.replies.jsonl")]
    assert [row["id"] for row in rows] == ["show a.py", "show b.py", "show c.py", "and d.py"]
    assert [row["apart"] for row in rows] == [False, False, True, True]
    assert found["later"]["apart"] == 2
    assert rows[2]["request"].startswith("user: show old.py\nassistant: <tool_call>")
    assert "later" in found["provenance"]["inputs_sha256"]
    with pytest.raises(ValueError, match=r"own-later\.jsonl: id: 'show c\.py' stands in .*own\.jsonl, too"):
        score(paths, "keyword", asked("show c.py", "c.py"))
    files.write_jsonl(paths.reports / "own-later.jsonl", [])
    assert "later" not in score(paths, "keyword", asked("show a.py", "a.py"))


def test_a_reference_that_was_asked_otherwise_under_the_same_ids_is_none(tmp_path: Path) -> None:
    """An edited request counted as won or lost by the variant."""
    rows = [{"id": f"r{n}", "request": f"find {n}", "outcome": "exact", "reply": "x", "changed": False} for n in "123"]
    files.write_jsonl(tmp_path / "replies.jsonl", [row | {"outcome": "silent", "reply": "y"} for row in rows])
    assert compare(tmp_path / "replies.jsonl", rows) == 0.25
    assert different(tmp_path / "replies.jsonl", rows) == ["r1", "r2", "r3"]
    edited = [rows[0] | {"request": "find one"}, *rows[1:]]
    assert compare(tmp_path / "replies.jsonl", edited) is None
    assert different(tmp_path / "replies.jsonl", edited) is None
