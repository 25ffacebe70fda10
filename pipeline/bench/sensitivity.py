"""Which layers are sensitive to quantization: the report's paragraphs, with a picture for each variant."""

import re
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from pipeline import files
from pipeline.bench.picture import INK, canvas

VARIANTS = ("int8", "int4")
NAMED = 6  # products of higher precision named in the text: the picture and reports/quantize have all
KINDS = {  # of products, each with a mark and a colour
    "qkv_proj": ("o", "#00619e"),
    "o_proj": ("s", "#88ccee"),
    "gate_proj": ("^", "#eba40a"),
    "up_proj": ("v", "#d55e00"),
    "down_proj": ("D", "#333333"),
}

Found = dict[str, Any]


def read(reports: Path) -> dict[str, Found]:
    """The quantize reports by variant."""
    return {name: files.read_json(reports / f"quantize/{name}.json") for name in VARIANTS}


def markdown(found: dict[str, Found], pictures: dict[str, str]) -> list[str]:
    """None if no variant's precision was chosen by sensitivity."""
    drawn = [pictures[_name(variant)] for variant in found if _name(variant) in pictures]
    if not drawn:
        return []
    said = [f"- {variant}: {_words(of)}" for variant, of in found.items() if of["sensitivity"]]
    return [
        "### Which layers are sensitive",
        " ".join(drawn),
        "One mark per matrix product; the ringed ones keep higher precision. `params.yaml` (quantize) sets their "
        "number; they are chosen by sensitivity, measured on training requests:",
        "\n".join(said),
    ]


def all_plots(found: dict[str, Found], folder: Path) -> dict[str, str]:
    """Drawn into `folder`; returns the text alternative of each, by name."""
    return {
        _name(variant): _plot(variant, of, folder / f"{_name(variant)}.png")
        for variant, of in found.items()
        if of["sensitivity"]
    }


def _plot(variant: str, found: Found, path: Path) -> str:
    products, finer = found["sensitivity"], [product for product in found["sensitivity"] if product["finer"]]
    most = products[0]
    title = f"{variant}: {most['name']} is most sensitive; {len(finer)} of {len(products)} products keep more bits"
    scale = 1e6 if _is_nats(found) else 1
    with canvas(path, title) as figure:
        axes = figure.subplots()
        for kind, (mark, colour) in KINDS.items():
            at = [(layer(p["name"]), scale * p["sensitivity"]) for p in products if p["name"].endswith(kind)]
            if at:
                axes.plot(*zip(*at, strict=True), mark, color=colour, markersize=4, label=kind)
        rings = [(layer(p["name"]), scale * p["sensitivity"]) for p in finer]
        if rings:
            axes.plot(*zip(*rings, strict=True), "o", markersize=11, markerfacecolor="none", markeredgecolor=INK)
        label = "KL, millionths of a nat" if _is_nats(found) else "outlier ratio of inputs"
        axes.set(xlabel="layer", ylabel=f"{label} (log)", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True)
        figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=len(KINDS), columnspacing=0.9)
    return f"{title}. {_words(found)}"


def layer(product: str) -> int:
    """Raises ValueError where the name has no layer: its place in the picture would be a guess."""
    found = re.search(r"layers\.(\d+)\.", product)
    if found is None:
        raise ValueError(f"{product!r} names no layer, as in layers.3.mlp.down_proj")
    return int(found[1])


def _is_nats(found: Found) -> bool:
    """Whether sensitivity is a KL divergence; with dynamic activations it is the outlier ratio."""
    return not found["settings"]["dynamic"]


def _words(found: Found) -> str:
    products = found["sensitivity"]
    finer = [product for product in products if product["finer"]]

    def figure(product: Found) -> str:
        return f"{1e6 * product['sensitivity']:.0f}" if _is_nats(found) else f"{product['sensitivity']:.1f}"

    listed = ", ".join(f"{product['name']} ({figure(product)})" for product in finer[:NAMED]) or "none"
    if len(finer) > NAMED:
        listed += f" and {len(finer) - NAMED} more"
    middle = figure(products[len(products) // 2])
    if _is_nats(found):
        exact = sum(product["sensitivity"] == 0 for product in products)
        unmarked = f" {exact} without loss (weights already on this grid) have no mark." if exact else ""
        return (
            f"KL divergence of the replies with {found['settings']['bits']} bits in one product alone, in millionths "
            f"of a nat per token and million weights; median {middle}. Kept in 8 bits: {listed}.{unmarked}"
        )
    return (
        "Outlier ratio of a product's inputs (largest over median channel; one scale covers all); median "
        f"{middle}. Kept weight-only (float inputs): {listed}."
    )


def _name(variant: str) -> str:
    return f"sensitivity-{variant}"
