"""Our variants compared with other runtimes: a page and a picture of reports/peers.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import files
from pipeline.bench.picture import COLOURS, PALE, bars, canvas
from pipeline.bench.statistics import wilson_interval

SIDES = ("ours", "peers")
FIGURES: dict[
    str, tuple[Callable[[dict[str, Any]], float | None], bool]
] = {  # how to read it from a row, and whether more is better
    "p50 ms": (lambda found: 1e3 * found["call_s"]["p50"], False),
    "p95 ms": (lambda found: 1e3 * found["call_s"]["p95"], False),
    "prefill tokens/s": (lambda found: found["prefill_tokens_per_s"], True),
    "decode tokens/s": (lambda found: found["decode_tokens_per_s"], True),
    "calls/s at 20": (lambda found: found["calls_per_s_at_20"], True),
    "MB on disk": (lambda found: found["model_bytes"] / 1e6, False),
    "peak MB": (lambda found: found["peak_rss_bytes"] and found["peak_rss_bytes"] / 1e6, False),
    "load s": (lambda found: found["load_s"], False),
}


def read(reports: Path) -> dict[str, Any] | None:
    """The report of `make peers`, or None if it did not run."""
    path = reports / "peers.json"
    found: dict[str, Any] | None = files.read_json(path) if path.exists() else None
    return found


def table(report: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for side in SIDES:
        for name, found in report[side].items():
            figures = {key: _short(read(found)) for key, (read, _) in FIGURES.items()}
            has = {"prefix cache": _yes(found["prefix_cache"]), "grammar": _yes(found["grammar"])}
            rows.append({"runtime": name, "exact calls": f"{found['exact_call_fraction']:.1%}", **figures, **has})
    return pd.DataFrame(rows)


def best(report: dict[str, Any]) -> list[str]:
    """For each metric the best of both sides, so that a peer's advantage shows."""
    lines = []
    for key, (read, more) in FIGURES.items():
        firsts = []
        for side in SIDES:
            values = [(value, name) for name, found in report[side].items() if (value := read(found)) is not None]
            if values:
                firsts.append(max(values) if more else min(values))
        if len(firsts) == 2:
            (ours, our), (theirs, peer) = firsts
            ratio = ours / theirs if more else theirs / ours
            verdict = f"{ratio:.2f} times better" if ratio >= 1 else f"**the peer is {1 / ratio:.2f} times better**"
            lines.append(f"- {key}: {our} {_short(ours)}, {peer} {_short(theirs)}: {verdict}")
    return lines


def as_right(report: dict[str, Any]) -> list[str]:
    """For each of our variants the fastest peer with at least as many exact calls."""
    lines = []
    for name, found in report["ours"].items():
        exact, p50_ms = found["exact_call_fraction"], 1e3 * found["call_s"]["p50"]
        peers = [
            (1e3 * other["call_s"]["p50"], peer)
            for peer, other in report["peers"].items()
            if other["exact_call_fraction"] >= exact
        ]
        theirs = "none"
        if peers:
            fastest_ms, peer = min(peers)
            theirs = f"{peer}, {_short(fastest_ms)} ms: {fastest_ms / p50_ms:.2f} times our time"
        lines.append(f"- {name}, {exact:.1%} exact, {_short(p50_ms)} ms: {theirs}")
    return lines


def requests(report: dict[str, Any]) -> str:
    """Their number, and the uncertainty of exact calls with so few: half the widest interval."""
    n = report["requests"]
    hits = [round(n * found["exact_call_fraction"]) for side in SIDES for found in report[side].values()]
    half = max((high - low) / 2 for low, high in (wilson_interval(hit, n) for hit in hits))
    return (
        f"{n} test requests (each is {100 / n:.1f} points of exact calls; 95% Wilson intervals are up to "
        f"{100 * half:.0f} points to either side)"
    )


def markdown(report: dict[str, Any]) -> str:
    machine = report["provenance"]["machine"]
    agreed = [f"{name} {found['same_reply_fraction']:.0%}" for name, found in report["peers"].items()]
    return "\n\n".join(
        [
            "# Comparison with other runtimes",
            f"The same tuned model, greedy decoding (ours with a grammar: all techniques), {requests(report)}, one run "
            f"on {machine['cpu']}, {machine['cores']} cores. Peers get the prompt as tokens; our calls include "
            "tokenizing and parsing. For runtimes without batching, calls/s at 20 clients are those of one client. "
            "Prefill and decode: 256 random tokens, then 64 more, one token per step.",
            table(report).to_markdown(index=False, disable_numparse=True),
            "![p50 of a call and exact calls](peers.png)",
            "## Best of both sides by metric",
            "\n".join(best(report)) or "No peer was measured.",
            "## Fastest peer that is at least as accurate",
            "\n".join(as_right(report)),
            "## Check that the model is the same",
            f"Share of {report['check_requests']} replies identical to torch-fp32's, token by token, with weights in "
            f"full precision: {', '.join(agreed) or 'none measured'}.",
            "## Left out",
            "\n".join(f"- {name}: {why}" for name, why in report["left_out"].items()) or "None.",
            "## Versions and builds",
            "\n".join(
                f"- {name}: {found['version']}, {found['weights']}; {found['build']}"
                for side in SIDES
                for name, found in report[side].items()
            ),
            "",
        ]
    )


def plot(report: dict[str, Any], path: Path) -> str:
    """p50 and exact calls of all, fastest first, ours in their colours. Returns the text alternative."""
    both = {**report["ours"], **report["peers"]}
    names = sorted(both, key=lambda name: float(both[name]["call_s"]["p50"]))
    ms = {name: 1e3 * both[name]["call_s"]["p50"] for name in names}
    texts = {name: f"{_short(ms[name])} ms, {both[name]['exact_call_fraction']:.0%} exact" for name in names}
    firsts = [next((name for name in names if name in report[side]), None) for side in SIDES]

    ours, peer = firsts
    title = f"p50 of a call: {ours} {_short(ms[ours])} ms" if ours else "Other runtimes"
    if peer:
        title += f"; fastest other runtime ({peer}) {_short(ms[peer])} ms"
    with canvas(path, title, 0.7 + 0.25 * len(names)) as figure:
        axes = figure.subplots()
        colours = [COLOURS.get(name, PALE) if name in report["ours"] else PALE for name in names]
        bars(axes, names, list(ms.values()), list(texts.values()), colours, room=1.8)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() in report["ours"] else "normal")
    words = "; ".join(f"{name} {text}" for name, text in texts.items())
    return f"{title}. p50 and exact calls: {words}."


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
