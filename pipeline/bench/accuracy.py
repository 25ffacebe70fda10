"""Accuracy of a variant's replies: one row per request, then shares over the rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.bench.statistics import (
    expected_calibration_error,
    reliability,
    risk_coverage,
    wilson_interval,
)
from pipeline.toolcall import reply as replies
from pipeline.toolcall import score
from pipeline.toolcall.conversation import NONE, Request


@dataclass(frozen=True)
class Answer:
    text: str
    confidence: float = 1.0
    changed: bool = False  # by the grammar, or by choosing a likelier call


def row(request: Request, answer: Answer) -> dict[str, Any]:
    text = answer.text
    made = replies.parse_call(text)
    return {
        "id": request.id,
        "category": request.category,
        "outcome": score.outcome(text, request.tools, request.expected, request.accept),
        "right_tool": (made.name if made else None) == (request.expected.name if request.expected else None)
        and replies.attempts_call(text) == (request.expected is not None),
        "valid": not replies.attempts_call(text) or (made is not None and score.is_valid(made, request.tools)),
        "called": replies.attempts_call(text),
        "changed": answer.changed,
        "confidence": answer.confidence,
        "request": _shown(request),
        "reply": text,
    }


def _shown(request: Request) -> str:
    if len(request.messages) == 1:
        return request.messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in request.messages)


def measures(requests: Sequence[Request], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(rows)
    exact = [found["outcome"] == score.Outcome.EXACT for found in rows]
    must_call = [row for row, request in zip(rows, requests, strict=True) if request.expected]
    abstain = [row for row, request in zip(rows, requests, strict=True) if not request.expected]
    categories = sorted({request.category for request in requests})
    return {
        "n": n,
        "exact_call_fraction": sum(exact) / n,
        "exact_call_ci95": list(wilson_interval(sum(exact), n)),
        "right_tool_fraction": _share(rows, "right_tool"),
        "valid_call_fraction": _share([row for row in rows if row["called"]], "valid"),
        "confusion": confusion(requests, rows),
        "calibration": calibration(rows, exact),
        "must_call_fraction": _share(must_call, "called"),
        "abstain_fraction": None if not abstain else 1 - (_share(abstain, "called") or 0),
        "outcomes": dict(Counter(str(found["outcome"]) for found in rows)),
        "by_category": {
            name: {
                "n": sum(request.category == name for request in requests),
                "exact_call_fraction": sum(
                    hit for hit, request in zip(exact, requests, strict=True) if request.category == name
                )
                / sum(request.category == name for request in requests),
            }
            for name in categories
        },
        "constraint_changed_fraction": _share(rows, "changed"),
    }


def summary(requests: Sequence[Request], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of some of the requests, without `confusion` and `calibration`."""
    return {name: value for name, value in measures(requests, rows).items() if name not in ("confusion", "calibration")}


def confusion(requests: Sequence[Request], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Right tool -> called tool -> number of requests; `none`: no call, `malformed`: a call that cannot be parsed."""
    found: dict[str, Counter[str]] = {}
    for request, made in zip(requests, rows, strict=True):
        call = replies.parse_call(made["reply"])
        called = call.name if call else ("malformed" if made["called"] else NONE)
        found.setdefault(request.expected.name if request.expected else NONE, Counter())[called] += 1
    return {name: dict(counts) for name, counts in found.items()}


def calibration(rows: Sequence[dict[str, Any]], exact: Sequence[bool]) -> dict[str, Any]:
    """Over calls only: the confidence of a text is that of all its words, which says little about abstaining."""
    calls = [(row["confidence"], hit) for row, hit in zip(rows, exact, strict=True) if row["called"]]
    if not calls:
        return {"n": 0, "expected_calibration_error": None, "reliability": [], "risk_coverage": []}
    confidence, right = zip(*calls, strict=True)
    parts, curve = reliability(confidence, right), risk_coverage(confidence, right)
    return {
        "n": len(calls),
        "expected_calibration_error": expected_calibration_error(parts),
        "reliability": parts,
        "risk_coverage": [*curve[: -1 : max(1, len(calls) // 100)], curve[-1]],  # the last point covers all calls
    }


def _share(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """None if there are no rows, which is not a share of zero."""
    return sum(bool(row[key]) for row in rows) / len(rows) if rows else None
