"""Stage `report`: one page that says which variant to ship and why.

Reads reports/*.json, with those of a GPU and of growth if they exist; writes reports/report.md, report.html and plots/.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import config, files
from pipeline.bench import (
    against,
    gpu_section,
    growth_section,
    learning_section,
    page,
    pareto,
    plot,
    sections,
    sensitivity,
    side_by_side,
    tables,
)
from pipeline.bench.inputs import REQUESTS, differing
from pipeline.bench.tables import BASELINE, LADDER, REFERENCE, SCORED
from pipeline.provenance import provenance

log = logging.getLogger(__name__)

TITLE = "Which variant to ship"


@dataclass
class ReportConfig:
    max_loss_fraction: float  # of exact calls that a recommended variant may lose vs fp32
    significance: float  # a variant that loses with a McNemar p below this does not pass either
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
    """Raises FileNotFoundError naming all reports that are missing, ValueError where they are of different runs."""
    require_all(reports)
    found = {
        "evaluate": {name: files.read_json(reports / "evaluate" / f"{name}.json") for name in SCORED},
        "benchmark": {name: files.read_json(reports / "benchmark" / f"{name}.json") for name in LADDER},
        "cost": files.read_json(reports / "cost.json"),
        "export": files.read_json(reports / "export.json"),
        "train": files.read_json(reports / "train.json"),
        "quantize": sensitivity.read(reports),
        "cuda": gpu_section.read(reports),
        "growth": growth_section.read(reports),
        "learning": learning_section.read(reports),
        "peers": side_by_side.read(reports),
        "sweeps": pareto.read(reports),
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
    chosen = best or REFERENCE
    with files.whole_folder(reports / "plots") as folder:
        pictures = plot.all_plots(found, reports, folder, chosen)
    parts = [*recommendation(found, best, cfg), *sections.everything(found, faults, chosen, pictures)]
    text = "\n\n".join([f"# {TITLE}", *parts, ""])
    replies = tables.examples(reports / "evaluate", LADDER)
    files.write_text(reports / "report.md", text)
    files.write_text(reports / "examples.md", replies)
    files.write_text(reports / "report.html", page.html(TITLE, text, reports, {"examples.md": replies}, best))
    passed = {name: {"passed": why is None, "why_not": why} for name, why in faults.items()}
    files.write_json(reports / "report.json", {"recommended": best, "variants": passed, "provenance": provenance(cfg)})
    log.info("recommended: %s; report in %s", best, reports / "report.md")


def require_all(reports: Path) -> None:
    names = [f"evaluate/{name}" for name in SCORED] + [f"benchmark/{name}" for name in LADDER]
    names += [f"quantize/{name}" for name in sensitivity.VARIANTS]
    wanted = [f"{name}.json" for name in [*names, "cost", "export", "train"]]
    if missing := [name for name in wanted if not (reports / name).exists()]:
        raise FileNotFoundError(f"{reports} lacks {', '.join(missing)}: dvc repro makes them")


def require_one_run(found: dict[str, Any]) -> None:
    """Raises ValueError where variants were scored or timed with different settings or requests, on different
    machines, or one of them as two different models.
    """
    runs: dict[str, dict[tuple[object, ...], list[str]]] = {"evaluate": {}, "benchmark": {}}
    for stage, seen in runs.items():
        for name in LADDER:
            origin = found[stage][name]["provenance"]
            machine = (origin["machine"]["cpu"], origin["machine"]["cores"]) if stage == "benchmark" else ()
            same = origin["settings_sha256"], *(origin["inputs_sha256"].get(key) for key in REQUESTS), *machine
            seen.setdefault(same, []).append(name)
        if len(seen) > 1:
            raise ValueError(
                f"reports/{stage} is of different runs (settings, requests or machines): "
                f"{' / '.join(', '.join(names) for names in seen.values())}; dvc repro -s -f {stage} makes them anew"
            )
    for name in LADDER:
        if differ := differing(found["evaluate"][name], found["benchmark"][name], ("model", *REQUESTS)):
            raise ValueError(
                f"reports/benchmark/{name}.json is of another {' and '.join(differ)} than "
                f"reports/evaluate/{name}.json; dvc repro -s -f evaluate@{name} benchmark@{name} makes them anew"
            )
    for name, scored in found["cuda"]["evaluate"].items():
        shared = ("model", *REQUESTS) if name == BASELINE else REQUESTS  # both devices have models/tuned
        if differ := differing(scored, found["evaluate"][BASELINE], shared):
            raise ValueError(
                f"reports/evaluate/cuda/{name}.json is of another {' and '.join(differ)} than "
                f"reports/evaluate/{BASELINE}.json; dvc repro pipeline/cuda/dvc.yaml makes it anew"
            )


def fault(scored: dict[str, Any], reference: dict[str, Any], cfg: ReportConfig) -> str | None:
    """Why a variant must not be shipped, or None."""
    exact = scored["exact_call_fraction"]
    lost = reference["exact_call_fraction"] - exact
    p = scored.get("mcnemar_p_vs_fp32")
    if exact < cfg.min_exact_fraction:
        return f"{exact:.1%} exact, under {cfg.min_exact_fraction:.0%}"
    if lost > cfg.max_loss_fraction + 1e-9:  # a loss of exactly that passes, whatever the fractions round to
        return f"{100 * lost:.1f} points below {REFERENCE}"
    if lost > 0 and p is not None and p < cfg.significance:
        return f"significantly below {REFERENCE}, p = {p:.3f}"
    return None


def recommend(found: dict[str, Any], faults: dict[str, str | None]) -> str | None:
    """The fastest variant (p50 of a call) without a fault."""
    passed = [name for name, why in faults.items() if why is None]
    return min(passed, key=lambda name: float(found["benchmark"][name]["call_s"]["p50"]), default=None)


def recommendation(found: dict[str, Any], best: str | None, cfg: ReportConfig) -> list[str]:
    rule = (
        f"Rule: the fastest variant (p50) with at least {cfg.min_exact_fraction:.0%} exact calls, at most "
        f"{100 * cfg.max_loss_fraction:g} points below {REFERENCE} (full precision) and not significantly below it "
        f"(McNemar p at least {cfg.significance:g})."
    )
    if best is None:
        return ["**None passes.**", rule]
    bench, exact = found["benchmark"][best], found["evaluate"][best]["exact_call_fraction"]
    full = found["evaluate"][REFERENCE]["exact_call_fraction"]
    faster = found["benchmark"][BASELINE]["call_s"]["p50"] / bench["call_s"]["p50"]
    return [
        f"**Ship {best}**: {exact:.1%} exact calls (full precision: {full:.1%}), p50 "
        f"{1e3 * bench['call_s']['p50']:.0f} ms, {faster:.1f} times faster than {BASELINE}.",
        "\n".join(f"- {figure}" for figure in tables.figures(found, best)),
        rule,
    ]


@config.main
def main(raw: DictConfig) -> None:
    params = config.load(raw, Params)
    run(params.paths.reports, params.report)


if __name__ == "__main__":
    main()
