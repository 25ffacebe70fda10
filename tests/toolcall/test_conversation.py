from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.toolcall.conversation import parse_request
from pipeline.toolcall.tool import parse_tools

ROOT = Path(__file__).parents[2]
TOOLS = parse_tools(files.read_json(ROOT / "data/tools.json"), "data/tools.json")
GOOD: dict[str, Any] = {
    "id": "r1",
    "category": "Read",
    "messages": [{"role": "user", "content": "show a.py"}],
    "expected": {"name": "Read", "arguments": {"file_path": "a.py"}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "x:1: id: expected a text"),
        ({"messages": []}, "x:1: messages: expected a list"),
        ({"messages": [{"role": "king", "content": ""}]}, "x:1: messages: expected role user"),
        ({"expected": {"name": "Fly", "arguments": {}}}, "no tool 'Fly' among"),
        ({"expected": {"name": "Read", "arguments": {}}}, "does not fit the schema of Read"),
        ({"expected": 3}, "x:1: expected: needs name and arguments"),
        ({"category": "Grep"}, "x:1: category: expected 'Read', got 'Grep'"),
        ({"accept": [{"file_path": ["b.py"]}]}, "the expected call itself fits none"),
        ({"accept": [{"file_path": "b.py"}]}, "expected a list of values"),
    ],
)
def test_parse_request_names_the_field_at_fault(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_request(GOOD | change, TOOLS, "x:1")


def test_request_survives_the_way_to_json_and_back() -> None:
    request = parse_request(GOOD, TOOLS, "x:1")
    assert parse_request(request.to_json(), (), "y:1") == request


@pytest.mark.parametrize(("name", "least"), [("test", 60), ("validation-hand", 40)])
def test_hand_written_requests_keep_the_format(name: str, least: int) -> None:
    path = ROOT / f"data/requests/{name}.jsonl"
    requests = [parse_request(value, TOOLS, where) for where, value in files.read_jsonl(path)]
    assert len({request.id for request in requests}) == len(requests)
    categories = [request.category for request in requests]
    assert {name: categories.count(name) for name in set(categories)} == dict.fromkeys(
        ("Read", "Write", "Edit", "Bash", "Grep", "Glob", "none"), least
    )


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "at least one tool"),
        ([{"parameters": {}}], "needs a name and parameters"),
        ([{"name": "A", "parameters": {"type": "thing"}}], "no JSON schema"),
        ([{"name": "A", "parameters": {"type": "object"}}] * 2, "named twice"),
    ],
)
def test_parse_tools_refuses(tools: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tools(tools, "tools.json")
