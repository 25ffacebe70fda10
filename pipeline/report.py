"""Stage `report`: one page that says which variant to ship and why.

Reads reports/*.json; writes reports/report.md, report.html and plots/.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import plot
from pipeline.provenance import provenance

log = logging.getLogger(__name__)

LADDER = ("torch-fp32", "onnx-fp32", "fused-fp32", "int8", "int4")
SCORED = ("keyword", "base", *LADDER)
PLOTS = ("loss", "accuracy", "latency", "throughput", "size", "cost", "reliability", "risk-coverage")
BASELINE, REFERENCE = "torch-fp32", "fused-fp32"


@dataclass
class ReportConfig:
    max_loss_fraction: float  # of exact calls that a recommended variant may lose against fp32
    significance: float  # one that loses, with a McNemar p below this, does not pass either
    min_exact_fraction: float  # below this nothing is recommended
    gate: bool  # write nothing, fail where no variant passes

    def __post_init__(self) -> None:
        config.require_range("report.significance", self.significance, 0, 1)
        config.require_range("report.min_exact_fraction", self.min_exact_fraction, 0, 1)
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
    faults = {name: fault(found["evaluate"][name], found["evaluate"][REFERENCE], cfg) for name in LADDER}
    best = recommend(found, faults)
    if cfg.gate:  # it only asks: the reports stay as the stage left them
        if best is None:
            raise RuntimeError(f"no variant passes the gate: {faults}")
        return
    with files.whole_folder(reports / "plots") as folder:
        plot.all_plots(found, reports, folder, (SCORED, LADDER))
    text = markdown(found, faults, best, cfg)
    files.write_text(reports / "report.md", text)
    files.write_text(reports / "report.html", html(text))
    files.write_text(reports / "examples.md", examples(reports / "evaluate"))
    passed = {name: {"passed": why is None, "why_not": why} for name, why in faults.items()}
    files.write_json(reports / "report.json", {"recommended": best, "variants": passed, "provenance": provenance(cfg)})
    log.info("recommended: %s; report in %s", best, reports / "report.md")


def fault(scored: dict[str, Any], reference: dict[str, Any], cfg: ReportConfig) -> str | None:
    """Why a variant is not to be shipped, or None."""
    exact = scored["exact_call_fraction"]
    lost = reference["exact_call_fraction"] - exact
    p = scored.get("mcnemar_p_vs_fp32")
    if exact < cfg.min_exact_fraction:
        return f"{exact:.1%} exact, under {cfg.min_exact_fraction:.0%}"
    if lost > cfg.max_loss_fraction:
        return f"{100 * lost:.1f} points below {REFERENCE}"
    if lost > 0 and p is not None and p < cfg.significance:
        return f"below {REFERENCE} beyond chance, p = {p:.3f}"
    return None


def recommend(found: dict[str, Any], faults: dict[str, str | None]) -> str | None:
    """The fastest variant (p50 of a call) without a fault."""
    passed = [name for name, why in faults.items() if why is None]
    return min(passed, key=lambda name: float(found["benchmark"][name]["call_s"]["p50"]), default=None)


def verdict(found: dict[str, Any], best: str | None, cfg: ReportConfig) -> str:
    rule = (
        f"Rule: the fastest variant (p50) that has at least {cfg.min_exact_fraction:.0%} exact calls, at most "
        f"{100 * cfg.max_loss_fraction:g} points fewer than {REFERENCE}, and not significantly fewer "
        f"(McNemar p at least {cfg.significance:g})."
    )
    if best is None:
        return f"**None passes.** {rule}"
    bench, exact = found["benchmark"][best], found["evaluate"][best]["exact_call_fraction"]
    faster = found["benchmark"][BASELINE]["call_s"]["p50"] / bench["call_s"]["p50"]
    return (
        f"**{best}**: {exact:.1%} of the calls exact, p50 {1e3 * bench['call_s']['p50']:.0f} ms, {faster:.1f} times "
        f"faster than {BASELINE}. {rule}"
    )


def markdown(found: dict[str, Any], faults: dict[str, str | None], best: str | None, cfg: ReportConfig) -> str:
    bench, scored = found["benchmark"][best or REFERENCE], found["evaluate"][best or REFERENCE]
    machine = found["benchmark"][BASELINE]["provenance"]["machine"]
    different = found["evaluate"][REFERENCE]["different_from_torch"]
    return "\n\n".join(
        [
            "# Which variant to ship",
            verdict(found, best, cfg),
            ladder_table(found, faults).to_markdown(index=False, disable_numparse=True),
            "## Beside the ladder",
            beside_table(found).to_markdown(index=False, disable_numparse=True),
            f"{scored['n']} requests written by hand; intervals are Wilson's at 95%; p is of the exact McNemar "
            f"test against {REFERENCE} on the same requests. Where the grammar changed nothing, {REFERENCE} and "
            f"{BASELINE} differ on {len(different)} replies{': ' if different else ''}{', '.join(different)}. "
            "The default base's weights were in 4 bits before they got here, which flatters INT4's loss.",
            "## By category (exact calls)",
            category_table(found).to_markdown(disable_numparse=True),
            "## By outcome",
            outcome_table(found).to_markdown(disable_numparse=True),
            f"## Which tool was called ({scored['variant']}; rows: the right one)",
            confusion_table(scored).to_markdown(disable_numparse=True),
            "Replies of all variants side by side: [examples.md](examples.md).",
            "## How it was measured",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB. A call is "
            "request in to parsed call out, greedy, with the tools' prefix cached; each variant in a process of "
            f"its own, all in one run. Of a call {1e3 * bench['harness_call_s']:.1f} ms are not the model's (measured "
            "with a runtime whose tokens are known beforehand). Clients wait their turn: there is no batching yet. "
            f"{BASELINE} and onnx-fp32 decode token by token; the others hold a call to the tools' grammar, append "
            "what it forces in one step, and check drafts copied from the request. "
            f"Training: {found['train']['train_requests']} requests, {found['train']['train_s'] / 60:.0f} minutes. "
            f"Price: {found['cost']['machine']['name']} at {found['cost']['machine']['usd_per_hour']} USD an hour "
            f"({found['cost']['machine']['provider']}, {found['cost']['machine']['date']}).",
            *(f"![{name}](plots/{name}.png)" for name in PLOTS),
            "",
        ]
    )


def ladder_table(found: dict[str, Any], faults: dict[str, str | None]) -> pd.DataFrame:
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
                "passes": faults[name] or "yes",
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
                "changed by the grammar": percent(scored["constraint_changed_fraction"]),
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


def outcome_table(found: dict[str, Any]) -> pd.DataFrame:
    rows = {name: scored["outcomes"] for name, scored in found["evaluate"].items()}
    return pd.DataFrame(rows).fillna(0).astype(int)


def confusion_table(scored: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(scored["confusion"]).T.fillna(0).astype(int).sort_index()
    return table[sorted(table.columns)]


def examples(folder: Path) -> str:
    """Every test request that not all variants answer right, with each one's reply; then the ids of the rest."""
    replies = {name: [row for _, row in files.read_jsonl(folder / f"{name}.replies.jsonl")] for name in LADDER}
    parts, right = ["# Replies side by side", "Of the test requests that not all variants answer exactly."], []
    for rows in zip(*replies.values(), strict=True):
        if all(row["outcome"] == "exact" for row in rows):
            right.append(rows[0]["id"])
            continue
        parts += [f"## {rows[0]['id']}", "    " + rows[0]["request"].replace("\n", "\n    ")]
        same: dict[tuple[str, str], list[str]] = {}
        for name, row in zip(replies, rows, strict=True):
            same.setdefault((row["outcome"], row["reply"]), []).append(name)
        parts += [f"- {', '.join(names)}: **{outcome}** `{reply!r}`" for (outcome, reply), names in same.items()]
    return "\n\n".join([*parts, f"All right: {', '.join(right)}.", ""])


def html(text: str) -> str:
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)
    style = "body{font:16px sans-serif;max-width:70em;margin:auto;padding:1em}table{border-collapse:collapse}"
    style += "td,th{border:1px solid #ccc;padding:.3em .6em}img{max-width:100%}p,table{overflow-x:auto}"
    head = f"<!doctype html><meta charset=utf-8><title>Which variant to ship</title><style>{style}</style>"
    return f"{head}\n{body}"


@hydra.main(version_base="1.3", config_path="..", config_name="params")
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.reports, params.report)


if __name__ == "__main__":
    main()
