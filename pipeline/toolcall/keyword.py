"""The keyword baseline: a rule per tool that matches words of the request. What a model has to beat.

A rule is data (data/keywords.json): words that speak for a tool, and for each of its arguments a
regular expression whose first group is the value.
"""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.toolcall.tool import ToolCall


@dataclass(frozen=True)
class Rule:
    tool: str
    words: re.Pattern[str]
    arguments: dict[str, re.Pattern[str]]


def parse_rules(value: Any) -> list[Rule]:
    return [
        Rule(
            rule["tool"],
            re.compile(rule["words"], re.IGNORECASE),
            {name: re.compile(pattern) for name, pattern in rule["arguments"].items()},
        )
        for rule in value
    ]


def keyword_call(text: str, rules: list[Rule]) -> ToolCall | None:
    """The call of the first rule whose words stand in `text`; no call where none does."""
    for rule in rules:
        if rule.words.search(text):
            found = {name: pattern.search(text) for name, pattern in rule.arguments.items()}
            return ToolCall(rule.tool, {name: hit.group(1) for name, hit in found.items() if hit})
    return None
