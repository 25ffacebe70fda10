from pathlib import Path

import pytest

from pipeline import files
from pipeline.model.agreement import parity
from pipeline.toolcall.conversation import Request
from pipeline.toolcall.tool import parse_tools

ROOT = Path(__file__).parents[2]


def asked(number: int, text: str) -> Request:
    tools = parse_tools(files.read_json(ROOT / "data/tools.json"), "tools.json")[:1]
    return Request(f"r{number}", "none", ({"role": "user", "content": text},), tools, None)


def test_requests_that_fit_no_context_are_left_out(tiny_base: Path, tiny_fused: Path) -> None:
    """One of an agent's log ended the export, after the training."""
    long = asked(1, "x" * 3000)
    found = parity(tiny_base, tiny_fused, [asked(0, "hi"), long, asked(2, "ho")], max_new_tokens=8)
    assert found["same_reply_fraction"] == 1
    assert found["max_logit_difference"] < 1e-3
    with pytest.raises(ValueError, match="none of 1 test requests to compare on fits its context"):
        parity(tiny_base, tiny_fused, [long], max_new_tokens=8)
