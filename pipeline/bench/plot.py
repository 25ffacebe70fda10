"""The report's pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from pipeline import files

mpl.use("Agg")
from matplotlib import pyplot as plt

Names = Sequence[str]
plt.rcParams.update({"figure.figsize": (4.8, 3.2), "font.size": 9, "savefig.dpi": 180})  # can be read on a phone


def all_plots(found: dict[str, Any], reports: Path, folder: Path, names: tuple[Names, Names]) -> None:
    """Into `folder`. `names`: the scored variants, and those of them that were benchmarked."""
    every, ladder = names
    _plot_loss(reports, folder)
    scored = found["evaluate"]
    fractions = [scored[name]["exact_call_fraction"] for name in every]
    low = [f - scored[name]["exact_call_ci95"][0] for f, name in zip(fractions, every, strict=True)]
    high = [scored[name]["exact_call_ci95"][1] - f for f, name in zip(fractions, every, strict=True)]
    _bars(folder / "accuracy.png", every, fractions, "exact calls (fraction)", (low, high))
    bench = found["benchmark"]
    _bars(folder / "size.png", ladder, [bench[n]["model_bytes"] / 1e6 for n in ladder], "MB on disk")
    costs = [found["cost"]["variants"][n]["usd_per_million_tokens"] for n in ladder]
    _bars(folder / "cost.png", ladder, costs, "USD per million tokens")
    figure, axes = plt.subplots()
    samples = [files.read_json(reports / "benchmark" / f"{n}.samples.json")["call_s"] for n in ladder]
    axes.boxplot(samples, tick_labels=list(ladder), whis=(5, 95), showfliers=False)
    axes.set(ylabel="seconds per call", title="Box: quartiles; whiskers: p5 and p95")
    _save(figure, folder / "latency.png")
    figure, axes = plt.subplots()
    for name in ladder:
        levels = bench[name]["by_concurrency"]
        clients = [level["concurrency"] for level in levels]
        axes.plot(clients, [level["calls_per_s"] for level in levels], marker="o", label=name)
    axes.set(xlabel="concurrent clients", ylabel="calls per second", ylim=(0, None))
    axes.legend()
    _save(figure, folder / "throughput.png")
    _plot_calibration(scored, ladder, folder)


def _plot_loss(reports: Path, folder: Path) -> None:
    figure, axes = plt.subplots()
    for name, label in (("train/loss", "training"), ("eval/loss", "validation")):
        curve = pd.read_csv(reports / "train" / "plots" / "metrics" / f"{name}.tsv", sep="\t")
        axes.plot(curve["step"], curve.iloc[:, -1], label=label, marker="." if label == "validation" else "")
    axes.set(xlabel="step", ylabel="loss (nats per reply token)", yscale="log")
    axes.legend()
    _save(figure, folder / "loss.png")


def _bars(path: Path, names: Any, values: list[float], label: str, error: Any = None) -> None:
    figure, axes = plt.subplots()
    bars = axes.barh(list(names), values, xerr=error, capsize=3)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.margins(x=0.2)  # room for the figures beside the bars
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plot_calibration(scored: dict[str, Any], names: Names, folder: Path) -> None:
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    for name in names:
        parts = scored[name]["calibration"]["reliability"]
        error = scored[name]["calibration"]["expected_calibration_error"]
        label = name if error is None else f"{name} ({error:.3f})"
        axes.plot([p["mean_confidence"] for p in parts], [p["right_fraction"] for p in parts], marker="o", label=label)
    axes.set(xlabel="confidence in a call", ylabel="exact calls (fraction)")
    axes.legend(title="expected calibration error", fontsize=7, title_fontsize=7)
    _save(figure, folder / "reliability.png")
    figure, axes = plt.subplots()
    for name in names:
        curve = scored[name]["calibration"]["risk_coverage"]
        axes.plot([kept for kept, _ in curve], [wrong for _, wrong in curve], label=name)
    axes.set(xlabel="calls kept, most confident first", ylabel="wrong among them", ylim=(0, None))
    axes.legend()
    _save(figure, folder / "risk-coverage.png")
