from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.bench.pareto import plot, ranked, shown, verdict

TRIALS = pd.DataFrame(
    [
        {
            "overrides": "sweep.name=s variant=int8 quantize.int8.smoothing=0.0",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.50,
            "p50_s": 0.20,
            "model_bytes": 90,
        },
        {
            "overrides": "sweep.name=s variant=int8 quantize.int8.smoothing=0.5",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.495,
            "p50_s": 0.15,
            "model_bytes": 90,
        },
        {
            "overrides": "sweep.name=s variant=int8 quantize.int8.smoothing=0.7",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.49,
            "p50_s": 0.16,
            "model_bytes": 95,
        },
        {
            "overrides": "sweep.name=s variant=int8 quantize.int8.smoothing=1.0",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.40,
            "p50_s": 0.10,
            "model_bytes": 60,
        },
        {"overrides": "sweep.name=s variant=int8 quantize.int8.smoothing=2", "error": "quantize: no"},
    ]
)


def test_front_and_recommendation(tmp_path: Path) -> None:
    table = ranked(TRIALS, 0.01)
    assert shown(table)["trial"].tolist() == [f"smoothing={at}" for at in ("0.0", "0.5", "0.7", "1.0", "2")]
    assert table["on_front"].tolist() == [True, True, False, True, False]
    assert table["recommended"].tolist() == [False, True, False, False, False]
    assert verdict(table, 0.01).startswith(
        "Recommended: smoothing=0.5, 49.5% exact, p50 150 ms, 0 MB. Rule: the fastest"
    )
    assert shown(table)["exact calls"].tolist() == ["50.0%", "49.5%", "49.0%", "40.0%", "quantize: no"]
    plot(table, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_trials_are_told_apart_by_the_same_settings() -> None:
    """A value's decimal point was taken for the end of its section; the sweep that a trial is of told it apart."""
    given = [
        "sweep.name=s quantize.prompts=28 quantize.int8.smoothing=0.0 quantize.int8.block_size=32",
        "sweep.name=t quantize.prompts=28 quantize.int8.block_size=32 quantize.int8.smoothing=0.5",
        "sweep.name=t quantize.prompts=28 quantize.int8.block_size=64",
        None,
    ]
    table = ranked(TRIALS.head(4).assign(overrides=pd.Series(given)), 0.01)
    assert shown(table)["trial"].tolist() == [
        "prompts=28, smoothing=0.0, block_size=32",
        "prompts=28, smoothing=0.5, block_size=32",
        "prompts=28, block_size=64",
        "as in params.yaml",
    ]


def test_long_settings_leave_the_picture_its_width(tmp_path: Path) -> None:
    """Names of trials beside their dots took 85% of the width from the axes, and lay on each other."""
    table = ranked(TRIALS.assign(overrides=[f"a.{60 * 'x'}={at}" for at in range(5)]), 0.01)
    plot(table, tmp_path / "pareto.png")
    picture = np.asarray(Image.open(tmp_path / "pareto.png").convert("L"))
    assert (picture < 200).sum(axis=1).max() > 0.8 * picture.shape[1]  # the x axis


def test_without_a_success_nothing_is_recommended() -> None:
    table = ranked(TRIALS.tail(1), 0.01)
    assert not table["recommended"].any()
    assert not table["on_front"].any()
