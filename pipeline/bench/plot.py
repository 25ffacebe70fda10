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
    figure, axes = plt.subplots(figsize=(7, 4))
    samples = [files.read_json(reports / "benchmark" / f"{n}.samples.json")["call_s"] for n in ladder]
    axes.boxplot(samples, tick_labels=list(ladder), whis=(5, 95), showfliers=False)
    axes.set_ylabel("seconds per call (box: quartiles, whiskers: p5, p95)")
    _save(figure, folder / "latency.png")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in ladder:
        levels = bench[name]["by_concurrency"]
        clients = [level["concurrency"] for level in levels]
        axes.plot(clients, [level["calls_per_s"] for level in levels], marker="o", label=name)
    axes.set(xlabel="concurrent clients", ylabel="calls per second", ylim=(0, None))
    axes.legend()
    _save(figure, folder / "throughput.png")
    _plot_calibration(scored, ladder, folder)


def _plot_loss(reports: Path, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, label in (("train/loss", "training"), ("eval/loss", "validation")):
        curve = pd.read_csv(reports / "train" / "plots" / "metrics" / f"{name}.tsv", sep="\t")
        axes.plot(curve["step"], curve.iloc[:, -1], label=label, marker="." if label == "validation" else "")
    axes.set(xlabel="step", ylabel="loss (nats per reply token)", yscale="log")
    axes.legend()
    _save(figure, folder / "loss.png")


def _bars(path: Path, names: Any, values: list[float], label: str, error: Any = None) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    bars = axes.bar(list(names), values, yerr=error, capsize=4)
    axes.bar_label(bars, fmt="%.3g", label_type="center", color="white")
    axes.set_ylabel(label)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_calibration(scored: dict[str, Any], names: Names, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    for name in names:
        parts = scored[name]["calibration"]["reliability"]
        error = scored[name]["calibration"]["expected_calibration_error"]
        label = name if error is None else f"{name} (expected calibration error {error:.3f})"
        axes.plot([p["mean_confidence"] for p in parts], [p["right_fraction"] for p in parts], marker="o", label=label)
    axes.set(xlabel="confidence in a call", ylabel="exact calls (fraction)")
    axes.legend()
    _save(figure, folder / "reliability.png")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in names:
        curve = scored[name]["calibration"]["risk_coverage"]
        axes.plot([kept for kept, _ in curve], [wrong for _, wrong in curve], label=name)
    axes.set(xlabel="calls kept, most confident first (fraction)", ylabel="wrong among them (fraction)", ylim=(0, None))
    axes.legend()
    _save(figure, folder / "risk-coverage.png")
