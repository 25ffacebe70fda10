from pathlib import Path

import pytest

from pipeline import files
from pipeline.toolcall.requests import read_requests
from pipeline.toolcall.tool import parse_tools

TOOLS = parse_tools([{"name": "book", "parameters": {"type": "object"}}], "tools")
LINE = {"id": "a", "category": "none", "messages": [{"role": "user", "content": "hi"}], "expected": None}


def test_read_requests_names_the_line_of_a_twin(tmp_path: Path) -> None:
    files.write_jsonl(tmp_path / "r.jsonl", [LINE, LINE])
    with pytest.raises(ValueError, match=r"r\.jsonl:2: id: 'a' stands in the file twice"):
        read_requests(tmp_path / "r.jsonl", ())


def test_read_requests_names_the_line_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("{nope\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.jsonl:1: not JSON"):
        read_requests(tmp_path / "r.jsonl", ())


def test_read_requests_takes_at_most_so_many_evenly_spaced(tmp_path: Path) -> None:
    files.write_jsonl(tmp_path / "r.jsonl", [LINE | {"id": str(at)} for at in range(6)])
    assert [request.id for request in read_requests(tmp_path / "r.jsonl", TOOLS, 3)] == ["0", "2", "4"]
    assert len(read_requests(tmp_path / "r.jsonl", TOOLS, 9)) == 6


def test_read_requests_refuses_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(ValueError, match=r"r\.jsonl: holds no request"):
        read_requests(tmp_path / "r.jsonl", TOOLS)
