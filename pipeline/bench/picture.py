"""The look of the pictures: a colour and a mark per variant, figures beside bars, names beside lines."""

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK, QUIET, PALE = "#222222", "#8a8a8a", "#d9d9d9"
# Distinct for colour-blind readers, and in grey by lightness and marks.
COLOURS = {
    "torch-fp32": "#333333",
    "torch-fp16": "#8a6d9e",
    "onnx-fp32": "#88ccee",
    "fused-fp32": "#00619e",
    "fused-fp16": "#2a9d8f",
    "int8": "#d55e00",
    "int4": "#eba40a",
}
MARKS = dict(zip(COLOURS, "ops^PDv", strict=True))
WIDTH = 4.6  # inches: two stand side by side on a screen, one fills a phone and can be read there
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "savefig.dpi": 180, "text.color": INK,
    "axes.edgecolor": QUIET, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#e6e6e6",
}  # fmt: skip


def colour(name: str) -> str:
    return COLOURS.get(name, QUIET)


def mark(name: str) -> str:
    return MARKS.get(name, ".")


def line(name: str, chosen: str) -> dict[str, Any]:
    """A variant's line style; the chosen variant is highlighted."""
    wide = {"linewidth": 2.4, "markersize": 6, "zorder": 3} if name == chosen else {"linewidth": 1.2, "markersize": 4}
    return {"color": colour(name), "marker": mark(name), **wide}


@contextmanager
def canvas(path: Path, title: str, height: float = 3.1) -> Iterator[Figure]:
    """A figure to draw on; on exit it gets its title and is written to `path`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        figure.suptitle(textwrap.fill(title, 53, break_on_hyphens=False), x=0.015, ha="left", weight="bold")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
    # A palette takes a third of the bytes and looks the same.
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colours: Iterable[str],
    room: float = 1.28,
) -> Any:
    """Horizontal bars from 0, the first on top, each with its figure beside it instead of a scale.

    `room`: the width of the axes relative to the longest bar.
    """
    drawn = axes.barh(range(len(names)), values, color=list(colours), height=0.72)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.bar_label(drawn, texts, padding=4)
    axes.set_xlim(0, room * (max(values) or 1))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return drawn


def name_ends(axes: Axes, ends: dict[str, tuple[float, str]], best: str) -> None:
    """Name the lines beside the plot, at the height of their ends, moved apart where they would touch."""
    low, high = axes.get_ylim()
    step, place = (high - low) / 13, axes.get_yaxis_transform()
    order = sorted(ends, key=lambda name: ends[name][0])
    heights = [ends[name][0] for name in order]
    for above in range(1, len(heights)):
        heights[above] = max(heights[above], heights[above - 1] + step)
    for under in reversed(range(len(heights))):
        heights[under] = min(heights[under], high - step * (len(heights) - 1 - under))
    for name, at in zip(order, heights, strict=True):
        text = ends[name][1]
        axes.plot(1.03, at, mark(name), color=colour(name), transform=place, clip_on=False, markersize=5)
        weight = "bold" if name == best else "normal"
        axes.text(1.06, at, text, transform=place, va="center", weight=weight, fontsize=8.5)
