from pathlib import Path

import pandas as pd

from pipeline.bench.pareto import plot, ranked, shown, verdict

TRIALS = pd.DataFrame(
    [
        {
            "overrides": "a",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.50,
            "p50_s": 0.20,
            "model_bytes": 90,
        },
        {
            "overrides": "b",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.495,
            "p50_s": 0.15,
            "model_bytes": 90,
        },
        {
            "overrides": "c",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.49,
            "p50_s": 0.16,
            "model_bytes": 95,
        },
        {
            "overrides": "d",
            "error": None,
            "kl_divergence": 0.01,
            "exact_call_fraction": 0.40,
            "p50_s": 0.10,
            "model_bytes": 60,
        },
        {"overrides": "e", "error": "quantize: no"},
    ]
)


def test_front_and_recommendation(tmp_path: Path) -> None:
    table = ranked(TRIALS, 0.01)
    assert table["overrides"].tolist() == ["a", "b", "c", "d", "e"]
    assert table["on_front"].tolist() == [True, True, False, True, False]
    assert table["recommended"].tolist() == [False, True, False, False, False]
    assert verdict(table, 0.01).startswith("Recommended: b, 49.5% exact, p50 150 ms, 0 MB. Rule: the fastest")
    assert shown(table)["exact calls"].tolist() == ["50.0%", "49.5%", "49.0%", "40.0%", "quantize: no"]
    plot(table, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_without_a_success_nothing_is_recommended() -> None:
    table = ranked(TRIALS.tail(1), 0.01)
    assert not table["recommended"].any()
    assert not table["on_front"].any()
