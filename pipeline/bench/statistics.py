"""Intervals, tests and percentiles."""

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% confidence interval of a rate. Wilson (1927), without continuity correction."""
    from scipy.stats import binomtest  # here: 70 MB, which the benchmark would count as the model's

    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"no interval for {successes} of {n}")
    found = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mcnemar_p(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: the probability that disagreements are at least this one-sided by chance."""
    from scipy.stats import binomtest

    pairs = list(zip(one, other, strict=True))
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def percentiles(samples_s: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 (linear between order statistics) and mean.

    Raises ValueError if there are no samples or one is not finite.
    """
    if not samples_s or not all(math.isfinite(sample) for sample in samples_s):
        raise ValueError(f"no percentiles of {len(samples_s)} samples, not all finite")
    p50, p95, p99 = np.percentile(samples_s, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "mean": float(np.mean(samples_s))}


def reliability(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[dict[str, float]]:
    """Mean confidence and share of right replies in `bins` equal parts of [0, 1]; empty parts are left out."""
    parts: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for value, hit in zip(confidence, right, strict=True):
        parts[min(int(value * bins), bins - 1)].append((value, hit))
    return [
        {
            "n": len(part),
            "mean_confidence": sum(value for value, _ in part) / len(part),
            "right_fraction": sum(hit for _, hit in part) / len(part),
        }
        for part in parts
        if part
    ]


def expected_calibration_error(parts: Sequence[dict[str, float]]) -> float:
    """Mean distance between confidence and share of right replies over `reliability`'s parts, weighted by size."""
    n = sum(part["n"] for part in parts)
    return sum(part["n"] * abs(part["mean_confidence"] - part["right_fraction"]) for part in parts) / n


def risk_coverage(confidence: Sequence[float], right: Sequence[bool]) -> list[tuple[float, float]]:
    """Share of replies kept, most confident first, and share of wrong ones among them; ties are kept together."""
    pairs = sorted(zip(confidence, right, strict=True), key=lambda pair: -pair[0])
    curve, wrong = [], 0
    for at, (value, hit) in enumerate(pairs, start=1):
        wrong += not hit
        if at == len(pairs) or pairs[at][0] != value:
            curve.append((at / len(pairs), wrong / at))
    return curve
