"""The Pareto front of several trials, and the recommended one."""

from pathlib import Path

import pandas as pd

from pipeline.bench.picture import canvas, colour

BETTER_LOWER = ("p50_s", "model_bytes")


def ranked(trials: pd.DataFrame, max_loss_fraction: float) -> pd.DataFrame:
    """`trials` with `on_front` and `recommended`, the most exact first, the failed last.

    A trial is on the Pareto front unless another is at least as good in exact calls, p50 and bytes, and better in one.
    Recommended is the fastest with at most `max_loss_fraction` fewer exact calls than the best.
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


def read(reports: Path) -> dict[str, tuple[pd.DataFrame, str]]:
    """Trials and verdict of each sweep in which a trial succeeded, by name."""
    found = sorted(reports.glob("sweeps/*/verdict.txt"))
    return {path.parent.name: (pd.read_csv(path.with_name("trials.csv")), path.read_text().strip()) for path in found}


def verdict(table: pd.DataFrame, max_loss_fraction: float) -> str:
    """The recommended trial and the rule. `table`: as `ranked` makes it, with a trial that succeeded."""
    taken = table[table["recommended"]].iloc[0]
    return (
        f"Recommended: {_label(taken, table)}, {taken['exact_call_fraction']:.1%} exact, p50 "
        f"{1e3 * taken['p50_s']:.0f} ms, {taken['model_bytes'] / 1e6:.0f} MB. Rule: the fastest trial at most "
        f"{100 * max_loss_fraction:g} points below the most accurate one ({table['exact_call_fraction'].max():.1%})."
    )


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """For readers: most accurate first, failed last; numbered as in the picture."""
    rows = []
    for number, (_, row) in enumerate(table.iterrows(), start=1):
        made = pd.isna(row["error"])
        rows.append(
            {
                "#": number,
                "trial": _label(row, table),
                "exact calls": f"{row['exact_call_fraction']:.1%}" if made else str(row["error"])[:80],
                "p50 ms": f"{1e3 * row['p50_s']:.0f}" if made else "",
                "MB": f"{row['model_bytes'] / 1e6:.0f}" if made else "",
                "KL": f"{row['kl_divergence']:.4f}" if made else "",
                "Pareto front": "yes" if row["on_front"] else "",
            }
        )
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, path: Path) -> None:
    """Exact calls by p50; a dot's area is the model's bytes, its number the row in `shown`."""
    good = table[table["error"].isna()]
    taken = good[good["recommended"]].iloc[0]
    title = f"{_label(taken, table)}: {taken['exact_call_fraction']:.1%} exact in {1e3 * taken['p50_s']:.0f} ms"
    with canvas(path, title, 3.6) as figure:
        axes = figure.subplots()
        colours = [colour("int8" if on_front else "") for on_front in good["on_front"]]
        megabytes = good["model_bytes"] / 1e6
        axes.scatter(1e3 * good["p50_s"], 100 * good["exact_call_fraction"], s=megabytes, c=colours, alpha=0.7)
        for number, (_, row) in enumerate(good.iterrows(), start=1):  # the failed come last and have no dot
            place = (1e3 * row["p50_s"], 100 * row["exact_call_fraction"])
            axes.annotate(str(number), place, ha="center", va="center", fontsize=6.5).set_in_layout(False)
            if row["recommended"]:
                beside = axes.annotate(
                    "recommended", place, (0, 9), textcoords="offset points", ha="center", fontsize=8
                )
                beside.set_in_layout(False)
        axes.margins(0.12)
        axes.set(
            xlabel="p50 of a call, ms\norange: Pareto front; area: bytes on disk; number: row of the table",
            ylabel="exact calls, %",
        )


def _label(row: pd.Series, table: pd.DataFrame) -> str:
    """The settings in which trials differ, without their sections; for each trial those it was given.

    A setting given to one trial and not to another counts as different: the other has the value of params.yaml.
    """
    trials = [_given(overrides) for overrides in table["overrides"]]
    keys = dict.fromkeys(key for trial in trials for key in trial)
    told = [key for key in keys if len(trials) == 1 or len({trial.get(key) for trial in trials}) > 1]
    own = _given(row["overrides"])
    return ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in told if key in own) or "as in params.yaml"


def _given(overrides: object) -> dict[str, str]:
    """Value by key, without the sweep's own settings, which do not distinguish trials; a CSV has nan for none."""
    parts = (part.partition("=") for part in str(overrides).split() if "=" in part)
    return {key: value for key, _, value in parts if not key.startswith("sweep.")}
