from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.tables import LADDER, ablation, projection, speed
from pipeline.report import ReportConfig, fault, recommend, require_one_run, run

CFG = ReportConfig(max_loss_fraction=0.02, significance=0.05, min_exact_fraction=0.5, gate=False, against=None)
FP32 = {"exact_call_fraction": 0.80}


@pytest.mark.parametrize(
    ("exact", "p", "why"),
    [
        (0.80, None, None),
        (0.85, 0.01, None),  # significantly better is no fault
        (0.79, 0.30, None),
        (0.78, 0.30, None),  # as many as it may lose, and 0.8 - 0.78 is more than 0.02
        (0.77, 0.30, "3.0 points below fused-fp32"),
        (0.79, 0.01, "significantly below fused-fp32, p = 0.010"),
        (0.45, 1.00, "45.0% exact, under 50%"),
    ],
)
def test_fault_names_what_keeps_a_variant_back(exact: float, p: float | None, why: str | None) -> None:
    assert fault({"exact_call_fraction": exact, "mcnemar_p_vs_fp32": p}, FP32, CFG) == why


def test_report_before_its_inputs_names_them_all(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError,
        match=r"lacks evaluate/keyword.json, .*/int4.json, quantize/int8.json, quantize/int4.json, export.json",
    ):
        run(tmp_path, CFG)


def test_the_fastest_without_a_fault_is_recommended() -> None:
    found: dict[str, Any] = {
        "benchmark": {
            name: {"call_s": {"p50": p50}} for name, p50 in (("int4", 0.1), ("int8", 0.2), ("fused-fp32", 0.3))
        }
    }
    assert recommend(found, {"int4": "lost", "int8": None, "fused-fp32": None}) == "int8"
    assert recommend(found, {"int4": "lost", "int8": "lost", "fused-fp32": "lost"}) is None


def test_ablation_table_has_a_column_for_each_variant_with_techniques() -> None:
    rows = [
        {"techniques": "all", "call_p50_s": 0.1, "same_reply_fraction": 1.0},
        {"techniques": "without drafts", "call_p50_s": 0.15, "same_reply_fraction": 0.5},
    ]
    table = ablation({"benchmark": {"torch-fp32": {"ablation": []}, "int8": {"ablation": rows}}})
    assert table.to_dict() == {"int8": {"all": "100 ms, 1.00x, 100% same", "without drafts": "150 ms, 1.50x, 50% same"}}


def test_reply_tokens_per_second_are_over_whole_calls() -> None:
    """Where calls are sent whole, tokens after the first over the time after it gave 2,146 tokens/s."""
    ranks = {"p50": 0.1, "p95": 0.2, "p99": 0.2, "mean": 0.125}
    made = {"call_s": ranks, "calls": 2, "mean_new_tokens": 25.0, "prefill_tokens_per_s": 700.0, "load_s": 1.0}
    (row,) = speed({"benchmark": {"int4": made}}).to_dict("records")
    assert row["reply tokens/s"] == "200"  # 50 tokens in a quarter of a second


def test_prices_say_their_clients_calls_and_whether_p95_was_too_long() -> None:
    priced = {"usd_per_thousand_calls": 0.1, "usd_per_thousand_correct_calls": None, "usd_per_million_tokens": 5.0}
    priced |= {"usd_per_day": 8.64, "usd_per_month": 263.0, "usd_per_year": 3156.0, "savings_fraction": 0.25}
    priced |= {"concurrency": 10, "within_p95_limit": True, "most_calls_per_day": 86_400.0, "machines": 2}
    slow = priced | {"concurrency": 1, "within_p95_limit": False}
    variants = dict.fromkeys(LADDER, priced) | {"torch-fp32": slow}
    table = projection({"variants": variants, "p95_limit_s": 2.0, "utilisation": 0.5}).set_index("variant").T.to_dict()
    assert table["torch-fp32"]["clients"] == "1, p95 over 2 s"
    expected = {"clients": "10", "calls/day per machine": "43,200", "machines": "2", "USD per day": "8.64"}
    assert table["int8"].items() >= (expected | {"saved against torch-fp32": "25%"}).items()


def test_reports_of_two_runs_are_refused_by_name() -> None:
    def made(stage: str, name: str) -> dict[str, Any]:
        here = {"cpu": "X", "cores": 64 if (stage, name) == ("benchmark", "int4") else 2}
        inputs = {"requests": "r", "model": "m"}
        return {"provenance": {"settings_sha256": "0", "machine": here, "inputs_sha256": inputs}}

    found = {stage: {name: made(stage, name) for name in LADDER} for stage in ("evaluate", "benchmark")}
    found["cuda"] = {"evaluate": {}}
    with pytest.raises(ValueError, match=r"reports/benchmark is of different runs .*fused-fp32, int8 / int4"):
        require_one_run(found)
    found["benchmark"]["int4"] = found["benchmark"]["int8"]
    require_one_run(found)
    for name, key in (("torch-fp32", "model"), ("int4", "later")):
        other = found["evaluate"]["int8"]["provenance"]
        found["cuda"] = {"evaluate": {name: {"provenance": {"inputs_sha256": {**other["inputs_sha256"], key: "old"}}}}}
        with pytest.raises(ValueError, match=rf"evaluate/cuda/{name}\.json is of another {key} than"):
            require_one_run(found)
    found["cuda"] = {"evaluate": {}}
    found["evaluate"]["int8"] = {"provenance": {**found["evaluate"]["int8"]["provenance"], "settings_sha256": "1"}}
    with pytest.raises(ValueError, match="reports/evaluate is of different runs"):
        require_one_run(found)


@pytest.mark.parametrize("key", ["model", "requests"])
def test_figures_of_two_models_or_of_other_requests_are_refused(key: str) -> None:
    def made(at: str) -> dict[str, Any]:
        inputs = {"requests": "r", "model": "m"} | {key: at}
        return {"provenance": {"settings_sha256": "0", "machine": {"cpu": "X", "cores": 2}, "inputs_sha256": inputs}}

    found = {stage: {name: made(stage) for name in LADDER} for stage in ("evaluate", "benchmark")}
    with pytest.raises(ValueError, match=rf"torch-fp32\.json is of another {key} than .* benchmark@torch-fp32"):
        require_one_run(found)
