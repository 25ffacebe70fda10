"""The report's section on the number of training requests and on seeds, where reports/learning_curve.json exists."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

from pipeline import files
from pipeline.bench.picture import QUIET, canvas, line

VARIANT = "fused-fp32"
TITLE = "Training data and seeds"


def read(reports: Path) -> dict[str, Any]:
    path = reports / "learning_curve.json"
    return dict(files.read_json(path)) if path.exists() else {}


def markdown(found: dict[str, Any]) -> list[str]:
    """The section's paragraphs; none if nothing was measured."""
    if not found:
        return []
    rows = [
        {
            "training requests": row["train_requests"],
            "seed": row["seed"],
            "steps": row["steps"],
            "training": f"{row['train_s'] / 60:.0f} min",
            "validation loss": f"{row['best_validation_loss']:.3f}",
            "exact, hand-written validation": _with_interval(row["validation_hand"]),
            "exact, test": _with_interval(row["test"]) if row["test"] else "",
        }
        for row in _by_size(found["rows"])
    ]
    commit = found["provenance"]["commit"]
    return [
        f"### {TITLE}",
        "![Exact calls by number of training requests](learning-curve.png)",
        f"Each row is a separate training ({VARIANT}; `python -m pipeline.learning_curve`, at commit "
        f"{commit[:7] if commit else 'unknown'}, when the default was {found['default']['requests']:,} requests). "
        f"{seeds(found)}",
        str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)),
    ]


def seeds(found: dict[str, Any]) -> str:
    """Mean and spread of test accuracy over the seeds, with the default number of requests."""
    exact = [100 * row["test"]["exact_call_fraction"] for row in of_default_size(found)]
    if len(exact) < 2:
        return "Other seeds were not trained."
    return (
        f"Exact calls on the test, mean of {len(exact)} seeds: {mean(exact):.1f}% ({min(exact):.1f} to "
        f"{max(exact):.1f}, standard deviation {stdev(exact):.1f} points)."
    )


def of_default_size(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["requests"] == found["default"]["requests"]]


def plot(found: dict[str, Any], path: Path) -> None:
    """Exact calls on hand-written validation by number of training requests, with 95% intervals; a mark per seed."""
    rows, default = _by_size(found["rows"]), found["default"]
    curve = [row for row in rows if row["seed"] == default["seed"]]
    others = [row for row in rows if row["seed"] != default["seed"]]
    with canvas(path, "Exact calls by number of training requests") as figure:
        axes = figure.subplots()
        n, exact = _numbers(curve), _percent(curve)
        low, high = ([100 * row["validation_hand"]["exact_call_ci95"][end] for row in curve] for end in (0, 1))
        axes.fill_between(n, low, high, color=QUIET, alpha=0.2, linewidth=0)
        axes.plot(n, exact, **line(VARIANT, VARIANT))
        axes.plot(_numbers(others), _percent(others), "o", color=QUIET, label="other seeds")
        for at, height in zip(n, exact, strict=True):
            axes.annotate(f"{height:.1f}%", (at, height), textcoords="offset points", xytext=(5, -11))
        axes.set(xlabel="training requests", ylabel="exact calls, hand-written validation (%)", xlim=(0, None))
        if others:
            axes.legend(fontsize=7, loc="lower right")


def _by_size(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (int(row["train_requests"]), int(row["seed"])))


def _numbers(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["train_requests"] for row in rows]


def _percent(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * row["validation_hand"]["exact_call_fraction"] for row in rows]


def _with_interval(scored: dict[str, Any]) -> str:
    low, high = scored["exact_call_ci95"]
    return f"{scored['exact_call_fraction']:.1%} ({low:.1%} to {high:.1%})"
