"""Requests that a tiny model is asked."""

import pytest

from pipeline.toolcall.conversation import Request, parse_request
from pipeline.toolcall.tool import parse_tools

TOOL = {"name": "Ask", "description": "", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}


@pytest.fixture(scope="session")
def apples() -> list[Request]:
    """Sixty that differ in a number, each with its call of one tool."""
    tools = parse_tools([TOOL], "tools")
    return [
        parse_request(
            {
                "id": str(n),
                "category": "Ask",
                "messages": [{"role": "user", "content": f"ask for {n} apples"}],
                "expected": {"name": "Ask", "arguments": {"what": f"{n} apples"}},
            },
            tools,
            "here",
        )
        for n in range(60)
    ]
