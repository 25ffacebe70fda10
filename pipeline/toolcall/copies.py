"""Arguments that the model copies from the request; values that need computing are computed from the copy.

"x-copy" in a parameter's schema says what the model writes:
- "span": a span of the request
- "path": a span, or two spans joined by a slash ("api.md in docs")
- "text": a span, or its own words
- "regex": a span, whose special characters are then escaped, or its own expression
- "milliseconds": `90 s`, `2 min` or `1 h`, or the number itself
- "last:NAME", for a count from argument NAME on: the last one counted, as `to 164`, or the count itself
Small models misspell, miscount and miscalculate; they copy well.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

OWN, COPY = ": ", " = "  # between an argument's name and its value
SEPARATORS = {"span": (COPY,), "path": (COPY,), "text": (COPY, OWN), "regex": (COPY, OWN)}
UNITS = {"h": 3_600_000, "min": 60_000, "s": 1000}
FORMS = {"milliseconds": rf"[1-9][0-9]{{0,5}} ({'|'.join(UNITS)})", "last": "to [1-9][0-9]{0,6}"}
_SPECIAL = re.compile(r"[\\^$*+?()\[\]{}|]")  # not the dot: unescaped, it matches itself too
_ESCAPED = re.compile(rf"\\({_SPECIAL.pattern})")
_WORDS = re.compile(r"\w+|\W")


def copy_of(schema: Any) -> str:
    """The schema's "x-copy", or an empty text."""
    return str(schema.get("x-copy", "")) if isinstance(schema, dict) else ""


def separators(schema: Any) -> tuple[str, ...]:
    return SEPARATORS.get(copy_of(schema), (OWN,))


def form_of(schema: Any) -> str | None:
    """A regular expression for what may be written instead of a number, or None."""
    return FORMS.get(copy_of(schema).partition(":")[0])


def fault(schema: dict[str, Any], names: Sequence[str]) -> str | None:
    """What is wrong with a parameter's "x-copy", or None; `names` are the parameters before it."""
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
    """The units that spans of `text` consist of: whole words, and single other characters."""
    return _WORDS.findall(text)


def copied(schema: Any, value: Any, arguments: Mapping[str, Any], text: str) -> str | None:
    """The copy from `text` to write for `value`, or None if `value` is written as it is."""
    kind = copy_of(schema)
    if kind in SEPARATORS:
        if not isinstance(value, str):
            return None  # a client's history may hold values that do not fit the schema
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
    if kind.startswith("last:") and value > 1:  # a count of 1 needs no arithmetic
        begin = arguments.get(kind.removeprefix("last:"), 0)
        if not isinstance(begin, int):
            return None
        last = begin + value - 1
        return f"to {last}" if last >= value and _stands(str(last), text) and not _stands(str(value), text) else None
    return None


def can_be_said(schema: Any, value: Any, text: str) -> bool:
    """Whether the grammar allows `value`: if it must be a copy, `text` has to contain it."""
    kind = copy_of(schema)
    if kind not in ("span", "path") or not isinstance(value, str) or _is_span(value, text):
        return True
    joined = ((value[:at], value[at + 1 :]) for at, letter in enumerate(value) if letter == "/" and kind == "path")
    return any(all(_is_span(part, text) for part in parts) for parts in joined)


def restored(schema: Any, copy: str, arguments: Mapping[str, Any]) -> Any:
    """Inverse of `copied`: the value that `copy` stands for, or None if it is no such copy."""
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
    """Whether `part` consists of consecutive words of `text`."""
    wanted, found = words(part), words(text)
    return bool(wanted) and any(found[at : at + len(wanted)] == wanted for at in range(len(found) - len(wanted) + 1))
