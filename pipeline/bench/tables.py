"""The report's tables, and the page of replies side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import files

LADDER = ("torch-fp32", "onnx-fp32", "fused-fp32", "int8", "int4")
SCORED = ("keyword", "base", *LADDER)
BASE, BASELINE, REFERENCE = "base", "torch-fp32", "fused-fp32"


def ladder(found: dict[str, Any], faults: dict[str, str | None], baseline: str) -> pd.DataFrame:
    rows = []
    base = found["benchmark"][baseline]["call_s"]["p50"]
    for name in faults:
        scored, bench = found["evaluate"][name], found["benchmark"][name]
        low, high = scored["exact_call_ci95"]
        last = bench["by_concurrency"][-1]
        rows.append(
            {
                "variant": name,
                "exact calls": f"{scored['exact_call_fraction']:.1%} ({low:.1%} to {high:.1%})",
                "p50 ms": f"{1e3 * bench['call_s']['p50']:.0f}",
                "p95 ms": f"{1e3 * bench['call_s']['p95']:.0f}",
                "faster": f"{base / bench['call_s']['p50']:.2f}x",
                f"calls/s at {last['concurrency']}": f"{last['calls_per_s']:.2f}",
                "MB on disk": f"{bench['model_bytes'] / 1e6:.0f}",
                "peak MB": f"{bench['peak_rss_bytes'] / 1e6:.0f}",
                "USD per million tokens": f"{found['cost']['variants'][name]['usd_per_million_tokens']:.2f}",
                "passes": faults[name] or "yes",
                f"saved against {baseline}": f"{found['cost']['variants'][name]['savings_fraction']:.0%}",
            }
        )
    return pd.DataFrame(rows)


def figures(found: dict[str, Any], best: str) -> list[str]:
    """The four deciding figures."""
    scored, bench = found["evaluate"][best], found["benchmark"][best]
    full, baseline = found["evaluate"][REFERENCE], found["benchmark"][BASELINE]
    cost, hosted = found["cost"]["variants"][best], found["cost"]["hosted"]
    low, high = scored["exact_call_ci95"]
    points, p = 100 * (scored["exact_call_fraction"] - full["exact_call_fraction"]), scored.get("mcnemar_p_vs_fp32")
    against = "itself full precision" if best == REFERENCE else f"{points:+.1f} points vs full precision"
    megabytes, full_megabytes = (made["model_bytes"] / 1e6 for made in (bench, found["benchmark"][REFERENCE]))
    p50_ms, slow_ms = (1e3 * made["call_s"]["p50"] for made in (bench, baseline))
    usd, hosted_usd = cost["usd_per_thousand_calls"], hosted["usd_per_thousand_calls"]
    return [
        f"**{scored['exact_call_fraction']:.1%}** exact calls ({low:.1%} to {high:.1%}), {against}"
        + (f" ({REFERENCE}; p = {p:.2f})" if p is not None else "")
        + (f"; later in a conversation {scored['later']['exact_call_fraction']:.1%}" if "later" in scored else ""),
        f"**{p50_ms:.0f} ms** per call (p50), {slow_ms / p50_ms:.1f} times faster than {BASELINE} "
        f"({slow_ms:.0f} ms); p95 {1e3 * bench['call_s']['p95']:.0f} ms",
        f"**{megabytes:.0f} MB** on disk, {1 - megabytes / full_megabytes:.0%} less than full precision "
        f"({full_megabytes:.0f} MB); {bench['peak_rss_bytes'] / 1e6:.0f} MB peak memory",
        f"**{usd:.3f} USD** per 1,000 calls, {cost['usd_per_million_tokens']:.2f} per million tokens, on a machine "
        f"busy {found['cost']['utilisation']:.0%} of the day; {hosted['model']}: {hosted_usd:.2f} per 1,000 calls, "
        f"{hosted['assumed_exact_fraction']:.0%} exact (assumed)",
    ]


def beside(found: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "variant": name,
                "exact calls": _percent(scored["exact_call_fraction"]),
                "right tool": _percent(scored["right_tool_fraction"]),
                "valid calls": _percent(scored["valid_call_fraction"]),
                "calls when needed": _percent(scored["must_call_fraction"]),
                "abstains when none is needed": _percent(scored["abstain_fraction"]),
                "changed from greedy": _percent(scored["constraint_changed_fraction"]),
                "p vs fp32": _p(scored),
            }
            for name, scored in found["evaluate"].items()
        ]
    )


def later(scored: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Accuracy later in a conversation. `scored`: by variant, the part "later" of its report."""
    return pd.DataFrame(
        [
            {
                "variant": name,
                "exact calls": "{:.1%} ({:.1%} to {:.1%})".format(
                    part["exact_call_fraction"], *part["exact_call_ci95"]
                ),
                "right tool": _percent(part["right_tool_fraction"]),
                "calls when needed": _percent(part["must_call_fraction"]),
                "abstains when none is needed": _percent(part["abstain_fraction"]),
                "p vs fp32": _p(part),
            }
            for name, part in scored.items()
        ]
    )


def later_speed(bench: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Latency of the last call of a conversation. `bench`: by variant, the part "later" of its report."""

    def ms(times: dict[str, float] | None, rank: str) -> str:
        return f"{1e3 * times[rank]:.0f}" if times else ""

    return pd.DataFrame(
        [
            {
                "variant": name,
                "p50 ms": ms(part.get("kept_call_s"), "p50"),
                "p95 ms": ms(part.get("kept_call_s"), "p95"),
                "p50 ms, no reuse": ms(part["anew_call_s"], "p50"),
                "p95 ms, no reuse": ms(part["anew_call_s"], "p95"),
                "same replies": "" if part["same_reply_fraction"] is None else f"{part['same_reply_fraction']:.0%}",
            }
            for name, part in bench.items()
        ]
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _p(scored: dict[str, Any]) -> str:
    p = scored.get("mcnemar_p_vs_fp32")
    return "" if p is None else f"{p:.3f}"


def category(scored: dict[str, dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            name: {category: f"{hit['exact_call_fraction']:.0%}" for category, hit in found["by_category"].items()}
            for name, found in scored.items()
        }
    )


def outcome(found: dict[str, Any]) -> pd.DataFrame:
    rows = {name: scored["outcomes"] for name, scored in found["evaluate"].items()}
    return pd.DataFrame(rows).fillna(0).astype(int)


def confusion(scored: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(scored["confusion"]).T.fillna(0).astype(int).sort_index()
    return table[sorted(table.columns)]


def ablation(found: dict[str, Any]) -> pd.DataFrame:
    """p50 of a call with and without each technique, and the share of replies identical to those with all."""

    def cell(row: dict[str, Any], p50_s: float) -> str:
        times = f"{row['call_p50_s'] / p50_s:.2f}x"
        return f"{1e3 * row['call_p50_s']:.0f} ms, {times}, {row['same_reply_fraction']:.0%} same"

    columns = {name: bench["ablation"] for name, bench in found["benchmark"].items() if bench["ablation"]}
    return pd.DataFrame(
        {name: {row["techniques"]: cell(row, rows[0]["call_p50_s"]) for row in rows} for name, rows in columns.items()}
    )


def speed(found: dict[str, Any]) -> pd.DataFrame:
    """Reply tokens/s are over whole calls: no token of a call is sent before the likeliest of several is known."""
    return pd.DataFrame(
        {
            "variant": name,
            **{f"{rank} ms": f"{1e3 * made['call_s'][rank]:.0f}" for rank in ("p50", "p95", "p99", "mean")},
            "calls timed": f"{made['calls']}",
            "prompt tokens/s": f"{made['prefill_tokens_per_s']:.0f}",
            "reply tokens/s": f"{made['mean_new_tokens'] / made['call_s']['mean']:.0f}",
            "load s": f"{made['load_s']:.2f}",
        }
        for name, made in found["benchmark"].items()
    )


def clients(found: dict[str, Any]) -> pd.DataFrame:
    """Calls/s, p95, and shares of same and exact replies by number of concurrent clients."""

    def cell(level: dict[str, Any]) -> str:
        same, exact = level["same_reply_fraction"], level["exact_call_fraction"]
        return f"{level['calls_per_s']:.2f}/s, p95 {level['p95_s']:.2f} s, {same:.0%} same, {exact:.0%} exact"

    return pd.DataFrame(
        {
            "variant": name,
            **{f"{level['concurrency']} clients": cell(level) for level in made["by_concurrency"]},
        }
        for name, made in found["benchmark"].items()
    )


def size(found: dict[str, Any]) -> pd.DataFrame:
    full = found["benchmark"][REFERENCE]["model_bytes"]
    return pd.DataFrame(
        {
            "variant": name,
            "MB on disk": f"{made['model_bytes'] / 1e6:.0f}",
            f"size vs {REFERENCE}": f"{made['model_bytes'] / full:.0%}",
            "peak MB": f"{made['peak_rss_bytes'] / 1e6:.0f}",
        }
        for name, made in found["benchmark"].items()
    )


def projection(cost: dict[str, Any]) -> pd.DataFrame:
    def row(name: str, priced: dict[str, Any]) -> dict[str, str]:
        correct = priced["usd_per_thousand_correct_calls"]
        slow = "" if priced["within_p95_limit"] else f", p95 over {cost['p95_limit_s']:g} s"
        return {
            "variant": name,
            "clients": f"{priced['concurrency']}{slow}",
            "calls/day per machine": f"{priced['most_calls_per_day'] * cost['utilisation']:,.0f}",
            "USD per 1,000 calls": f"{priced['usd_per_thousand_calls']:.4f}",
            "USD per 1,000 exact calls": "" if correct is None else f"{correct:.4f}",
            "USD per million tokens": f"{priced['usd_per_million_tokens']:.3f}",
            "machines": f"{priced['machines']}",
            "USD per day": f"{priced['usd_per_day']:,.2f}",
            **{f"USD per {unit}": f"{priced[f'usd_per_{unit}']:,.0f}" for unit in ("month", "year")},
            f"saved against {BASELINE}": f"{priced['savings_fraction']:.0%}",
        }

    return pd.DataFrame([row(name, cost["variants"][name]) for name in LADDER])


def gpu_to_pay(cost: dict[str, Any], variant: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "GPU machine": gpu["name"],
                "GPU": ", ".join(gpu["gpus"]),
                "USD per hour": f"{gpu['usd_per_hour']:.2f}",
                f"calls/s to be cheaper than {variant}": f"{gpu['calls_per_s_to_pay'][variant]:,.0f}",
            }
            for gpu in cost["gpu_machines"]
        ]
    )


def hosted_is_reached(cost: dict[str, Any], variant: str) -> dict[str, Any] | None:
    """The cascade step that forwards the fewest calls and, in the best case, reaches the hosted model's accuracy."""
    steps: list[dict[str, Any]] = list(cost["variants"][variant]["cascade"].values())
    enough = [step for step in steps if step["exact_call_fraction"] >= cost["hosted"]["assumed_exact_fraction"]]
    return min(enough, key=lambda step: float(step["sent_fraction"]), default=None)


def cascade(cost: dict[str, Any], variant: str) -> pd.DataFrame:
    """One row per confidence below which calls are forwarded; the last is the hosted model alone."""

    def row(sent: str, kept: float, exact: tuple[float, float], usd: float, break_even: float | None) -> dict[str, str]:
        return {
            "forwarded": sent,
            "answered locally": f"{kept:.0%}",
            "exact calls, best case": f"{exact[0]:.1%}",
            "worst case": f"{exact[1]:.1%}",
            "USD per 1,000 calls": f"{usd:.3f}",
            "break-even calls/day": "" if break_even is None else f"{break_even:,.0f}",
        }

    rows = [
        row(
            "nothing" if float(threshold) == 0 else f"confidence below {float(threshold):g}",
            1 - found["sent_fraction"],
            (found["exact_call_fraction"], found["exact_call_fraction_at_worst"]),
            found["usd_per_thousand_calls"],
            found["break_even_calls_per_day"],
        )
        for threshold, found in sorted(cost["variants"][variant]["cascade"].items(), key=lambda pair: float(pair[0]))
    ]
    hosted = cost["hosted"]
    exact = hosted["assumed_exact_fraction"]
    alone = row("everything", 0, (exact, exact), hosted["usd_per_thousand_calls"], None)
    return pd.DataFrame([*rows, alone])


def examples(folder: Path, variants: Sequence[str]) -> str:
    """Every test request that at least one variant does not answer exactly, with all replies; then the other ids."""
    replies = {name: [row for _, row in files.read_jsonl(folder / f"{name}.replies.jsonl")] for name in variants}
    parts, right = ["# Replies side by side", "Test requests that at least one variant does not answer exactly."], []
    for rows in zip(*replies.values(), strict=True):
        if all(row["outcome"] == "exact" for row in rows):
            right.append(rows[0]["id"])
            continue
        parts += [f"## {rows[0]['id']}", "    " + rows[0]["request"].replace("\n", "\n    ")]
        same: dict[tuple[str, str], list[str]] = {}
        for name, row in zip(replies, rows, strict=True):
            same.setdefault((row["outcome"], row["reply"]), []).append(name)
        parts += [f"- {', '.join(names)}: **{outcome}** `{reply!r}`" for (outcome, reply), names in same.items()]
    return "\n\n".join([*parts, f"Exact with all variants: {', '.join(right)}.", ""])
