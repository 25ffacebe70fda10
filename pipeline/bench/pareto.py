"""Which of several trials nobody beats in everything, and which of those to take."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

BETTER_LOWER = ("p50_s", "model_bytes")


def ranked(trials: pd.DataFrame, max_loss_fraction: float) -> pd.DataFrame:
    """`trials` with `on_front` and `recommended`, the most exact first, the failed last.

    On the front is a trial than which no other is better in exact calls, p50 or bytes without being worse in
    another of them. Recommended is the fastest that has at most `max_loss_fraction` fewer exact calls than the best.
    """
    table = trials.copy()
    good = table[table["error"].isna()]
    rows = [row for _, row in good.iterrows()]
    beaten = {at: any(_beats(other, row) for other in rows) for at, row in good.iterrows()}
    table["on_front"] = [not beaten.get(at, True) for at in table.index]
    table["recommended"] = False
    if len(good):
        near = good[good["exact_call_fraction"] >= good["exact_call_fraction"].max() - max_loss_fraction]
        table.loc[near["p50_s"].astype(float).idxmin(), "recommended"] = True
        table = table.sort_values(["exact_call_fraction", "p50_s"], ascending=[False, True], na_position="last")
    return table


def _beats(one: pd.Series, other: pd.Series) -> bool:
    differences = [
        one["exact_call_fraction"] - other["exact_call_fraction"],
        *(other[name] - one[name] for name in BETTER_LOWER),
    ]
    return all(found >= 0 for found in differences) and any(found > 0 for found in differences)


def plot(table: pd.DataFrame, path: Path) -> None:
    """Exact calls against p50; the area of a dot is the bytes of the model."""
    good = table[table["error"].isna()]
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    megabytes = good["model_bytes"] / 1e6
    colours = ["tab:orange" if on_front else "tab:gray" for on_front in good["on_front"]]
    axes.scatter(1e3 * good["p50_s"], good["exact_call_fraction"], s=2 * megabytes, c=colours, alpha=0.7)
    for _, row in good.iterrows():
        if row["on_front"]:
            mark = " (recommended)" if row["recommended"] else ""
            place = (1e3 * row["p50_s"], row["exact_call_fraction"])
            axes.annotate(f"{row['overrides']}{mark}", place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="p50 of a call (ms)", ylabel="exact calls (fraction), validation requests written by hand")
    axes.set_title("Trials; orange: on the front; area: bytes on disk", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
