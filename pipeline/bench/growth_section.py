"""The report's section on how time and memory grow, and its pictures, where reports/growth.json exists."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import LogLocator

from pipeline import files
from pipeline.bench.picture import canvas, line

Row = dict[str, Any]


def read(reports: Path) -> dict[str, Any]:
    """The measured parts, by name."""
    path = reports / "growth.json"
    return dict(files.read_json(path)) if path.exists() else {}


def markdown(found: dict[str, Any]) -> list[str]:
    """The section's paragraphs; none if nothing was measured."""
    parts = [f"### {TITLES[name]}\n\n{PARAGRAPHS[name](found[name])}" for name in TITLES if name in found]
    return ["## How time and memory grow", ABOUT, *parts] if parts else []


def limit_calls_per_s(row: Row) -> float:
    """The lower of the limits by bandwidth and by arithmetic."""
    return float(min(row["limits_calls_per_s"].values()))


def prompt(part: dict[str, Any]) -> str:
    rows = []
    for name, variant in part["variants"].items():
        for row in variant["by_tokens"]:
            rows.append(
                {
                    "variant": name,
                    "tokens": row["prompt_tokens"],
                    "p50 ms": f"{1e3 * row['call_s']['p50']:.0f}",
                    "limit ms": f"{1e3 * row['limit_call_s']:.0f}",
                    "share of limit": f"{row['limit_call_s'] / row['call_s']['p50']:.0%}",
                    "peak MB": f"{row['peak_rss_bytes'] / 1e6:.0f}",
                    "resident MB": f"{row['rss_bytes'] / 1e6:.0f}",
                    "weights and KV cache MB": f"{row['limit_memory_bytes'] / 1e6:.0f}",
                }
            )
    prefix = next(iter(part["variants"].values()))["prefix_tokens"]
    return _paragraphs(
        "prompt",
        part,
        f"Requests of increasing length after a cached prefix of {prefix} tokens; a fixed number of new tokens, one "
        "per step, without grammar. Each row is a separate process. Time limit: the prompt's multiplications and "
        "additions (including causal attention) at the rate of a large product, then for each new token reading the "
        "weights and the KV cache at the memory bandwidth. Memory limit: weights and KV cache.",
        rows,
    )


def clients(part: dict[str, Any]) -> str:
    rows = []
    for name, variant in part["variants"].items():
        for row in variant["by_clients"]:
            limit = limit_calls_per_s(row)
            rows.append(
                {
                    "variant": name,
                    "clients": row["concurrency"],
                    "calls/s": f"{row['calls_per_s']:.1f}",
                    "limit calls/s": f"{limit:.1f}",
                    "limited by": min(row["limits_calls_per_s"], key=row["limits_calls_per_s"].__getitem__),
                    "share of limit": f"{row['calls_per_s'] / limit:.0%}",
                    "p50 ms": f"{1e3 * row['p50_s']:.0f}",
                    "p95 ms": f"{1e3 * row['p95_s']:.0f}",
                    "errors": f"{row['error_fraction']:.0%}",
                }
            )
    counted = "; ".join(
        f"{name}: {v['asked']['steps']:.1f} steps, {v['asked']['tokens']:.0f} tokens"
        for name, v in part["variants"].items()
    )
    together = next(iter(part["variants"].values()))["together"]
    return _paragraphs(
        "clients",
        part,
        f"Test requests with all techniques, up to {together} decoded together. The limit is the lower of two: "
        "bandwidth (a step reads the weights once for all requests decoded together) and arithmetic (not shared), both "
        f"for the counted work per call ({counted}). The dotted line beside p95 is the mean time per call at that "
        "limit: clients over calls/s.",
        rows,
    )


def sizes(part: dict[str, Any]) -> str:
    rows = []
    for name, variant in part["variants"].items():
        for row in variant["by_shape"]:
            rows.append(
                {
                    "variant": name,
                    "shape": row["shape"],
                    "million weights": f"{row['weights'] / 1e6:.0f}",
                    "MB on disk": f"{row['model_bytes'] / 1e6:.0f}",
                    "p50 ms": f"{1e3 * row['call_s']['p50']:.0f}",
                    "limit ms": f"{1e3 * row['limit_call_s']:.0f}",
                    "share of limit": f"{row['limit_call_s'] / row['call_s']['p50']:.0%}",
                    "peak MB": f"{row['peak_rss_bytes'] / 1e6:.0f}",
                }
            )
    return _paragraphs(
        "sizes",
        part,
        "The default model's settings at the shapes of larger models, with random weights, so only speed means "
        "anything. Calls of fixed lengths, without grammar. The limit is computed as for request length: mostly "
        "reading the weights once per new token at the memory bandwidth.",
        rows,
    )


ABOUT = (
    "`python -m pipeline.growth`. Dotted lines are limits from the machine's speed, measured in the same run: memory "
    "bandwidth, and large matrix products in float32 (for attention, and the weights of fused-fp32) and in 8-bit "
    "integers (for the weights of int8, and of int4, which are unpacked to 8 bits). Only a model that fits the "
    "processor's caches could exceed the bandwidth limit. Each part names its commit and machine: the weights may "
    "differ from today's, and the machine from that of the tables above."
)
TITLES = {
    "prompt": "Request length",
    "clients": "Number of clients",
    "sizes": "Model size: speed only, random weights",
}
PARAGRAPHS: dict[str, Callable[[dict[str, Any]], str]] = {"prompt": prompt, "clients": clients, "sizes": sizes}


def _paragraphs(name: str, part: dict[str, Any], text: str, rows: Sequence[Row]) -> str:
    machine, where = part["machine"], part["provenance"]["machine"]
    measured = (
        f"At commit {(part['provenance']['commit'] or 'unknown')[:7]}, on {where['cpu']}, {where['cores']} cores: "
        f"{machine['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"{machine['float32_operations_per_s'] / 1e9:.0f} billion operations/s in float32, "
        f"{machine['int8_operations_per_s'] / 1e9:.0f} in 8-bit integers."
    )
    table = str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    folded = ["<details><summary>Table</summary>", table, "</details>"]
    return "\n\n".join([f"![{TITLES[name]}: measured, and the limit](growth-{name}.png)", text, measured, *folded])


def plots(found: dict[str, Any], reports: Path) -> None:
    """Write growth-*.png of the measured parts into `reports`."""
    for name, draw in (("prompt", _plot_prompt), ("clients", _plot_clients), ("sizes", _plot_sizes)):
        if name not in found:
            continue
        with canvas(
            reports / f"growth-{name}.png", f"{TITLES[name]} (dotted: the limit)", 2.9 if name == "sizes" else 5
        ) as figure:
            draw(found[name]["variants"], figure.subplots(1 if name == "sizes" else 2, 1))


def _plot_prompt(variants: dict[str, Any], axes: Any) -> None:
    for name, variant in variants.items():
        rows = variant["by_tokens"]
        tokens = [row["prompt_tokens"] for row in rows]
        _curve(axes[0], name, tokens, [r["call_s"]["p50"] for r in rows], [r["limit_call_s"] for r in rows])
        memory = [row["peak_rss_bytes"] / 1e6 for row in rows]
        _curve(axes[1], name, tokens, memory, [row["limit_memory_bytes"] / 1e6 for row in rows])
    for one, label in zip(axes, ("p50 of a call (s)", "peak memory (MB)"), strict=True):
        one.set(xlabel="request tokens", ylabel=label, xscale="log", yscale="log")
        _ticks(one, sorted({row["prompt_tokens"] for v in variants.values() for row in v["by_tokens"]}))
    axes[0].legend(fontsize=7)


def _plot_clients(variants: dict[str, Any], axes: Any) -> None:
    for name, variant in variants.items():
        rows = variant["by_clients"]
        clients = [row["concurrency"] for row in rows]
        limit = [limit_calls_per_s(row) for row in rows]
        _curve(axes[0], name, clients, [row["calls_per_s"] for row in rows], limit)
        at_limit = [n / most for n, most in zip(clients, limit, strict=True)]
        _curve(axes[1], name, clients, [row["p95_s"] for row in rows], at_limit)
    axes[0].set(xlabel="clients", ylabel="throughput (calls/s)", xscale="log", ylim=(0, None))
    axes[1].set(xlabel="clients", ylabel="p95 of a call (s)", xscale="log", yscale="log")
    for one in axes:
        _ticks(one, sorted({row["concurrency"] for v in variants.values() for row in v["by_clients"]}))
    axes[0].legend(fontsize=7)


def _plot_sizes(variants: dict[str, Any], axes: Any) -> None:
    for name, variant in variants.items():
        rows = sorted(variant["by_shape"], key=lambda row: int(row["weights"]))
        weights = [row["weights"] / 1e6 for row in rows]
        _curve(axes, name, weights, [r["call_s"]["p50"] for r in rows], [r["limit_call_s"] for r in rows])
    axes.set(xlabel="million weights", ylabel="p50 of a call (s)", xscale="log", yscale="log")
    _ticks(axes, sorted({round(row["weights"] / 1e6) for v in variants.values() for row in v["by_shape"]}))
    axes.legend(fontsize=7)


def _curve(axes: Any, name: str, x: Sequence[float], measured: Sequence[float], limit: Sequence[float]) -> None:
    style = line(name, "")
    axes.plot(x, measured, label=name, **style)
    axes.plot(x, limit, color=style["color"], linestyle=":")


def _ticks(axes: Any, values: Sequence[float]) -> None:
    axes.set_xticks(values, labels=[str(value) for value in values])
    axes.minorticks_off()
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
