import json
import subprocess
from pathlib import Path

import pytest

from pipeline.bench.against import Read, changes, of_folder, of_revision


def run_of(exact: int, p50_s: float, model_bytes: int, cpu: str = "X", asked: str = "") -> Read:
    replies: list[dict[str, str | bool]] = [
        {"id": str(n), "request": f"{asked}{n}", "outcome": "exact" if n < exact else "silent"} for n in range(100)
    ]
    replies += [{"id": f"later {exact} {n}", "request": "", "outcome": "exact", "apart": True} for n in range(9)]
    outcome = "exact" if exact > 50 else "silent"
    replies += [{"id": f"later {n}", "request": "", "outcome": outcome, "apart": True} for n in range(9)]
    machine = {"provenance": {"machine": {"cpu": cpu}}}
    texts = {
        "evaluate/int8.replies.jsonl": "\n".join(map(json.dumps, replies)),
        "benchmark/int8.samples.json": json.dumps({"call_s": [p50_s * (0.9 + 0.01 * n) for n in range(21)]}),
        "benchmark/int8.json": json.dumps({"model_bytes": model_bytes, **machine}),
    }
    return texts.__getitem__


def by_measure(before: Read, now: Read, variants: list[str], significance: float) -> dict[str, dict[str, str]]:
    found = changes(before, now, variants, significance)
    return {row["measure"]: {str(key): str(value) for key, value in row.items()} for row in found.to_dict("records")}


def test_changes_beyond_noise_are_told_from_the_others() -> None:
    table = by_measure(run_of(50, 0.100, 1000), run_of(52, 0.050, 1000), ["int8"], 0.05)
    assert table["exact calls"]["change"] == "+2.0 points"
    assert table["exact calls"]["beyond noise"] == "no (McNemar p 0.500)"
    assert table["p50"]["change"].startswith("0.50x (0.4")
    assert table["p50"]["beyond noise"] == "yes"
    assert table["bytes"]["beyond noise"] == "no"
    table = by_measure(run_of(50, 0.1, 1000), run_of(60, 0.101, 900, "Y"), ["int8"], 0.05)
    assert table["exact calls"]["beyond noise"].startswith("yes")
    assert table["p50"]["beyond noise"] == "another machine"
    assert table["bytes"]["change"] == "-100"
    table = by_measure(run_of(50, 0.1, 1000), run_of(60, 0.1, 1000, asked="other words "), ["int8"], 0.05)
    assert table["exact calls"]["beyond noise"] == "no request in common"  # under the same ids


def test_a_revision_is_read_from_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.com"]
    reports = Path("reports")
    reports.mkdir()
    (reports / "a.json").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    (reports / "a.json").write_text("2")
    assert (of_revision(reports, "HEAD")("a.json"), of_folder(reports)("a.json")) == ("1", "2")
    with pytest.raises(ValueError, match=r"report\.against=nope: fatal"):
        of_revision(reports, "nope")("a.json")
