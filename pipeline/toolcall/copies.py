"""Arguments that the model copies from the request; what has to be computed is computed from the copy.

A parameter's schema says how, as "x-copy":
- "span": it stands in the request
- "path": so does it, or two spans with a slash between ("api.md in docs")
- "text": a span, or words of the model's own
- "regex": a span, whose special characters are escaped, or an expression of the model's own
- "milliseconds": `90 s`, `2 min` or `1 h`, or the number itself
- "last:NAME": `to 164` is the last of those that begin at the argument NAME, or their number itself
Small models misspell, miscount and miscalculate; they copy well.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

OWN, COPY = ": ", " = "  # between an argument's name and its value
SEPARATORS = {"span": (COPY,), "path": (COPY,), "text": (COPY, OWN), "regex": (COPY, OWN)}
UNITS = {"h": 3_600_000, "min": 60_000, "s": 1000}
FORMS = {"milliseconds": rf"[1-9][0-9]{{0,5}} ({'|'.join(UNITS)})", "last": "to [1-9][0-9]{0,6}"}
_SPECIAL = re.compile(r"[\\^$*+?()\[\]{}|]")  # the dot matches itself
_ESCAPED = re.compile(rf"\\({_SPECIAL.pattern})")
_WORDS = re.compile(r"\w+|\W")


def copy_of(schema: Any) -> str:
    """What its "x-copy" says, or nothing."""
    return str(schema.get("x-copy", "")) if isinstance(schema, dict) else ""


def separators(schema: Any) -> tuple[str, ...]:
    return SEPARATORS.get(copy_of(schema), (OWN,))


def form_of(schema: Any) -> str | None:
    """A regular expression for how a number may be written, the number itself apart."""
    return FORMS.get(copy_of(schema).partition(":")[0])


def fault(schema: dict[str, Any], names: Sequence[str]) -> str | None:
    """What is wrong with the "x-copy" of a parameter behind those called `names`, or None."""
    kind, others = schema["x-copy"], schema.keys() - {"x-copy", "type", "description", "title", "default", "examples"}
    if isinstance(kind, str) and kind in SEPARATORS:
        return None if schema.get("type") == "string" and not others else f"x-copy {kind} is for a string of any form"
    if not isinstance(kind, str) or kind.partition(":")[0] not in FORMS:
        return f"x-copy must be one of {[*SEPARATORS, 'milliseconds', 'last:NAME']}, got {kind!r}"
    if schema.get("type") != "integer" or others - {"minimum"} or schema.get("minimum", 1) > 1:
        return f"x-copy {kind} is for an integer of any size from 1 on"
    if kind != "milliseconds" and kind.removeprefix("last:") not in names:
        return f"x-copy {kind} must name an argument before it: {list(names)}"
    return None


def words(text: str) -> list[str]:
    """What a span of `text` consists of: whole words, and each other character."""
    return _WORDS.findall(text)


def copied(schema: Any, value: Any, arguments: Mapping[str, Any], text: str) -> str | None:
    """What of `text` is to be copied for `value`, or None where it is written as it is."""
    kind = copy_of(schema)
    if kind in SEPARATORS:
        if not isinstance(value, str):
            return None  # a client's history may hold what fits no schema
        if kind in ("span", "path"):
            return value
        literal = _ESCAPED.sub(r"\1", value) if kind == "regex" else value
        back = _escape(literal) if kind == "regex" else literal
        return literal if back == value and _is_span(literal, text) else None
    if not kind or not isinstance(value, int) or isinstance(value, bool):
        return None
    if kind == "milliseconds" and not _stands(str(value), text):
        exact = [(value // ms, unit) for unit, ms in UNITS.items() if value % ms == 0]
        named = [found for found in exact if _stands(f"{found[0]}", text, rf"[\s-]?{found[1][0]}")]
        return " ".join(map(str, (named or exact)[0])) if exact else None
    if kind.startswith("last:") and value > 1:  # of one line the number is no sum
        begin = arguments.get(kind.removeprefix("last:"), 0)
        if not isinstance(begin, int):
            return None
        last = begin + value - 1
        return f"to {last}" if last >= value and _stands(str(last), text) and not _stands(str(value), text) else None
    return None


def can_be_said(schema: Any, value: Any, text: str) -> bool:
    """Not where only a copy may be said, and `text` has no such."""
    kind = copy_of(schema)
    if kind not in ("span", "path") or not isinstance(value, str) or _is_span(value, text):
        return True
    joined = ((value[:at], value[at + 1 :]) for at, letter in enumerate(value) if letter == "/" and kind == "path")
    return any(all(_is_span(part, text) for part in parts) for parts in joined)


def restored(schema: Any, copy: str, arguments: Mapping[str, Any]) -> Any:
    """The value for which `copied` gave `copy`, or None where it gave none such."""
    kind, form = copy_of(schema), form_of(schema)
    if kind in SEPARATORS:
        return _escape(copy) if kind == "regex" else copy
    if form is None or not re.fullmatch(form, copy):
        return None
    left, right = copy.split(" ")
    if kind == "milliseconds":
        return int(left) * UNITS[right]
    begin = arguments.get(kind.removeprefix("last:"), 1)
    return abs(int(right) - begin) + 1 if isinstance(begin, int) else None


def _escape(literal: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", literal)


def _stands(number: str, text: str, unit: str = "") -> bool:
    return re.search(rf"(?<![\d.]){number}(?!\d){unit}", text) is not None


def _is_span(part: str, text: str) -> bool:
    """Is `part` made of neighbouring words of `text`?"""
    wanted, found = words(part), words(text)
    return bool(wanted) and any(found[at : at + len(wanted)] == wanted for at in range(len(found) - len(wanted) + 1))
