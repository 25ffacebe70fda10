import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, files
from pipeline.score import ScoreConfig, run

ROOT = Path(__file__).parents[1]
CALL = {"name": "Read", "arguments": {"file_path": "a.py"}}
REQUESTS: list[dict[str, Any]] = [
    {"id": "r1", "category": "Read", "messages": [{"role": "user", "content": "Show a.py"}], "expected": CALL},
    {"id": "r2", "category": "Read", "messages": [{"role": "user", "content": "Open a.py"}], "expected": CALL},
    {"id": "n1", "category": "none", "messages": [{"role": "user", "content": "Thanks!"}], "expected": None},
]


def scored(folder: Path, replies: list[Any], reference: tuple[str, ...] = ()) -> dict[str, Any]:
    files.write_jsonl(folder / "test.jsonl", REQUESTS)
    files.write_jsonl(folder / "other.jsonl", replies)
    paths = config.Paths(ROOT / "data/tools.json", *(folder / name for name in ("", "", "", "", "reports")))
    if reference:
        rows = [
            {"id": value["id"], "request": value["messages"][0]["content"], "outcome": outcome}
            for value, outcome in zip(REQUESTS, reference, strict=True)
        ]
        files.write_jsonl(paths.reports / "evaluate/int8.replies.jsonl", rows)
    return run(paths, ScoreConfig(folder / "other.jsonl", folder / "test.jsonl"))


def test_calls_of_another_model_are_scored_as_ours(tmp_path: Path) -> None:
    wrong = {"name": "Read", "arguments": {"file_path": "b.py"}}
    replies = [{"id": "n1", "call": None}, {"id": "r2", "call": wrong}, {"id": "r1", "call": CALL}]
    found = scored(tmp_path, replies, ("exact", "exact", "exact"))
    assert found["exact_call_fraction"] == pytest.approx(2 / 3)
    assert found["outcomes"] == {"exact": 2, "wrong_arguments": 1}
    assert found["by_category"]["Read"] == {"n": 2, "exact_call_fraction": 0.5}
    assert found["mcnemar_p_vs"] == {"int8": 1.0}  # one request differs
    assert json.loads((tmp_path / "other.scores.json").read_text()) == found


def test_file_of_replies_has_to_be_named(tmp_path: Path) -> None:
    paths = config.Paths(*[tmp_path] * 6)
    with pytest.raises(ValueError, match=r"score.replies: name the file"):
        run(paths, ScoreConfig(None, tmp_path))


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([{"id": "r1", "call": CALL}], r"no reply to 2 of 3 requests: \['n1', 'r2'\]"),
        ([{"id": "r9", "call": None}], r"other.jsonl:1: id: 'r9' is of no request"),
        ([{"id": "r1", "call": None}, {"id": "r1", "call": None}], r"other.jsonl:2: id: 'r1' was there before"),
        ([{"id": "r1"}], r"other.jsonl:1: expected an id, and a call with name and arguments or null"),
        ([{"id": "r1", "call": {"name": "Read", "arguments": "{}"}}], r"other.jsonl:1: expected an id"),
    ],
)
def test_replies_that_are_not_those_to_the_requests_are_refused(
    tmp_path: Path, replies: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, replies)
