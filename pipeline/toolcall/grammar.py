"""The grammar of calls, which constrains each next token; made from the tools' JSON schemas (llguidance).

Replies in text are not constrained: the grammar applies once a reply has begun with `<tool_call>`. A copied value
(copies.py) can only be whole words of the request: small models misspell, and stop too soon.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from numpy.typing import NDArray

from pipeline.toolcall import copies
from pipeline.toolcall.compact import is_text
from pipeline.toolcall.copies import separators
from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool


class Grammar:
    """The grammar of one list of tools. Raises ValueError naming the tool whose schema it cannot express."""

    def __init__(self, vocabulary: LLTokenizer, tools: Sequence[Tool]) -> None:
        self._vocabulary = vocabulary
        for tool in tools:
            if hidden := _elsewhere(tool.parameters):
                raise ValueError(f"tool {tool.name}: its arguments must stand under properties, not under {hidden}")
            failed, why = LLMatcher.validate_grammar_with_warnings(_lark([tool]), self._vocabulary)
            if failed:
                reason = _GRAMMAR_LINES.sub("", "; ".join(why))
                raise ValueError(f"tool {tool.name}: its parameters make no grammar: {reason}")
        self._tools, self._copies = tools, any(map(_copies_text, tools))
        self._fresh = LLMatcher(self._vocabulary, _lark(tools))
        self._last = "", self._fresh
        # Without a tool's name, even if there is only one tool: the model has to decide for a call first.
        self.opening: list[int] = LLMatcher(self._vocabulary, _ANY_CALL).compute_ff_tokens()

    def opens(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` begin a call, however the marker is split into tokens."""
        return len(tokens) <= len(OPENING) and self._vocabulary.decode_bytes(list(tokens)).startswith(OPENING.encode())

    def start(self, text: str) -> "Guide":
        """`text`: the request, which arguments are copied from."""
        if self._copies and text != self._last[0]:  # candidates for one reply have the same text
            self._last = text, LLMatcher(self._vocabulary, _lark(self._tools, text))
        return Guide(self._last[1].deep_copy())


class Guide:
    """The state of the grammar within one reply."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def accept(self, tokens: Sequence[int]) -> None:
        """Raises RuntimeError if the grammar does not allow `tokens`: no call goes on unconstrained."""
        if not self._matcher.consume_tokens(list(tokens)):
            raise RuntimeError(f"the grammar refused tokens {list(tokens)}: {self._matcher.get_error()}")

    def forced(self) -> list[int]:
        """The next tokens, for as long as the grammar allows only one."""
        return list(self._matcher.compute_ff_tokens())

    def best(self, logits: NDArray[np.float32]) -> tuple[int, bool]:
        """The likeliest allowed token, and whether a likelier one is not allowed. `logits`: (vocabulary,)."""
        best = int(logits.argmax())
        if self._matcher.validate_tokens([best]) == 1:  # hundreds of times cheaper than a mask
            return best, False
        mask = allocate_token_bitmask(1, len(logits))
        fill_next_token_bitmask(self._matcher, mask)
        allowed = logits[None].copy()
        apply_token_bitmask_inplace(allowed, mask)
        return int(allowed.argmax()), True


ANY = "/(?s:.*)/"
TEXTS = (ANY, "SPAN", "PATH")
_ANY_CALL = f'start: {json.dumps(OPENING)} ("A" | "b")'  # names that differ from the start: only the marker is forced
# Ignored: keywords that llguidance cannot enforce (uniqueItems, not, some formats, ...), and a tool's keywords beside
# its properties. Tool.fault finds calls that break one; they do not count as calls.
JSON_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": True,
    "coerce_one_of": True,
}
_GRAMMAR_LINES = re.compile(r"\n *\d+ \|.*")  # lines of the grammar that llguidance's messages quote
ALTERNATIVES = ("allOf", "anyOf", "oneOf")
DEFINITIONS = ("$defs", "definitions")


def _elsewhere(parameters: dict[str, Any]) -> list[str]:
    """Keywords of a tool's parameters that may name arguments unknown to the grammar."""
    parts = {key: [part for part in parameters.get(key, []) if isinstance(part, dict)] for key in ALTERNATIVES}
    found = [key for key, schemas in parts.items() if {"properties", "$ref"} & set().union(*schemas)]
    return [*found, *(["$ref"] if "$ref" in parameters else [])]


def _lark(tools: Sequence[Tool], text: str = "") -> str:
    calls = [f"call{number}" for number in range(len(tools))]
    return "\n".join(
        [
            f"start: {json.dumps(OPENING)} ({' | '.join(calls)})",
            'PATH: SPAN ("/" SPAN)?',
            f"SPAN: %regex {json.dumps({'substring_chunks': copies.words(text)})}",
            *(rule for number, tool in enumerate(tools) for rule in _call(number, tool)),
        ]
    )


def _call(number: int, tool: Tool) -> list[str]:
    """A tool's rules. After an argument comes any later one up to the next required one, or the end if none is."""
    properties = list(tool.parameters.get("properties", {}).items())
    required = tool.parameters.get("required", [])
    ways = [
        [(separator, _value(schema, separator, tool)) for separator in separators(schema)] for _, schema in properties
    ]

    def following(at: int) -> tuple[list[tuple[str, str]], bool]:
        """Keys of the arguments that may come after the first `at`, with their rules, and whether the call may end."""
        found: list[tuple[str, str]] = []
        for later in range(at, len(properties)):
            name = properties[later][0]
            found += [(name + key, f"value{number}_{later}_{way}") for way, (key, _) in enumerate(ways[later])]
            if name in required:
                return found, False
        return found, True

    def after(at: int) -> str:
        keys, ends = following(at)
        return " | ".join([*(f"{_line(key)} {rule}" for key, rule in keys), *(['""'] if ends else [])])

    rules = [f"call{number}: {json.dumps(tool.name)} ({after(0)})"]
    for at, found in enumerate(ways):
        for way, (_, value) in enumerate(found):
            rule = f"value{number}_{at}_{way}"
            rules += (
                _text(rule, value, *following(at + 1)) if value in TEXTS else [f"{rule}: {value} ({after(at + 1)})"]
            )
    return rules


def _text(rule: str, text: str, keys: list[tuple[str, str]], ends: bool) -> list[str]:
    """A text ends at a line that begins with the name of a later argument. The name is part of the text's terminal,
    because the lexer does not backtrack.
    """
    rules, ways = [], [text] if ends else []
    for way, (key, following) in enumerate(keys):
        if text == ANY:
            rules.append(f"{rule}_{way}[lazy]: /(?s:.*)\\n{_escaped(key)}/")
            ways.append(f"{rule}_{way} {following}")
        else:  # in llguidance lazy regexes are rules, concatenations terminals
            rules.append(f"{rule.upper()}_{way}: {text} {_line(key)}")
            ways.append(f"{rule.upper()}_{way} {following}")
    return [*rules, f"{rule}: {' | '.join(ways)}"]


def _escaped(key: str) -> str:
    """For a regular expression in Lark, which ends with a slash."""
    return re.escape(key).replace("/", r"\/")


def _line(key: str) -> str:
    return json.dumps(f"\n{key}", ensure_ascii=False)


def _value(schema: Any, separator: str, tool: Tool) -> str:
    """The grammar of a value after `separator`."""
    if not is_text(schema):
        wanted = {key: value for key, value in schema.items() if key != "x-copy"} if isinstance(schema, dict) else {}
        if any(_references(part) for part in (wanted, *(tool.parameters.get(key) for key in DEFINITIONS))):
            wanted = {**_within(wanted), "$defs": {"tool": _within(tool.parameters)}}
        rule = f"%json {json.dumps({**wanted, 'x-guidance': JSON_OPTIONS})}"
        return f"({rule} | /{form}/)" if (form := copies.form_of(schema)) else rule
    if "enum" in schema or "const" in schema:
        allowed = [value for value in schema.get("enum", [schema.get("const")]) if isinstance(value, str)]
        if not allowed:
            raise ValueError(f"tool {tool.name}: no text fits {json.dumps(schema, ensure_ascii=False)}")
        return "(" + " | ".join(json.dumps(value, ensure_ascii=False) for value in allowed) + ")"
    if separator == copies.OWN:
        return ANY
    return "PATH" if copies.copy_of(schema) == "path" else "SPAN"


def _references(schema: Any) -> bool:
    """Whether anything in `schema` refers to another part of the tool's parameters."""
    if isinstance(schema, dict):
        return isinstance(schema.get("$ref"), str) or any(map(_references, schema.values()))
    return isinstance(schema, list) and any(map(_references, schema))


def _within(schema: Any) -> Any:
    """`schema` with its references adjusted: the tool's parameters are now under `#/$defs/tool`."""
    if isinstance(schema, dict):
        to = schema.get("$ref")
        here = {"$ref": f"#/$defs/tool{to[1:]}"} if isinstance(to, str) and to.startswith("#") else {}
        return {**{key: _within(value) for key, value in schema.items()}, **here}
    return [_within(value) for value in schema] if isinstance(schema, list) else schema


def _copies_text(tool: Tool) -> bool:
    return any(copies.copy_of(schema) in copies.SEPARATORS for schema in tool.parameters.get("properties", {}).values())
