"""What is guessed of a call from how its request looks."""

import time
from pathlib import Path

import pytest

from pipeline import files
from pipeline.toolcall.draft import Drafter
from pipeline.toolcall.tokenizer import Tokenizer
from pipeline.toolcall.tool import parse_tools

TOOLS = parse_tools(files.read_json(Path("data/tools.json")), "data/tools.json")


@pytest.fixture
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer(tiny_base)


@pytest.mark.parametrize(
    ("request_text", "written", "expected"),
    [
        ("open src/app.py please.", "Read\nfile_path =", " src/app.py<end>"),
        ("open src/app.py please.", "Read\nfile_path = src", "/app.py<end>"),
        ("what is in ~/.config/x, and in .env?", "Read\nfile_path =", " ~/.config/x<end>"),
        (
            "In README.md `a b` should be `c`.",
            "Edit\nfile_path =",
            " README.md\nold_string = a b\nnew_string = c<end>",
        ),
        (
            "bump 1.4.9 to 1.5.0 in a/Chart.yaml",
            "Edit\nfile_path =",
            " a/Chart.yaml\nold_string = 1.4.9\nnew_string = 1.5.0<end>",
        ),
        ("rename tmpBuf to scratch in codec.zig", "Edit\nfile_path = codec.zig\nold_string", " = tmpBuf\nnew_string"),
        ('find "TODO" in lib/', "Grep\npattern", " = TODO\npath = lib/<end>"),
        ("find todo", "Grep\npattern", ""),  # nothing looks like a copy
        ("Show Makefile", "Read\nfile_path =", ""),
        ("Show a.py", "Read\nfile_path = b", ""),  # no copy begins so
        ("Show a.py", "Read", ""),  # a name that may go on
        ('write "x" to a.txt', "Write\nfile_path = a.txt\ncontent:", ""),  # words of the model's own
    ],
)
def test_guess_follows_what_the_request_looks_like(
    tokenizer: Tokenizer, request_text: str, written: str, expected: str
) -> None:
    end = tokenizer.eos_token_id
    tokens = tokenizer.encode(f"<tool_call>{written}")
    guessed = Drafter(tokenizer, TOOLS, request_text, end).after(tokens, 100)
    found = tokenizer.decode([token for token in guessed if token != end]) + ("<end>" if end in guessed else "")
    assert found == expected


@pytest.mark.parametrize("run", ["-", "+", ".", "a@", "a/", "~/"])
def test_a_long_run_of_anything_takes_no_time(tokenizer: Tokenizer, run: str) -> None:
    """Dashes took the square of their number: 20,000, which are 300 tokens, half a second."""
    start = time.perf_counter()
    Drafter(tokenizer, TOOLS, "read a.py " + run * 50_000, 0).after(tokenizer.encode("<tool_call>Read\nfile_path ="), 3)
    assert time.perf_counter() - start < 2


def test_guess_is_no_longer_than_allowed(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<tool_call>Read\nfile_path =")
    assert len(Drafter(tokenizer, TOOLS, "open src/app.py", 0).after(tokens, 3)) == 3
