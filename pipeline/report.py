"""Stage `report`: one page that says which variant to ship and why.

Reads reports/*.json; writes reports/report.md, report.html and plots/.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import matplotlib as mpl
import pandas as pd
from omegaconf import DictConfig

from pipeline import config, files

mpl.use("Agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

LADDER = ("torch-fp32", "onnx-fp32", "fused-fp32", "int8", "int4")
SCORED = ("keyword", "base", *LADDER)
BASELINE, REFERENCE = "torch-fp32", "fused-fp32"


@dataclass
class ReportConfig:
    max_loss_fraction: float  # of exact calls that a recommended variant may lose against fp32

    def __post_init__(self) -> None:
        config.require_range("report.max_loss_fraction", self.max_loss_fraction, 0, 1)


@dataclass
class Params:
    paths: config.Paths
    report: ReportConfig


def run(reports: Path, cfg: ReportConfig) -> None:
    found = {
        "evaluate": {name: files.read_json(reports / "evaluate" / f"{name}.json") for name in SCORED},
        "benchmark": {name: files.read_json(reports / "benchmark" / f"{name}.json") for name in LADDER},
        "cost": files.read_json(reports / "cost.json"),
        "export": files.read_json(reports / "export.json"),
        "train": files.read_json(reports / "train.json"),
    }
    with files.whole_folder(reports / "plots") as folder:
        plot(found, reports, folder)
    text = markdown(found, cfg)
    files.write_text(reports / "report.md", text)
    files.write_text(reports / "report.html", html(text))
    log.info("report in %s", reports / "report.md")


def recommend(found: dict[str, Any], cfg: ReportConfig) -> str:
    """The fastest variant (p50 of a call) that loses at most max_loss_fraction of exact calls to fp32."""
    least = found["evaluate"][REFERENCE]["exact_call_fraction"] - cfg.max_loss_fraction
    passed = [name for name in LADDER if found["evaluate"][name]["exact_call_fraction"] >= least]
    return min(passed, key=lambda name: float(found["benchmark"][name]["call_s"]["p50"]))


def markdown(found: dict[str, Any], cfg: ReportConfig) -> str:
    best = recommend(found, cfg)
    bench, scored = found["benchmark"][best], found["evaluate"][best]
    machine = found["benchmark"][BASELINE]["provenance"]["machine"]
    faster = found["benchmark"][BASELINE]["call_s"]["p50"] / bench["call_s"]["p50"]
    different = found["evaluate"][REFERENCE]["different_from_torch"]
    return "\n\n".join(
        [
            "# Which variant to ship",
            f"**{best}**: {scored['exact_call_fraction']:.1%} of the calls exact, p50 "
            f"{1e3 * bench['call_s']['p50']:.0f} ms, {faster:.1f} times faster than {BASELINE}. Rule: the "
            f"fastest variant (p50) whose exact calls are at most {100 * cfg.max_loss_fraction:g} points below "
            f"{REFERENCE}'s.",
            ladder_table(found).to_markdown(index=False, disable_numparse=True),
            "## Beside the ladder",
            beside_table(found).to_markdown(index=False, disable_numparse=True),
            f"{scored['n']} requests written by hand; intervals are Wilson's at 95%; p is of the exact McNemar "
            f"test against {REFERENCE} on the same requests. {REFERENCE} and {BASELINE} differ on "
            f"{len(different)} replies{': ' if different else ''}{', '.join(different)}. "
            "The default base's weights were in 4 bits before they got here, which flatters INT4's loss.",
            "## By category (exact calls)",
            category_table(found).to_markdown(disable_numparse=True),
            "## How it was measured",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB. A call is "
            "request in to parsed call out, greedy, with the tools' prefix cached; each variant in a process of "
            f"its own, all in one run. Of a call {1e3 * bench['harness_call_s']:.1f} ms are not the model's (measured "
            "with a runtime whose tokens are known beforehand). Clients wait their turn: there is no batching yet. "
            f"Training: {found['train']['train_requests']} requests, {found['train']['train_s'] / 60:.0f} minutes. "
            f"Price: {found['cost']['machine']['name']} at {found['cost']['machine']['usd_per_hour']} USD an hour "
            f"({found['cost']['machine']['provider']}, {found['cost']['machine']['date']}).",
            *(f"![{name}](plots/{name}.png)" for name in ("loss", "accuracy", "latency", "throughput", "size", "cost")),
            "",
        ]
    )


def ladder_table(found: dict[str, Any]) -> pd.DataFrame:
    rows = []
    base = found["benchmark"][BASELINE]["call_s"]["p50"]
    for name in LADDER:
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
                "saved": f"{found['cost']['variants'][name]['savings_fraction']:.0%}",
            }
        )
    return pd.DataFrame(rows)


def beside_table(found: dict[str, Any]) -> pd.DataFrame:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    return pd.DataFrame(
        [
            {
                "variant": name,
                "exact calls": percent(scored["exact_call_fraction"]),
                "right tool": percent(scored["right_tool_fraction"]),
                "valid calls": percent(scored["valid_call_fraction"]),
                "calls where it must": percent(scored["must_call_fraction"]),
                "abstains where it must": percent(scored["abstain_fraction"]),
                "p against fp32": f"{scored['mcnemar_p_vs_fp32']:.3f}"
                if scored.get("mcnemar_p_vs_fp32") is not None
                else "",
            }
            for name, scored in found["evaluate"].items()
        ]
    )


def category_table(found: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            name: {category: f"{hit['exact_call_fraction']:.0%}" for category, hit in scored["by_category"].items()}
            for name, scored in found["evaluate"].items()
        }
    )


def html(text: str) -> str:
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)
    style = "body{font:16px sans-serif;max-width:70em;margin:auto;padding:1em}table{border-collapse:collapse}"
    style += "td,th{border:1px solid #ccc;padding:.3em .6em}img{max-width:100%}p,table{overflow-x:auto}"
    head = f"<!doctype html><meta charset=utf-8><title>Which variant to ship</title><style>{style}</style>"
    return f"{head}\n{body}"


def plot(found: dict[str, Any], reports: Path, folder: Path) -> None:
    _plot_loss(reports, folder)
    scored = found["evaluate"]
    fractions = [scored[name]["exact_call_fraction"] for name in SCORED]
    low = [f - scored[name]["exact_call_ci95"][0] for f, name in zip(fractions, SCORED, strict=True)]
    high = [scored[name]["exact_call_ci95"][1] - f for f, name in zip(fractions, SCORED, strict=True)]
    _bars(folder / "accuracy.png", SCORED, fractions, "exact calls (fraction)", (low, high))
    bench = found["benchmark"]
    _bars(folder / "size.png", LADDER, [bench[n]["model_bytes"] / 1e6 for n in LADDER], "MB on disk")
    costs = [found["cost"]["variants"][n]["usd_per_million_tokens"] for n in LADDER]
    _bars(folder / "cost.png", LADDER, costs, "USD per million tokens")
    figure, axes = plt.subplots(figsize=(7, 4))
    samples = [files.read_json(reports / "benchmark" / f"{n}.samples.json")["call_s"] for n in LADDER]
    axes.boxplot(samples, tick_labels=list(LADDER), whis=(5, 95), showfliers=False)
    axes.set_ylabel("seconds per call (box: quartiles, whiskers: p5, p95)")
    _save(figure, folder / "latency.png")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in LADDER:
        levels = bench[name]["by_concurrency"]
        clients = [level["concurrency"] for level in levels]
        axes.plot(clients, [level["calls_per_s"] for level in levels], marker="o", label=name)
    axes.set(xlabel="concurrent clients", ylabel="calls per second", ylim=(0, None))
    axes.legend()
    _save(figure, folder / "throughput.png")


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


@hydra.main(version_base="1.3", config_path="..", config_name="params")
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.reports, params.report)


if __name__ == "__main__":
    main()
