from typing import Any

import pytest

from pipeline.toolcall.keyword import keyword_call, parse_rules
from pipeline.toolcall.tool import Tool, ToolCall

RULE: dict[str, Any] = {"tool": "book", "words": r"\bbook\b", "arguments": {"day": r"(\w+day)"}}
BOOK = Tool("book", "", {"type": "object"})


def test_a_rule_calls_only_a_tool_on_offer() -> None:
    """Rules for the project's own tools called them where a user's tools were on offer."""
    rules = parse_rules([RULE | {"tool": "other"}, RULE], "rules.json")
    assert keyword_call("Book friday", rules, [BOOK]) == ToolCall("book", {"day": "friday"})
    assert keyword_call("Book friday", rules, []) is None


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ({"tool": "book"}, "rules.json: expected a list of rules"),
        ([RULE, {"tool": "book"}], "rules.json: rule 2: expected tool and words"),
        ([RULE | {"words": "("}], "rules.json: rule 1: words: no regular expression: missing"),
        ([RULE | {"arguments": {"day": 3}}], "rules.json: rule 1: day: no regular expression"),
        ([RULE | {"arguments": {"day": r"\w+day"}}], "rules.json: rule 1: expected a group, .* of \\['day'\\]"),
    ],
)
def test_a_rule_that_breaks_the_form_is_named(rules: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_rules(rules, "rules.json")
