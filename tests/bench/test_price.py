import pytest

from pipeline.bench.price import break_even, cascade

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
    # at worst the 0.8 calls of four that it gets wrong are all in the one that it is sent
    assert found["exact_call_fraction_at_worst"] == pytest.approx((3 + 0.2) / 4)
    assert found["usd_per_thousand_calls"] == pytest.approx(1 + 0.25 * 10)
    # 24 USD a day; a call saves 0.75 * 0.01 USD
    assert found["break_even_calls_per_day"] == pytest.approx(3200)


def test_cascade_is_at_worst_right_on_nothing_that_is_sent_where_it_gets_more_wrong_than_that() -> None:
    found = cascade(ROWS, 0.5, (0.001, 0.01), usd_per_hour=1.0, hosted_exact_fraction=0.7)
    assert found["exact_call_fraction_at_worst"] == pytest.approx(3 / 4)


def test_cascade_has_no_break_even_where_everything_is_sent() -> None:
    found = cascade(ROWS[:3], 1.0, (0.001, 0.01), usd_per_hour=1.0, hosted_exact_fraction=0.8)
    assert found["sent_fraction"] == 1
    assert found["break_even_calls_per_day"] is None


def test_gpu_machine_pays_above_what_the_last_cheaper_number_of_cpu_machines_answers() -> None:
    # 5 USD an hour: two CPU machines cost 4, three cost 6; two answer 2 * 1,000 calls. 9,500 calls need ten.
    assert break_even(2.0, 1000.0, 5.0, 9500.0) == {
        "cpu_machines": 3, "calls_per_day": 2000.0, "gpu_calls_per_day": 9500.0, "cpu_machines_for_gpu_calls": 10,
    }  # fmt: skip


def test_gpu_machine_never_pays_where_it_answers_no_more_than_cpu_machines_for_its_price() -> None:
    found = break_even(2.0, 1000.0, 5.0, 2000.0)
    assert found["calls_per_day"] is None
    assert found["cpu_machines_for_gpu_calls"] == 2


def test_gpu_machine_pays_from_the_first_call_where_it_is_cheaper_than_one_cpu_machine() -> None:
    found = break_even(2.0, 1000.0, 1.5, 500.0)
    assert (found["cpu_machines"], found["calls_per_day"]) == (1, 0)


def test_as_many_cpu_machines_as_cost_the_same_are_not_dearer() -> None:
    """0.3 // 0.1 is 2 in floats: three machines at 0.1 would pass for dearer than one at 0.3."""
    assert break_even(0.1, 10.0, 0.3, 1000.0)["cpu_machines"] == 4
