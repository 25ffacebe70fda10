from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import page, picture, plot, side_by_side, tables


def measured(p50_s: float) -> dict[str, Any]:
    return {"call_s": {"p50": p50_s, "p95": 2 * p50_s, "p99": 3 * p50_s}}


def test_latency_says_in_its_title_what_was_measured(tmp_path: Path) -> None:
    words = plot.latency({"torch-fp32": measured(0.9), "int8": measured(0.042)}, "int8", tmp_path / "latency.png")
    assert words == (
        "p50 of a call: int8 42 ms, torch-fp32 900 ms. p50, p95 and p99 in ms: "
        "torch-fp32 900, 1,800, 2,700; int8 42, 84, 126."
    )
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_a_faster_peer_is_in_the_title(tmp_path: Path) -> None:
    ours, theirs = (measured(p50_s) | {"exact_call_fraction": 0.8} for p50_s in (0.1, 0.05))
    report = {"ours": {"int8": ours}, "peers": {"llama.cpp": theirs}}
    words = side_by_side.plot(report, tmp_path / "peers.png")
    assert words.startswith("p50 of a call: int8 100 ms; fastest other runtime (llama.cpp) 50 ms. ")


def test_each_variant_has_a_colour_and_a_mark_of_its_own() -> None:
    assert set(tables.LADDER) <= set(picture.COLOURS) == set(picture.MARKS)
    assert len(set(picture.COLOURS.values())) == len(set(picture.MARKS.values())) == len(picture.COLOURS)


def test_ladder_can_be_told_apart_in_grey() -> None:
    def light(name: str) -> float:
        red, green, blue = (int(picture.COLOURS[name][at : at + 2], 16) for at in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue  # luma of ITU-R BT.601

    greys = sorted(map(light, tables.LADDER))
    assert min(above - under for under, above in pairwise(greys)) > 16


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["60", "1,460"], True),
        (["77.9% (73.6% to 81.6%)", ""], True),
        (["yes", "4.8 points below"], False),
        ([""], False),
    ],
)
def test_columns_of_numbers_stand_to_the_right(tmp_path: Path, cells: list[str], right: bool) -> None:
    text = "\n".join(["| variant | p50 |", "|:--|:--|", *(f"| int8 | {cell} |" for cell in cells)])
    made = page.html("", text, tmp_path, {}, "int8")
    assert ('<th class="n">p50</th>' in made) == right
    assert made.count('<tr class="chosen">') == len(cells)
