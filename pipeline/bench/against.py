"""Changes between two runs of the pipeline, and which of them exceed their noise."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.bench.statistics import mcnemar_p

Read = Callable[[str], str]  # path in the reports' folder -> text of the file
RESAMPLES = 2000
RUN_TO_RUN = 0.1  # by how much medians of one model on one machine differ between runs (docs/experiments.md)


def of_folder(reports: Path) -> Read:
    return lambda name: (reports / name).read_text(encoding="utf-8")


def of_revision(reports: Path, revision: str) -> Read:
    """Reading raises ValueError if git does not know the revision, or it has no such report."""

    def read(name: str) -> str:
        command = ["git", "show", f"{revision}:./{(reports / name).as_posix()}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise ValueError(f"report.against={revision}: {done.stderr.strip()}")
        return done.stdout

    return read


def changes(before: Read, now: Read, variants: Sequence[str], significance: float) -> pd.DataFrame:
    """One row per variant and measure (exact calls, p50, bytes)."""
    rows = []
    for variant in variants:
        found = _exact(before, now, variant, significance), _p50(before, now, variant), _bytes(before, now, variant)
        rows += [{"variant": variant, **row} for row in found]
    return pd.DataFrame(rows)


def _exact(before: Read, now: Read, variant: str, significance: float) -> dict[str, str]:
    """Over the requests that both runs scored, in pairs."""
    hits = []
    for read in (before, now):
        lines = [json.loads(line) for line in read(f"evaluate/{variant}.replies.jsonl").splitlines()]
        hits.append(
            {(line["id"], line["request"]): line["outcome"] == "exact" for line in lines if not line.get("apart")}
        )
    both = [asked for asked in hits[0] if asked in hits[1]]
    if not both:
        return _row("exact calls", "", "", "", "no request in common")
    old, new = ([hit[asked] for asked in both] for hit in hits)
    p = mcnemar_p(old, new)
    fractions = [sum(side) / len(both) for side in (old, new)]
    old_text, new_text = (f"{fraction:.1%}" for fraction in fractions)
    change = f"{100 * (fractions[1] - fractions[0]):+.1f} points"
    return _row("exact calls", old_text, new_text, change, f"{'yes' if p < significance else 'no'} (McNemar p {p:.3f})")


def _p50(before: Read, now: Read, variant: str) -> dict[str, str]:
    """With a bootstrap interval of the ratio, which covers noise within a run; RUN_TO_RUN comes on top of it."""
    old, new = (np.array(_json(read, f"benchmark/{variant}.samples.json")["call_s"]) for read in (before, now))
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(side, (RESAMPLES, len(side))), axis=1) for side in (old, new)]
    low, high = np.percentile(medians[1] / medians[0], [2.5, 97.5])
    ratio = float(np.median(new) / np.median(old))
    machines = [_json(read, f"benchmark/{variant}.json")["provenance"]["machine"] for read in (before, now)]
    found = "yes" if high < 1 - RUN_TO_RUN or low > 1 / (1 - RUN_TO_RUN) else "no"
    if machines[0] != machines[1]:
        found = "another machine"
    old_text, new_text = (f"{1e3 * float(np.median(side)):.0f} ms" for side in (old, new))
    return _row("p50", old_text, new_text, f"{ratio:.2f}x ({low:.2f} to {high:.2f})", found)


def _bytes(before: Read, now: Read, variant: str) -> dict[str, str]:
    old, new = (int(_json(read, f"benchmark/{variant}.json")["model_bytes"]) for read in (before, now))
    return _row("bytes", f"{old:,}", f"{new:,}", f"{new - old:+,}", "no" if old == new else "yes")


def _json(read: Read, name: str) -> Any:
    return json.loads(read(name))


def _row(measure: str, before: str, now: str, change: str, beyond: str) -> dict[str, str]:
    return {"measure": measure, "before": before, "now": now, "change": change, "beyond noise": beyond}
