"""Price of calls on a rented machine, from a hosted model, from both combined, and on a GPU instead of CPUs."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

SECONDS_PER_HOUR = 3600


def usd_per_million_tokens(usd_per_hour: float, tokens_per_s: float, utilisation: float) -> float:
    """Price of a million generated tokens on one rented machine.

    usd_per_hour is the machine's price, idle time included; utilisation is the share of the hour
    spent generating, in (0, 1]; tokens_per_s is over all concurrent requests.

    Raises ValueError for a speed or utilisation that is not positive, which would come out as
    free or as infinity.
    """
    if tokens_per_s <= 0 or not 0 < utilisation <= 1:
        raise ValueError(f"no price for {tokens_per_s=}, {utilisation=}")
    return usd_per_hour / (tokens_per_s * utilisation * SECONDS_PER_HOUR) * 1e6


def cascade(
    rows: Sequence[dict[str, Any]],
    threshold: float,
    usd_per_call: tuple[float, float],
    usd_per_hour: float,
    hosted_exact_fraction: float,
) -> dict[str, float | None]:
    """Share sent on, accuracy and price if calls with a confidence below `threshold` are sent on to a hosted model.

    `rows` are scored replies (`called`, `confidence`, `outcome`); `usd_per_call` is for the local and the hosted model.
    Every request goes to the local model first. Replies in text are kept: their confidence is that of all their words
    and says little. The hosted model is assumed to be right on `hosted_exact_fraction` of all requests: at best
    (`exact_call_fraction`) equally often on the hard ones it is sent, at worst all its errors are among these. Above
    the break-even traffic, one machine that runs all day (`usd_per_hour`) plus the calls sent on cost less than sending
    all calls to the hosted model; None if every call is sent on.
    """
    kept = [row for row in rows if not row["called"] or row["confidence"] >= threshold]
    local, hosted = usd_per_call
    kept_fraction = len(kept) / len(rows)
    sent_fraction = 1 - kept_fraction
    right = sum(row["outcome"] == "exact" for row in kept) / len(rows)
    return {
        "sent_fraction": sent_fraction,
        "exact_call_fraction": right + sent_fraction * hosted_exact_fraction,
        "exact_call_fraction_at_worst": right + max(0.0, sent_fraction - (1 - hosted_exact_fraction)),
        "usd_per_thousand_calls": 1000 * (local + sent_fraction * hosted),
        "break_even_calls_per_day": 24 * usd_per_hour / (kept_fraction * hosted) if kept and hosted else None,
    }


def break_even(
    cpu_usd_per_hour: float, cpu_calls_per_day: float, gpu_usd_per_hour: float, gpu_calls_per_day: float
) -> dict[str, float | None]:
    """Above how many calls per day one GPU machine costs less than the CPU machines needed for the same calls.

    `..._calls_per_day` is what one machine answers, both kinds busy for the same share of the day. CPU machines are
    whole: `cpu_machines` is the smallest number that costs more than the GPU machine, `calls_per_day` what one fewer
    answer, or None if the GPU machine answers no more than that.
    """
    cheaper = int(Decimal(str(gpu_usd_per_hour)) // Decimal(str(cpu_usd_per_hour)))  # in floats, 0.3 // 0.1 is 2
    calls = cheaper * cpu_calls_per_day
    return {
        "cpu_machines": cheaper + 1,
        "calls_per_day": calls if calls < gpu_calls_per_day else None,
        "gpu_calls_per_day": gpu_calls_per_day,
        "cpu_machines_for_gpu_calls": math.ceil(gpu_calls_per_day / cpu_calls_per_day),
    }
