import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.prepare import (
    Phrasing,
    PrepareConfig,
    add_noise,
    conversation_of,
    make,
    read_phrasings,
    read_slots,
    run,
    split,
    words,
)
from pipeline.toolcall.conversation import parse_request
from pipeline.toolcall.tool import parse_tools

ROOT = Path(__file__).parents[1]
CFG = PrepareConfig(0, 400, 0.15, 0.2, 0.1, 0.1, 0.1, 0.2, 0.25, 0.15)

NO_LATER = {"test-later": 0, "validation-hand-later": 0}


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


def test_requests_to_train_on_need_a_call_or_a_reply(tmp_path: Path) -> None:
    """The training stopped at the first."""
    line = {"id": "a", "category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None}
    lines = [line | {"id": str(n), "messages": [{"role": "user", "content": f"hi {n}"}]} for n in range(50)]
    files.write_jsonl(tmp_path / "own.jsonl", lines)
    with pytest.raises(ValueError, match=r"own\.jsonl: to train on requests without a right call, they need a reply"):
        run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)


def test_some_requests_come_behind_what_has_nothing_to_do_with_them() -> None:
    tools = parse_tools(files.read_json(ROOT / "data/tools.json"), "tools.json")
    slots: dict[str, list[str | dict[str, Any]]] = {"n": [str(n) for n in range(10_000)]}
    call = {"name": "Read", "arguments": {"file_path": "{{n}}"}}
    first = {"role": "user", "content": "read {{n}}"}
    shown = {"role": "assistant", "content": "<tool_call>" + json.dumps(call) + "</tool_call>"}
    single = {"id": "a", "category": "Read", "messages": [first], "expected": call}
    done = {"id": "b", "category": "none", "messages": [first, shown, {"role": "tool", "content": "ok"}]}
    phrasings = [Phrasing("a:1", single), Phrasing("b:1", done | {"expected": None, "reply": "All of {{n}}."})]
    cfg = replace(CFG, later_fraction=0.25, history_fraction=0.5, varied_tools_fraction=0)
    test = parse_request(single | {"messages": [{"role": "user", "content": "read 7"}]}, tools, "test")
    taken = {conversation_of(test)}
    made = make(phrasings, slots, tools, cfg, (2000, random.Random(0), taken))
    lengths = Counter(len(request.messages) for request in made)
    # a quarter are later ones of their own (3 messages), half of the others have one of them and its answer before
    assert 0.2 < lengths[3] / 2000 < 0.3
    assert 0.33 < lengths[5] / 2000 < 0.42
    behind = next(request for request in made if len(request.messages) == 5)
    number = behind.messages[0]["content"].removeprefix("read ")
    assert behind.messages[3] == {"role": "assistant", "content": f"All of {number}."}
    assert behind.expected is not None
    assert behind.messages[4]["content"] == f"read {behind.expected.arguments['file_path']}"
    assert not any(request.messages[-1]["content"] == "read 7" for request in made)
    assert len({conversation_of(request) for request in made}) == 2000


def test_few_phrasings_with_a_history_are_all_trained_on() -> None:
    """They were refused, in folders that had worked before later ones were a kind of their own."""
    turn = {"role": "user", "content": "x"}
    single = [Phrasing("x:1", {"category": "Read", "expected": {}, "messages": [turn]})] * 40
    later = [Phrasing("x:2", {"category": "Read", "expected": {}, "messages": [turn] * 3})] * 8
    held_out, kept = split([*single, *later], 0.05, random.Random(0))
    assert (len(held_out), len(kept)) == (2, 46)


def test_split_refuses_too_few_phrasings() -> None:
    with pytest.raises(ValueError, match="leave a part empty"):
        split([Phrasing("x:1", {"category": "Read", "messages": []})], 0.15, random.Random(0))


def test_run_shares_no_text_between_splits(tmp_path: Path) -> None:
    metrics = run(ROOT / "data/tools.json", ROOT / "data/requests", tmp_path / "out", tmp_path / "prepare.json", CFG)
    hand = {"test": 420, "test-later": 105, "validation-hand": 280, "validation-hand-later": 105}
    assert metrics["requests"] == {"train": 340, "validation": 60} | hand
    assert metrics["overlap"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "test-later.jsonl",
        "validation-hand.jsonl",
        "validation-hand-later.jsonl",
    }


def test_setting_out_of_range_names_key_and_range() -> None:
    with pytest.raises(ValueError, match=r"prepare\.validation_fraction must lie in \[0.01, 0.5\], got 0.9"):
        PrepareConfig(0, 400, 0.9, 0.2, 0.1, 0.1, 0.1, 0.2, 0.25, 0.15)


def test_a_single_file_of_requests_is_split_without_overlap(tmp_path: Path) -> None:
    line = {"category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None, "reply": "Hello."}
    lines = [line | {"id": str(n), "messages": [{"role": "user", "content": f"hi {n % 40}"}]} for n in range(50)]
    files.write_jsonl(tmp_path / "own.jsonl", lines)
    metrics = run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)
    assert metrics["requests"] == {"train": 22, "validation": 6, "test": 8, "validation-hand": 4} | NO_LATER
    assert metrics["own_requests"] == {"read": 50, "dropped": 10}
    assert metrics["overlap"] == 0
    files.write_jsonl(tmp_path / "own.jsonl", lines[:3])
    with pytest.raises(ValueError, match="3 different requests, which begin in 3 ways, leave these parts empty"):
        run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)


def conversation(first: str, results: int, **more: Any) -> dict[str, Any]:
    """An agent's log of one turn: what the user asked for, then `results` calls, each answered with "ok"."""
    messages = [{"role": "user", "content": first}]
    for at in range(results):
        call = {"type": "function", "function": {"name": "Read", "arguments": json.dumps({"file_path": f"{at}.py"})}}
        messages += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok"}]  # type: ignore[dict-item]
    return {"messages": [*messages, {"role": "assistant", "content": "Done."}], **more}


def test_turns_of_an_agent_are_kept_and_stand_in_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that ended with a tool's "ok" were taken for one request, and dropped without a word."""
    lines = [conversation(f"task {n}", results) for n in range(20) for results in range(3)]
    files.write_jsonl(tmp_path / "own.jsonl", [*lines, lines[0]])
    metrics = run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)
    # 20 conversations: 4 to test, 2 to validation-hand, 3 to validation, 11 to train, of three requests each
    assert metrics["requests"] == {"train": 33, "validation": 9, "test": 12, "validation-hand": 6} | NO_LATER
    assert metrics["own_requests"] == {"read": 61, "dropped": 1}
    assert metrics["overlap"] == 0
    begun = [
        {value["messages"][0]["content"] for _, value in files.read_jsonl(path)}
        for path in (tmp_path / "out").iterdir()
    ]
    assert sum(map(len, begun)) == len(set().union(*begun)) == 20
    assert "own.jsonl: 1 of 61 requests dropped: the same conversation comes again" in caplog.text


def test_calls_that_the_grammar_can_never_make_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = ["a.py"] * 19 + ["b.py"]
    lines = [
        {"id": f"{n}", "category": "Read", "messages": [{"role": "user", "content": f"Show a.py, {n}"}]}
        | {"expected": {"name": "Read", "arguments": {"file_path": path}}}
        for n, path in enumerate(paths)
    ]
    files.write_jsonl(tmp_path / "own.jsonl", lines)
    run(ROOT / "data/tools.json", tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)
    assert "1 right calls can never be made" in caplog.text
    assert "request 19" in caplog.text


@pytest.mark.parametrize("field", ["id", "category", "messages", "expected"])
def test_phrasing_without_a_field_is_named(tmp_path: Path, field: str) -> None:
    """Without id, messages or expected it was a KeyError that named nothing."""
    whole = {"id": "a", "category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None}
    files.write_jsonl(tmp_path / "a.jsonl", [whole, {key: whole[key] for key in whole if key != field}])
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {field}: missing"):
        read_phrasings(tmp_path)
    files.write_jsonl(tmp_path / "a.jsonl", [whole | {"messages": []}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: messages: expected a list"):
        read_phrasings(tmp_path)
    files.write_jsonl(tmp_path / "a.jsonl", [whole | {"reply": "On {{day2}}."}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: \{\{day2\}\} is no slot"):
        read_phrasings(tmp_path)


def test_slot_file_that_no_slot_can_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "day2.txt").write_text("monday\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a slot's name is of a-z and _, got files named \['day2'\]"):
        read_slots(tmp_path)
    (tmp_path / "day2.txt").rename(tmp_path / "day.txt")
    (tmp_path / "day.txt").write_text("{{Next}} monday\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"slot day: \{\{Next\}\} is no slot"):
        read_slots(tmp_path)


def own_tools(folder: Path, **parameters: Any) -> Path:
    properties = {name: {"type": "string"} for name in ("title", "what")}
    tool = {"name": "add", "parameters": {"type": "object", "properties": properties} | parameters}
    files.write_json(folder / "tools.json", [tool])
    return folder / "tools.json"


def own_requests(folder: Path, *titles: str) -> Path:
    lines = [
        {
            "id": title,
            "category": "add",
            "messages": [{"role": "user", "content": f"add {title}"}],
            "expected": {"name": "add", "arguments": {"title": title}},
        }
        for title in titles
    ]
    files.write_jsonl(folder / "own.jsonl", lines)
    return folder / "own.jsonl"


def test_a_tool_that_the_grammar_cannot_hold_is_refused(tmp_path: Path) -> None:
    """It was found after the training, when the first request was to be answered."""
    tools = own_tools(tmp_path, allOf=[{"properties": {"day": {"type": "string"}}}])
    with pytest.raises(ValueError, match=r"tools\.json: tool add: "):
        run(tools, own_requests(tmp_path, *"abcdefghij"), tmp_path / "out", tmp_path / "prepare.json", CFG)
    theirs = [{"function": {**tool, "name": "theirs"}} for tool in files.read_json(tools)]
    lines = [conversation(f"task {n}", 0, tools=theirs) for n in range(10)]
    files.write_jsonl(tmp_path / "own.jsonl", lines)
    with pytest.raises(ValueError, match=r"own\.jsonl: \w+: request line-\d+: tool theirs: "):
        run(own_tools(tmp_path), tmp_path / "own.jsonl", tmp_path / "out", tmp_path / "prepare.json", CFG)


def test_a_call_that_the_model_cannot_write_is_refused(tmp_path: Path) -> None:
    """A title that goes on in a line like the next argument's: training or what follows it stopped there."""
    requests = own_requests(tmp_path, *"abcdefghi", "x\nwhat: y")
    with pytest.raises(ValueError, match=r"own\.jsonl: [\w-]+: request x\nwhat: y: expected: the model cannot write"):
        run(own_tools(tmp_path), requests, tmp_path / "out", tmp_path / "prepare.json", CFG)
    assert not (tmp_path / "out").exists()
