"""The keyword baseline: a rule per tool that matches words of the request. What a model has to beat.

A rule is data (data/keywords.json): words that speak for a tool, and for each of its arguments a
regular expression whose first group is the value.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.toolcall.tool import Tool, ToolCall, find_tool


@dataclass(frozen=True)
class Rule:
    tool: str
    words: re.Pattern[str]
    arguments: dict[str, re.Pattern[str]]


def parse_rules(value: Any, where: str) -> list[Rule]:
    """Raises ValueError naming `where` and the rule that breaks the form."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list of rules, got {str(value)[:80]!r}")
    return [_parse_rule(rule, f"{where}: rule {at}") for at, rule in enumerate(value, 1)]


def _parse_rule(value: Any, where: str) -> Rule:
    match value:
        case {"tool": str(tool), "words": str(words), "arguments": dict(arguments)}:
            patterns = {name: _pattern(pattern, f"{where}: {name}") for name, pattern in arguments.items()}
            if without := [name for name, pattern in patterns.items() if not pattern.groups]:
                raise ValueError(f"{where}: expected a group, which is the value, in the expressions of {without}")
            return Rule(tool, _pattern(words, f"{where}: words", re.IGNORECASE), patterns)
    raise ValueError(f"{where}: expected tool and words, which are texts, and arguments, got {str(value)[:80]!r}")


def _pattern(value: Any, where: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(value, flags)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}: no regular expression: {error}: {value!r}") from error


def keyword_call(text: str, rules: list[Rule], tools: Sequence[Tool]) -> ToolCall | None:
    """The call of the first rule for one of `tools` whose words occur in `text`, or None."""
    for rule in rules:
        if find_tool(tools, rule.tool) and rule.words.search(text):
            found = {name: pattern.search(text) for name, pattern in rule.arguments.items()}
            return ToolCall(rule.tool, {name: hit.group(1) for name, hit in found.items() if hit})
    return None
