import asyncio

import pytest

from pipeline.bench.load import serve
from pipeline.bench.price import usd_per_million_tokens
from pipeline.bench.statistics import (
    expected_calibration_error,
    mcnemar_p,
    percentiles,
    reliability,
    risk_coverage,
    wilson_interval,
)


def test_wilson_interval_of_half() -> None:
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964, n = 100, p = 0.5
    low, high = wilson_interval(50, 100)
    assert low == pytest.approx(0.403832, abs=1e-5)
    assert high == pytest.approx(0.596168, abs=1e-5)


def test_wilson_interval_refuses_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="0 of 0"):
        wilson_interval(0, 0)


def test_mcnemar_counts_only_disagreements() -> None:
    # Six changes, all for the worse: 2 * (1/2)^6
    assert mcnemar_p([True] * 6 + [True] * 50, [False] * 6 + [True] * 50) == pytest.approx(2 / 64)
    assert mcnemar_p([True, False], [True, False]) == 1.0


def test_percentiles_are_linear_between_samples() -> None:
    found = percentiles([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["p50"] == 3.0
    assert found["p95"] == pytest.approx(4.8)  # position 0.95 * 4 = 3.8
    with pytest.raises(ValueError, match="0 samples"):
        percentiles([])


def test_calibration_error_weighs_parts_by_size() -> None:
    parts = reliability([0.95, 0.99, 1.0, 0.15], [True, False, True, False])
    # [0.9, 1]: three, confidence 0.98, right 2/3; [0.1, 0.2): one, 0.15, right 0
    assert [part["n"] for part in parts] == [1, 3]
    assert expected_calibration_error(parts) == pytest.approx((0.15 + 3 * (0.98 - 2 / 3)) / 4)


def test_risk_coverage_keeps_the_most_confident_first_and_ties_together() -> None:
    assert risk_coverage([0.2, 0.9, 0.5, 0.5], [False, True, True, False]) == [(0.25, 0.0), (0.75, 1 / 3), (1.0, 0.5)]


def test_price_of_a_million_tokens() -> None:
    # 1,000 tokens a second are 3.6 million an hour, so 3.60 USD an hour is 1 USD a million.
    assert usd_per_million_tokens(3.60, tokens_per_s=1000, utilisation=1.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no price"):
        usd_per_million_tokens(1.0, tokens_per_s=0, utilisation=1.0)


def test_serve_makes_every_call_once_and_counts_errors() -> None:
    seen: list[int] = []

    async def call(number: int) -> None:
        seen.append(number)
        if number == 3:
            raise ValueError("no")

    served = asyncio.run(serve(call, concurrency=4, calls=10))
    assert sorted(seen) == list(range(10))
    assert served.errors == 1
    assert len(served.call_s) == 9
