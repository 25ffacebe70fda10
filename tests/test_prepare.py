import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.prepare import Phrasing, PrepareConfig, add_noise, make, read_requests, run, split, words
from pipeline.toolcall.slots import Draw
from pipeline.toolcall.tool import parse_tools

ROOT = Path(__file__).parents[1]
CFG = PrepareConfig(0, 400, 0.15, 0.2, 0.1, 0.2, 0.25, 0.15)


def test_draw_is_the_same_within_a_request_and_another_with_a_number() -> None:
    slots = {"n": [{"v": n} for n in range(1000)]}
    filled = Draw(slots, random.Random(0), "x:1").fill(["{{n.v}}", "is {{n.v}}", "{{n#2.v}}"])
    assert filled[1] == f"is {filled[0]}"
    assert isinstance(filled[0], int)
    assert filled[2] != filled[0]


def test_draw_names_an_unknown_slot() -> None:
    with pytest.raises(ValueError, match="x:1: no slot 'path'"):
        Draw({}, random.Random(0), "x:1").fill("show {{path}}")


def test_noise_leaves_slots_whole() -> None:
    text = "Please Search {{dir}} for {{literal.text}} today."
    for seed in range(50):
        noisy = add_noise(text, random.Random(seed))
        assert re.findall(r"\{\{.*?\}\}", noisy) == ["{{dir}}", "{{literal.text}}"]


def test_noise_leaves_words_of_the_call_whole() -> None:
    kept = frozenset(words({"name": "Bash", "arguments": {"command": "Make lint", "timeout": 5}}))
    noisy = {add_noise("please run Make lint before merging", random.Random(seed), kept) for seed in range(50)}
    assert all("Make lint" in text for text in noisy)
    assert len(noisy) > 5


def test_noise_misspells_at_most_three_words() -> None:
    text = "please show where the numbers are checked before writing"
    noisy = {add_noise(text, random.Random(seed)) for seed in range(200)} - {text}
    changed = [sum(map(str.__ne__, text.split(), other.split())) for other in noisy]
    assert set(changed) == {1, 2, 3}


def test_noise_leaves_out_apostrophes_of_contractions_only() -> None:
    noisy = {add_noise("don't replace 'sum' with 'total' here.", random.Random(seed)) for seed in range(50)}
    assert "dont replace 'sum' with 'total' here" in noisy
    assert all(text.count("'") >= 4 for text in noisy)


def test_noise_leaves_the_last_mark_of_a_text_to_write() -> None:
    kept = frozenset(words({"name": "Write", "arguments": {"file_path": "a", "content": "All done."}}))
    assert all(
        add_noise("write to a: All done.", random.Random(seed), kept).endswith("All done.") for seed in range(50)
    )


def test_a_tool_with_sixteen_times_the_phrasings_gets_eight_times_the_requests() -> None:
    def asked(name: str, n: int) -> list[Phrasing]:
        call = {"name": name, "arguments": {"command" if name == "Bash" else "file_path": "x"}}
        template = {"category": name, "expected": call}
        return [
            Phrasing(
                f"{name}:{at}",
                {**template, "id": f"{name}-{at}", "messages": [{"role": "user", "content": f"x {{{{n}}}} {at}"}]},
            )
            for at in range(n)
        ]

    tools = parse_tools(files.read_json(ROOT / "data/tools.json"), "tools.json")
    slots: dict[str, list[str | dict[str, Any]]] = {"n": [str(n) for n in range(10_000)]}
    cfg = replace(CFG, none_fraction=0, foreign_fraction=0)
    made = make([*asked("Bash", 32), *asked("Read", 2)], slots, tools, cfg, (3000, random.Random(0), set()))
    assert 7 < Counter(r.category for r in made)["Bash"] / Counter(r.category for r in made)["Read"] < 9


def test_split_refuses_too_few_phrasings() -> None:
    with pytest.raises(ValueError, match="leave a part empty"):
        split([Phrasing("x:1", {"category": "Read"})], 0.15, random.Random(0))


def test_run_shares_no_text_between_splits(tmp_path: Path) -> None:
    metrics = run(ROOT / "data/tools.json", ROOT / "data/requests", tmp_path / "out", tmp_path / "prepare.json", CFG)
    assert metrics["requests"] == {"train": 340, "validation": 60, "test": 420, "validation-hand": 280}
    assert metrics["overlap"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "validation-hand.jsonl",
    }


def test_read_requests_names_the_line_of_a_twin(tmp_path: Path) -> None:
    line = {"id": "a", "category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None}
    files.write_jsonl(tmp_path / "r.jsonl", [line, line])
    with pytest.raises(ValueError, match=r"r\.jsonl:2: id: 'a' stands in the file twice"):
        read_requests(tmp_path / "r.jsonl", ())


def test_read_requests_names_the_line_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("{nope\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.jsonl:1: not JSON"):
        read_requests(tmp_path / "r.jsonl", ())


def test_setting_out_of_range_names_key_and_range() -> None:
    with pytest.raises(ValueError, match=r"prepare\.validation_fraction must lie in \[0.01, 0.5\], got 0.9"):
        PrepareConfig(0, 400, 0.9, 0.2, 0.1, 0.2, 0.25, 0.15)


def test_a_single_file_of_requests_is_split_without_overlap(tmp_path: Path) -> None:
    line = {"id": "a", "category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None}
    lines = [line | {"id": str(n), "messages": [{"role": "user", "content": f"hi {n % 40}"}]} for n in range(50)]
    files.write_jsonl(tmp_path / "own.jsonl", lines)
    metrics = run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)
    assert metrics["requests"] == {"train": 22, "validation": 6, "test": 8, "validation-hand": 4}
    assert metrics["own_requests"] == {"read": 50, "dropped": 10}
    assert metrics["overlap"] == 0
    files.write_jsonl(tmp_path / "own.jsonl", lines[:3])
    with pytest.raises(ValueError, match="3 different requests leave these parts empty"):
        run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)
