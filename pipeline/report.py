"""Stage `report`: one page that says which variant to ship and why.

Reads reports/*.json, also of a GPU and of growth where they exist; writes reports/report.md, report.html and plots/.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import against, gpu_section, growth_section, page, plot, tables
from pipeline.provenance import provenance

log = logging.getLogger(__name__)

TITLE = "Which variant to ship"
LADDER = ("torch-fp32", "onnx-fp32", "fused-fp32", "int8", "int4")
SCORED = ("keyword", "base", *LADDER)
PLOTS = ("loss", "accuracy", "latency", "throughput", "size", "cost", "reliability", "risk-coverage")
BASE, BASELINE, REFERENCE = "base", "torch-fp32", "fused-fp32"


@dataclass
class ReportConfig:
    max_loss_fraction: float  # of exact calls that a recommended variant may lose against fp32
    significance: float  # one that loses, with a McNemar p below this, does not pass either
    min_exact_fraction: float  # below this nothing is recommended
    gate: bool  # write nothing, fail where no variant passes
    against: str | None  # write nothing, show what changed since this revision

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
        "cuda": gpu_section.read(reports),
        "growth": growth_section.read(reports),
    }
    require_one_run(found)
    faults = {name: fault(found["evaluate"][name], found["evaluate"][REFERENCE], cfg) for name in LADDER}
    best = recommend(found, faults)
    if cfg.gate:  # it only asks: the reports stay as the stage left them
        if best is None:
            raise RuntimeError(f"no variant passes the gate: {faults}")
        return
    if cfg.against:
        sides = against.of_revision(reports, cfg.against), against.of_folder(reports)
        table = against.changes(*sides, LADDER, cfg.significance)
        log.info("since %s:\n\n%s", cfg.against, table.to_markdown(index=False, disable_numparse=True))
        return
    with files.whole_folder(reports / "plots") as folder:
        plot.all_plots(found, reports, folder, (SCORED, LADDER))
    text = markdown(found, faults, best, cfg)
    replies = tables.examples(reports / "evaluate", LADDER)
    files.write_text(reports / "report.md", text)
    files.write_text(reports / "examples.md", replies)
    body = text.replace("[examples.md](examples.md)", "at the end of this page")
    body = body.replace("[peers.md](peers.md)", "reports/peers.md")
    files.write_text(reports / "report.html", page.html(TITLE, body, reports, {"Replies side by side": replies}))
    passed = {name: {"passed": why is None, "why_not": why} for name, why in faults.items()}
    files.write_json(reports / "report.json", {"recommended": best, "variants": passed, "provenance": provenance(cfg)})
    log.info("recommended: %s; report in %s", best, reports / "report.md")


def require_one_run(found: dict[str, Any]) -> None:
    """Raises ValueError where variants were scored or timed with different settings, or on different machines."""
    runs: dict[str, dict[tuple[object, ...], list[str]]] = {"evaluate": {}, "benchmark": {}}
    for stage, seen in runs.items():
        for name in LADDER:
            origin = found[stage][name]["provenance"]
            machine = (origin["machine"]["cpu"], origin["machine"]["cores"]) if stage == "benchmark" else ()
            seen.setdefault((origin["settings_sha256"], *machine), []).append(name)
        if len(seen) > 1:
            raise ValueError(
                f"reports/{stage} is of different runs (settings or machines): "
                f"{' / '.join(', '.join(names) for names in seen.values())}; dvc repro -s -f {stage} makes them anew"
            )


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
            f"# {TITLE}",
            verdict(found, best, cfg),
            tables.ladder(found, faults, BASELINE).to_markdown(index=False, disable_numparse=True),
            "## Beside the ladder",
            tables.beside(found).to_markdown(index=False, disable_numparse=True),
            f"{scored['n']} requests written by hand ({BASE}: {found['evaluate'][BASE]['n']} of them). "
            f"Intervals are Wilson's at 95%; p is of the exact McNemar test against "
            f"{REFERENCE} on the same requests. Where decoding left the likeliest next tokens as they "
            f"are, {REFERENCE} and "
            f"{BASELINE} differ on {len(different)} replies{': ' if different else ''}{', '.join(different)}. "
            "The default base's weights were in 4 bits before they got here, which flatters INT4's loss.",
            "## By category (exact calls)",
            tables.category(found).to_markdown(disable_numparse=True),
            "## By outcome",
            tables.outcome(found).to_markdown(disable_numparse=True),
            f"## Which tool was called ({scored['variant']}; rows: the right one)",
            tables.confusion(scored).to_markdown(disable_numparse=True),
            "## What each technique brings (p50 of a whole call)",
            tables.ablation(found).to_markdown(disable_numparse=True),
            "The same requests in turn, one client; `same`: replies that are those with all techniques. "
            "The grammar and the search for a likelier call change replies by design; what else differs is rounding: "
            "how many tokens a step has decides how the quantized variants round.",
            f"## With a larger model behind it ({scored['variant']})",
            tables.cascade(found["cost"], scored["variant"]).to_markdown(index=False, disable_numparse=True),
            cascade_terms(found["cost"], scored["variant"]),
            *gpu_section.markdown(found["cuda"], found["cost"], scored["variant"]),
            *growth_section.markdown(found["growth"]),
            "Replies of all variants side by side: [examples.md](examples.md). "
            "Beside llama.cpp, OpenVINO and others on the same weights (`make peers`): [peers.md](peers.md).",
            "## How it was measured",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB. A call is "
            "request in to parsed call out, with the tools' prefix cached; each variant in a process of "
            f"its own, all in one run. Of a call {1e3 * bench['harness_call_s']:.1f} ms are not the model's (measured "
            "with a runtime whose tokens are known beforehand). A fused graph on the CPU decodes several clients' "
            "requests together; elsewhere they wait their turn. "
            f"{BASELINE} and onnx-fp32 decode token by token; the others hold a call to the tools' grammar, append "
            "what it forces in one step, check drafts copied from the request, and make of several calls the "
            "likeliest, or none where text is likelier. "
            f"Training: {found['train']['train_requests']} requests, {found['train']['train_s'] / 60:.0f} minutes, "
            f"products in {found['train']['precision']}. "
            f"Price: {found['cost']['machine']['name']} at {found['cost']['machine']['usd_per_hour']} USD an hour "
            f"({found['cost']['machine']['provider']}, {found['cost']['machine']['date']}).",
            *(f"![{name}](plots/{name}.png)" for name in PLOTS),
            "",
        ]
    )


def cascade_terms(cost: dict[str, Any], variant: str) -> str:
    hosted, machine, priced = cost["hosted"], cost["machine"], cost["variants"][variant]
    at = ", ".join(
        f"{usd:.3f} at {float(share):.0%}" for share, usd in priced["usd_per_thousand_calls_at_utilisation"].items()
    )
    return (
        "Calls that the model is not confident of go to a hosted model; replies in text stay. "
        f"{hosted['model']} ({hosted['provider']}, {hosted['date']}: {hosted['source']}) costs "
        f"{hosted['usd_per_million_input_tokens']:g} and {hosted['usd_per_million_output_tokens']:g} USD per million "
        f"tokens in and out. Assumed, not measured: {hosted['input_tokens_per_call']} tokens in and "
        f"{hosted['output_tokens_per_call']} out a call, {hosted['assumed_exact_fraction']:.0%} exact, also on the "
        "harder calls that are sent on. Break-even: from this traffic on, one machine that runs all day costs less "
        f"than the calls it keeps from the hosted model; it answers up to {priced['most_calls_per_day']:,.0f} a day. "
        f"USD per 1,000 calls answered here by how busy {machine['name']} is: {at}."
    )


@hydra.main(version_base="1.3", config_path="..", config_name="params")
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.reports, params.report)


if __name__ == "__main__":
    main()
