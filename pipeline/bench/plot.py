"""The report's pictures: the title of each states its finding; each function returns the text alternative."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pipeline.bench import sensitivity, side_by_side
from pipeline.bench.against import RUN_TO_RUN
from pipeline.bench.picture import INK, PALE, QUIET, bars, canvas, colour, line, mark, name_ends
from pipeline.bench.statistics import wilson_interval
from pipeline.bench.tables import BASE, BASELINE, LADDER, REFERENCE, SCORED, hosted_is_reached

Found = dict[str, Any]
BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}  # an annotation's


def all_plots(found: Found, reports: Path, folder: Path, chosen: str) -> dict[str, str]:
    """Drawn into `folder`; returns each as markdown. `chosen`: the variant they highlight."""
    pictures: dict[str, Callable[[Found, str, Path], str]] = {
        "ladder": _ladder,
        "accuracy": _accuracy,
        "category": _category,
        "risk-coverage": _risk_coverage,
        "reliability": _reliability,
        "latency": lambda found, chosen, path: latency(found["benchmark"], chosen, path),
        "throughput": _throughput,
        "size": _size,
        "cost": _cost,
        "cascade": _cascade,
        "loss": lambda found, _, path: _loss(found["train"], reports / "train/plots/metrics", path),
    }
    shown = next((name for name in (chosen, REFERENCE) if found["benchmark"][name]["ablation"]), None)
    if shown:
        pictures["techniques"] = lambda found, _, path: _techniques(found["benchmark"][shown]["ablation"], shown, path)
    if found["peers"]:
        pictures["peers"] = lambda found, _, path: side_by_side.plot(found["peers"], path)
    if on_gpu := found["cuda"]["benchmark"]:
        fastest = min(on_gpu, key=lambda name: float(on_gpu[name]["call_s"]["p50"]))
        pictures["latency-gpu"] = lambda _found, _, path: latency(on_gpu, fastest, path)
    words = {name: draw(found, chosen, folder / f"{name}.png") for name, draw in pictures.items()}
    words |= sensitivity.all_plots(found["quantize"], folder)
    return {name: markdown(name, said) for name, said in words.items()}


def markdown(name: str, words: str) -> str:
    return f"![{words}](plots/{name}.png)"


def latency(bench: Found, chosen: str, path: Path) -> str:
    ranks = {"p50": 1.0, "p95": 0.55, "p99": 0.3}
    ms = {name: {rank: 1e3 * made["call_s"][rank] for rank in ranks} for name, made in bench.items()}
    title = f"p50 of a call: {chosen} {_short(ms[chosen]['p50'])} ms"
    if BASELINE in ms and chosen != BASELINE:
        title += f", {BASELINE} {_short(ms[BASELINE]['p50'])} ms"
    with canvas(path, title, 0.9 + 0.66 * len(ms)) as figure:
        axes = figure.subplots()
        bars(axes, list(ms), [times["p99"] for times in ms.values()], [""] * len(ms), ["none"] * len(ms))
        for order, (rank, strength) in enumerate(ranks.items()):
            at = [row + (order - 1) * 0.27 for row in range(len(ms))]
            values = [times[rank] for times in ms.values()]
            drawn = axes.barh(at, values, height=0.25, color=list(map(colour, ms)), alpha=strength)
            weight = "normal" if order else "bold"
            axes.bar_label(drawn, [f"{rank} {_short(v)} ms" for v in values], padding=3, fontsize=7.5, weight=weight)
    words = {name: ", ".join(map(_short, times.values())) for name, times in ms.items()}
    return f"{title}. p50, p95 and p99 in ms: {_listed(words)}."


def _ladder(found: Found, chosen: str, path: Path) -> str:
    scored, bench = found["evaluate"], found["benchmark"]
    p50_ms = {name: 1e3 * float(bench[name]["call_s"]["p50"]) for name in LADDER}
    exact = {name: 100 * scored[name]["exact_call_fraction"] for name in LADDER}
    title = " in ".join([f"{chosen}: {exact[chosen]:.0f}% exact", f"{p50_ms[chosen]:.0f} ms"])
    if chosen != BASELINE:
        title += f"; {BASELINE}: {exact[BASELINE]:.0f}% in {p50_ms[BASELINE]:.0f} ms"
    with canvas(path, title) as figure:
        axes = figure.subplots()
        for order, name in enumerate(sorted(LADDER, key=lambda name: p50_ms[name])):
            low, high = (100 * end for end in scored[name]["exact_call_ci95"])
            axes.plot([p50_ms[name]] * 2, [low, high], color=colour(name), linewidth=1.5, alpha=0.6)
            axes.plot(p50_ms[name], exact[name], mark(name), color=colour(name), markersize=9)
            end, rise, side = (low, -3, "top") if order % 2 else (high, 3, "bottom")  # neighbours' names would touch
            text, weight = f"{name}\n{p50_ms[name]:.0f} ms", "bold" if name == chosen else "normal"
            axes.annotate(text, (p50_ms[name], end), (0, rise), ha="center", va=side, weight=weight, **BESIDE)
        axes.set(xscale="log", xlabel="p50 of a call, ms (log scale; left is faster)", ylabel="exact calls, %")
        axes.margins(x=0.12, y=0.25)
        low, high = axes.get_xlim()
        ticks = [step * 10**power for power in range(-1, 6) for step in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if low <= tick <= high])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True)
    words = {name: f"{exact[name]:.1f}% exact, p50 {p50_ms[name]:.0f} ms" for name in LADDER}
    return f"{title}. Lines: 95% intervals. {_listed(words)}."


def _accuracy(found: Found, chosen: str, path: Path) -> str:
    scored = found["evaluate"]
    exact = {name: 100 * scored[name]["exact_call_fraction"] for name in SCORED}
    ends = {name: [100 * end for end in scored[name]["exact_call_ci95"]] for name in SCORED}
    title = f"Exact calls: {chosen} {exact[chosen]:.1f}%, full precision {exact[REFERENCE]:.1f}%, "
    title += f"untuned {exact[BASE]:.1f}%"
    with canvas(path, title) as figure:
        axes = figure.subplots()
        bars(axes, SCORED, list(exact.values()), [""] * len(exact), map(colour, SCORED))
        for at, name in enumerate(SCORED):
            axes.plot(ends[name], [at, at], color="white", linewidth=4.5)
            axes.plot(ends[name], [at, at], color=INK, linewidth=1.5, marker="|", markersize=7)
            axes.text(ends[name][1] + 2, at, f"{exact[name]:.1f}%", va="center")
        axes.set_xlim(0, 115)
    words = {name: f"{exact[name]:.1f}% ({low:.1f} to {high:.1f})" for name, (low, high) in ends.items()}
    return f"{title}. With 95% intervals: {_listed(words)}."


def _category(found: Found, chosen: str, path: Path) -> str:
    hits = {variant: found["evaluate"][variant]["by_category"] for variant in LADDER}
    exact = {v: {name: 100 * hit["exact_call_fraction"] for name, hit in of.items()} for v, of in hits.items()}
    mine = exact[chosen]
    order = sorted(mine, key=lambda name: mine[name])
    names = {name: "no call" if name == "none" else name for name in order}
    worst, most = order[0], order[-1]
    title = f"Exact calls of {chosen} by tool: {mine[worst]:.0f}% ({names[worst]}) to {mine[most]:.0f}% ({names[most]})"
    with canvas(path, title, 4.3) as figure:
        axes = figure.subplots()
        for at, variant in enumerate(LADDER):
            rows = [row + 0.17 * (2 - at) for row in range(len(order))]
            style = line(variant, chosen) | {"linewidth": 0, "label": variant}
            axes.plot([exact[variant][name] for name in order], rows, **style)
        for row in range(0, len(order), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", zorder=0)
        axes.set_yticks(range(len(order)), [names[name] for name in order])
        axes.set(xlabel="exact calls, %", ylim=(-0.5, len(order) - 0.5))
        axes.grid(visible=True, axis="x")
        beside: dict[str, Any] = {"ncols": len(LADDER), "handletextpad": 0.1, "columnspacing": 0.9}
        figure.legend(loc="outside lower center", fontsize=8, frameon=False, **beside)
    words = _listed({names[name]: f"{mine[name]:.0f}%" for name in reversed(order)})
    return f"{title}. By expected tool: {words}. The table has the other variants."


def _risk_coverage(found: Found, chosen: str, path: Path) -> str:
    curves = {name: found["evaluate"][name]["calibration"]["risk_coverage"] for name in LADDER}
    half = [wrong for kept, wrong in curves[chosen] if kept <= 0.5]
    title = f"{chosen} makes too few calls to judge its confidence"
    if half:
        title = f"{100 * half[-1]:.0f}% of the most confident half of {chosen}'s calls are wrong"
    with canvas(path, title) as figure:
        axes = figure.subplots()
        drawn = {name: [(100 * kept, 100 * wrong) for kept, wrong in curve] for name, curve in curves.items() if curve}
        for name, curve in drawn.items():
            axes.plot(*zip(*curve, strict=True), **line(name, chosen) | {"marker": ""})
        axes.set(xlabel="calls kept, %, most confident first", ylabel="wrong among those kept, %", xlim=(0, 100))
        axes.set_ylim(0, None)
        axes.grid(visible=True)
        name_ends(axes, {name: (curve[-1][1], name) for name, curve in drawn.items()}, chosen)
    words = _listed({name: f"{curve[-1][1]:.0f}%" for name, curve in drawn.items()})
    return f"{title}. Wrong calls by calls kept; wrong among all calls: {words}."


def _reliability(found: Found, chosen: str, path: Path) -> str:
    every = {name: found["evaluate"][name]["calibration"] for name in LADDER}
    errors = {name: of["expected_calibration_error"] for name, of in every.items()}
    points = {name: 100 * error for name, error in errors.items() if error is not None}
    mine = every[chosen]["reliability"]
    title = f"{chosen} makes too few calls to judge its confidence"
    if chosen in points:
        title = f"{chosen}'s confidence is off by {points[chosen]:.1f} points on average"
    with canvas(path, title) as figure:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=0.8, linestyle="--")
        axes.annotate("perfect calibration", (62, 62), (3, -3), va="top", color=QUIET, **BESIDE)
        for name in points:
            parts = every[name]["reliability"]
            at = ([100 * part[key] for part in parts] for key in ("mean_confidence", "right_fraction"))
            axes.plot(*at, label=f"{name}, {points[name]:.1f}", **line(name, chosen))
        for part in mine:
            ends = wilson_interval(round(part["n"] * part["right_fraction"]), part["n"])
            axes.plot([100 * part["mean_confidence"]] * 2, [100 * end for end in ends], color=INK, linewidth=1)
        axes.set(xlabel=f"confidence, % (vertical lines: {chosen}'s 95% intervals)", ylabel="exact calls, %")
        axes.grid(visible=True)
        if points:
            small: dict[str, Any] = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "alignment": "left"}
            axes.legend(title="calibration error, points", loc="lower right", **small)
    if mine:
        title += (
            f". Vertical lines: {chosen}'s 95% intervals, each from at least {min(part['n'] for part in mine)} calls"
        )
    return f"{title}. Expected calibration error in points: {_listed({n: f'{p:.1f}' for n, p in points.items()})}."


def _throughput(found: Found, chosen: str, path: Path) -> str:
    levels = {name: found["benchmark"][name]["by_concurrency"] for name in LADDER}
    speeds = {name: {level["concurrency"]: level["calls_per_s"] for level in of} for name, of in levels.items()}
    most = max(speeds[chosen])
    title = f"Throughput with {most} clients: {chosen} {_short(speeds[chosen][most])} calls/s"
    if chosen != BASELINE:
        title += f", {BASELINE} {_short(speeds[BASELINE][most])}"
    with canvas(path, title) as figure:
        axes = figure.subplots()
        for name, by_clients in speeds.items():
            axes.plot(list(by_clients), list(by_clients.values()), **line(name, chosen))
        axes.set(xlabel="concurrent clients", ylabel="throughput, calls/s", xticks=list(speeds[chosen]))
        axes.set_ylim(0, None)
        axes.grid(visible=True)
        name_ends(axes, {name: (of[most], f"{name} {_short(of[most])}") for name, of in speeds.items()}, chosen)
    words = {name: ", ".join(f"{_short(v)} at {n}" for n, v in of.items()) for name, of in speeds.items()}
    return f"{title}. Calls/s by number of clients: {_listed(words)}."


def _size(found: Found, chosen: str, path: Path) -> str:
    keys = {"on disk": "model_bytes", "peak memory": "peak_rss_bytes"}
    panels = {label: {n: found["benchmark"][n][key] / 1e6 for n in LADDER} for label, key in keys.items()}
    disk, memory = panels.values()
    title = f"{chosen}: {disk[chosen]:.0f} MB on disk, {memory[chosen]:.0f} MB peak memory"
    if chosen != BASELINE:
        title += f"; {BASELINE}: {disk[BASELINE]:.0f} and {memory[BASELINE]:.0f}"
    with canvas(path, title, 4.1) as figure:
        for axes, (label, megabytes) in zip(figure.subplots(2), panels.items(), strict=True):
            values = list(megabytes.values())
            bars(axes, LADDER, values, [f"{value:.0f} MB" for value in values], map(colour, LADDER))
            axes.set_title(label, loc="left")
    words = _listed({name: f"{disk[name]:.0f} and {memory[name]:.0f}" for name in LADDER})
    return f"{title}. MB on disk and peak memory: {words}."


def _cost(found: Found, chosen: str, path: Path) -> str:
    hosted = found["cost"]["hosted"]
    usd = {name: found["cost"]["variants"][name]["usd_per_thousand_calls"] for name in LADDER}
    usd[hosted["model"]] = hosted["usd_per_thousand_calls"]
    texts = {name: f"{_usd(price)} USD" for name, price in usd.items()}
    title = f"1,000 calls cost {texts[chosen]} with {chosen} on a machine {found['cost']['utilisation']:.0%} busy, "
    title += f"{texts[hosted['model']]} with {hosted['model']}"
    with canvas(path, title) as figure:
        colours = [colour(name) if name in LADDER else PALE for name in usd]
        bars(figure.subplots(), list(usd), list(usd.values()), list(texts.values()), colours)
    return f"{title}. Per 1,000 calls: {_listed(texts)}."


def _cascade(found: Found, chosen: str, path: Path) -> str:
    cost, hosted = found["cost"], found["cost"]["hosted"]
    steps = sorted(cost["variants"][chosen]["cascade"].values(), key=lambda step: float(step["sent_fraction"]))
    usd = [step["usd_per_thousand_calls"] for step in steps]
    best, worst = (
        [100 * step[key] for step in steps] for key in ("exact_call_fraction", "exact_call_fraction_at_worst")
    )
    curve = list(zip(usd, best, strict=True))
    alone = hosted["usd_per_thousand_calls"], 100 * hosted["assumed_exact_fraction"]
    title = f"Best case: more of {chosen}'s doubtful calls are exact when forwarded to {hosted['model']}"
    if step := hosted_is_reached(cost, chosen):
        title = f"{step['sent_fraction']:.0%} of calls forwarded: {100 * step['exact_call_fraction']:.0f}% exact in "
        title += f"the best case ({hosted['model']} right on {alone[1]:.0f}% of the hard calls too), "
        title += f"{100 * step['exact_call_fraction_at_worst']:.0f}% in the worst"
    with canvas(path, title) as figure:
        axes = figure.subplots()
        axes.fill_between(usd, worst, best, color=colour(chosen), alpha=0.15, linewidth=0)
        axes.plot(usd, best, color=colour(chosen), marker=mark(chosen), linewidth=2)
        axes.plot(usd, worst, color=colour(chosen), linestyle="--", linewidth=1.2)
        axes.annotate("worst case", (usd[-1], worst[-1]), (8, 0), va="center", **BESIDE)
        for step, at in zip(steps, curve, strict=True):
            last, rises = at == curve[-1], any(exact > at[1] for _, exact in curve)
            place, side = ((8, 0), "center") if last else ((6, -4), "top") if rises else ((-8, 7), "bottom")
            text = f"{step['sent_fraction']:.0%}" + (" forwarded" if last else "")  # neighbours may be close
            if not step["sent_fraction"]:
                text = f"{chosen} alone"
                place, side = (9, 4), "bottom"  # between the two lines
            axes.annotate(text, at, place, va=side, **BESIDE)
        axes.plot(*alone, "*", color=QUIET, markersize=11)
        axes.annotate(f"{hosted['model']}\nalone (assumed)", alone, (0, -8), ha="center", va="top", **BESIDE)
        axes.set(xlabel="USD per 1,000 calls", ylabel="exact calls, %")
        axes.margins(x=0.15, y=0.15)
        axes.set_xlim(0, None)
        axes.grid(visible=True)
    ends = zip(worst, best, usd, strict=True)
    words = ", ".join(f"{low:.1f} to {high:.1f}% at {_usd(price)}" for low, high, price in ends)
    words += f"; {hosted['model']} alone {alone[1]:.0f}% (assumed) at {_usd(alone[0])}"
    return f"{title}. Exact calls, worst to best case, by USD per 1,000 calls: {words}."


def _techniques(rows: list[Found], variant: str, path: Path) -> str:
    p50_s = {row["techniques"]: float(row["call_p50_s"]) for row in rows}
    times = {name: seconds / p50_s["all"] for name, seconds in p50_s.items()}
    most = max((name for name in times if name.startswith("without")), key=lambda name: times[name])
    title = f"A call of {variant} takes {times['none']:.1f} times as long without any technique, "
    title += f"{times[most]:.1f} times {most}"
    with canvas(path, title, 3.3) as figure:
        names = [{"all": "all techniques", "none": "no technique"}.get(name, name) for name in p50_s]
        values = [1e3 * seconds for seconds in p50_s.values()]
        texts = [f"{_short(ms)} ms, {ratio:.2f}x" for ms, ratio in zip(values, times.values(), strict=True)]
        axes = figure.subplots()
        axes.set_title(f"differences under {RUN_TO_RUN:.0%} are noise", loc="left", color=QUIET)
        drawn = bars(axes, names, values, texts, [colour(variant)] * len(names), room=1.4)
        for bar in drawn[1:]:
            bar.set_alpha(0.5)
    words = _listed({name: f"{ratio:.2f}" for name, ratio in times.items()})
    return f"{title}. p50 of a call relative to all techniques: {words}."


def _loss(train: Found, curves: Path, path: Path) -> str:
    title = f"Lowest validation loss: {train['best_validation_loss']:.3f}, "
    title += f"at step {train['best_step']} of {train['steps']}"
    with canvas(path, title) as figure:
        axes: Axes = figure.subplots()
        for name, label, ink in (("train", "training", QUIET), ("eval", "validation", colour(REFERENCE))):
            curve = pd.read_csv(curves / name / "loss.tsv", sep="\t")
            steps, losses = curve["step"], curve.iloc[:, -1]
            axes.plot(steps, losses, color=ink, marker="." if name == "eval" else "", linewidth=1.4, label=label)
        axes.set(xlabel="step", ylabel="loss, nats per reply token (log)", yscale="log")
        axes.legend(loc="upper right")  # their ends lie too close together for names beside them
        axes.grid(visible=True)
    return (
        f"{title}. Training and validation loss by step; the tuned model has the weights of the lowest validation loss."
    )


def _listed(texts: dict[str, str]) -> str:
    return "; ".join(f"{name} {text}" for name, text in texts.items())


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _usd(price: float) -> str:
    return f"{price:.2f}" if price >= 0.1 else f"{price:.3f}" if price >= 0.001 else f"{price:.2g}"
