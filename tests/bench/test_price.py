import pytest

from pipeline.bench.price import cascade

ROWS = [
    {"called": True, "confidence": 0.9, "outcome": "exact"},
    {"called": True, "confidence": 0.5, "outcome": "exact"},
    {"called": True, "confidence": 0.2, "outcome": "wrong_tool"},
    {"called": False, "confidence": 0.0, "outcome": "exact"},  # in text: never sent on
]


def test_cascade_sends_doubtful_calls_and_pays_for_both_models() -> None:
    found = cascade(ROWS, 0.5, (0.001, 0.01), usd_per_hour=1.0, hosted_exact_fraction=0.8)
    assert found["sent_fraction"] == 0.25
    assert found["exact_call_fraction"] == pytest.approx((3 + 0.8) / 4)
    assert found["usd_per_thousand_calls"] == pytest.approx(1 + 0.25 * 10)
    # 24 USD a day; a call saves 0.75 * 0.01 USD
    assert found["break_even_calls_per_day"] == pytest.approx(3200)


def test_cascade_has_no_break_even_where_everything_is_sent() -> None:
    found = cascade(ROWS[:3], 1.0, (0.001, 0.01), usd_per_hour=1.0, hosted_exact_fraction=0.8)
    assert found["sent_fraction"] == 1
    assert found["break_even_calls_per_day"] is None
