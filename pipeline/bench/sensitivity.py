"""What of a model bears fewer bits: the report's paragraphs on it, with a picture for each variant."""

import re
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from pipeline import files
from pipeline.bench.picture import INK, canvas

VARIANTS = ("int8", "int4")
NAMED = 6  # in words, of the products that keep a finer form: the picture and reports/quantize have all
KINDS = {  # of products, with a mark and a colour each
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
    """None where no variant's form hung on how products bear it."""
    drawn = [pictures[_name(variant)] for variant in found if _name(variant) in pictures]
    if not drawn:
        return []
    said = [f"- {variant}: {_words(of)}" for variant, of in found.items() if of["sensitivity"]]
    return [
        "### Which products bear it",
        " ".join(drawn),
        "A mark for each matrix product of the model; a ring is around those that keep a finer form. How many do is "
        "set in `params.yaml` (quantize), which ones is measured, on training requests:",
        "\n".join(said),
    ]


def all_plots(found: dict[str, Found], folder: Path) -> dict[str, str]:
    """Into `folder`; the words of each, by name."""
    return {
        _name(variant): _plot(variant, of, folder / f"{_name(variant)}.png")
        for variant, of in found.items()
        if of["sensitivity"]
    }


def _plot(variant: str, found: Found, path: Path) -> str:
    products, finer = found["sensitivity"], [product for product in found["sensitivity"] if product["finer"]]
    most = products[0]
    title = f"{variant}: {most['name']} bears it worst; {len(finer)} of {len(products)} products stay finer"
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
        label = "KL, millionths of a nat" if _is_nats(found) else "unevenness of its inputs"
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
    """What the weights' bits cost the replies; of dynamic activations it is the unevenness."""
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
        unmarked = f" {exact} lose nothing, being on the grid of these bits already, and have no mark." if exact else ""
        return (
            f"What {found['settings']['bits']} bits in a product alone cost the replies, in millionths of a nat a "
            f"token (KL divergence), for a million weights; median {middle}. In 8 bits: {listed}.{unmarked}"
        )
    return (
        "How far the largest channel of a product's inputs stands above the median one, which one scale for all must "
        f"cover; median {middle}. With inputs in floats: {listed}."
    )


def _name(variant: str) -> str:
    return f"sensitivity-{variant}"
