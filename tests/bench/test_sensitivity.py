from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import sensitivity

INT4 = {
    "settings": {"bits": 4, "dynamic": False},
    "sensitivity": [
        {"name": "layers.1.mlp.down_proj", "sensitivity": 0.000437, "finer": True},
        {"name": "layers.0.attn.qkv_proj", "sensitivity": 0.0002, "finer": False},
        {"name": "layers.0.mlp.down_proj", "sensitivity": 0.0001, "finer": False},
    ],
}
INT8 = {
    "settings": {"bits": 8, "dynamic": True},
    "sensitivity": [{"name": "layers.7.mlp.down_proj", "sensitivity": 812.4, "finer": False}],
}


def test_paragraphs_name_what_stays_finer_and_what_was_measured(tmp_path: Path) -> None:
    found: dict[str, Any] = {"int8": INT8, "int4": INT4}
    words = sensitivity.all_plots(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sensitivity-int8.png", "sensitivity-int4.png"}
    assert words["sensitivity-int4"].startswith(
        "int4: layers.1.mlp.down_proj is most sensitive; 1 of 3 products keep more bits."
    )
    text = "\n".join(sensitivity.markdown(found, words))
    assert "of a nat per token and million weights; median 200. Kept in 8 bits: layers.1.mlp.down_proj (437)." in text
    assert "covers all); median 812.4. Kept weight-only (float inputs): none." in text


def test_nothing_is_said_where_no_product_was_compared(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"int4": {"settings": {"bits": 4, "dynamic": False}, "sensitivity": []}}
    assert sensitivity.all_plots(plain, tmp_path) == {}
    assert sensitivity.markdown(plain, {}) == []


def test_of_many_products_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    products = [{"name": f"layers.{n}.attn.o_proj", "sensitivity": 1e-4 / (n + 1), "finer": True} for n in range(8)]
    words = sensitivity.all_plots({"int4": INT4 | {"sensitivity": products}}, tmp_path)["sensitivity-int4"]
    assert words.endswith("layers.5.attn.o_proj (17) and 2 more.")


def test_products_that_lose_nothing_are_counted_for_a_log_scale_cannot_show_them(tmp_path: Path) -> None:
    products = [*INT4["sensitivity"], {"name": "layers.0.attn.o_proj", "sensitivity": 0.0, "finer": False}]
    words = sensitivity.all_plots({"int4": INT4 | {"sensitivity": products}}, tmp_path)["sensitivity-int4"]
    assert words.endswith("(437). 1 without loss (weights already on this grid) have no mark.")


def test_a_product_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'lm_head' names no layer, as in layers\.3\.mlp\.down_proj"):
        sensitivity.layer("lm_head")
