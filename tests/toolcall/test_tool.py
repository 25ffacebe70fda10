"""Schemas that clients bring must not harm the server."""

import time
from typing import Any

import pytest

from pipeline.toolcall.tool import Tool


def tool(**more: Any) -> Tool:
    return Tool("Go", "", {"type": "object", "properties": {"x": {"type": "string"}}, **more})


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/x", "file:///etc/hostname", "#/$defs/missing", "#"])
def test_nothing_is_fetched_or_followed_without_end(reference: str) -> None:
    with pytest.raises(ValueError, match="tool Go: its parameters refer to nothing, or to themselves"):
        tool(**{"not": {"$ref": reference}}).fault({})


@pytest.mark.parametrize(
    "evil",
    [
        {"not": {"properties": {"x": {"pattern": "^(a|a)+$"}}, "required": ["y"]}},
        {"not": {"patternProperties": {"^(a|a)+$": {}}, "additionalProperties": False, "required": ["y"]}},
        {"patternProperties": {"^(a|a)+$": {}}, "unevaluatedProperties": False},
    ],
)
def test_no_expression_of_a_client_s_is_searched_for(evil: dict[str, Any]) -> None:
    """One that takes a millionfold time would stop all threads, for Python's `re` holds the lock."""
    start = time.perf_counter()
    assert tool(**evil).fault({"x": "a" * 40 + "!", "a" * 40 + "!": 1}) is None
    assert time.perf_counter() - start < 5


def test_other_arguments_are_refused_where_the_schema_says_so() -> None:
    assert tool(additionalProperties=False).fault({"y": 1}) == (
        "$: Additional properties are not allowed ('y' was unexpected)"
    )
