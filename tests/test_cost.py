"""Prices of made-up reports; every expected number is worked out by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.cost import VARIANTS, CostConfig, Hosted, Machine, gpu_machine, run

HOSTED = Hosted("big", 1.0, 5.0, "P", "2026-10", "a list", 1000, 100, 0.9)  # 0.0015 USD a call
CPU, GPU = (
    Machine(0.18, "P", "2026-10", "a list", []),
    Machine(0.9, "Q", "2026-11", "another", ["NVIDIA X1", "X1 PCIe"]),
)
CFG = CostConfig("box", None, {"box": CPU, "card": GPU}, 0.5, [1.0], 2.0, 10**6, HOSTED, [0.5])


def write(reports: Path, calls_per_s: float, *names: str, gpu: str | None = None) -> None:
    """A call is 20 tokens, four of five are right; two clients get twice as many, over the p95 limit."""
    folder = "cuda/" if gpu else ""
    inputs = {"inputs_sha256": {"requests": "r", "model": "m"}}
    where = {"settings_sha256": "0", "machine": {"gpu": {"name": gpu}}, **inputs}
    levels = [
        {"concurrency": n, "calls_per_s": n * calls_per_s, "new_tokens_per_s": 20 * n * calls_per_s, "p95_s": 1.5 * n}
        for n in (1, 2)
    ]
    reply: dict[str, Any] = {"called": True, "confidence": 0.9, "apart": False}
    replies = [reply | {"outcome": outcome} for outcome in ("exact", "exact", "exact", "exact", "wrong_tool")]
    replies += 20 * [reply | {"outcome": "silent", "apart": True}]  # not in the test's figures, nor in those of costs
    for name in names:
        files.write_json(reports / f"benchmark/{folder}{name}.json", {"by_concurrency": levels, "provenance": where})
        scored = {"exact_call_fraction": 0.8, "withheld": False, "provenance": inputs}
        files.write_json(reports / f"evaluate/{folder}{name}.json", scored)
        files.write_jsonl(reports / f"evaluate/{folder}{name}.replies.jsonl", replies)


def priced(reports: Path, cfg: CostConfig = CFG) -> dict[str, Any]:
    found = run(reports, reports / "cost.json", cfg)
    written = files.read_json(reports / "cost.json")
    assert written.pop("provenance")
    assert written == found
    return found


def test_without_a_gpu_there_is_nothing_about_one(tmp_path: Path) -> None:
    write(tmp_path, 1.0, *VARIANTS)
    found = priced(tmp_path)
    settings = {"utilisation", "p95_limit_s", "tokens_per_day"}
    assert set(found) == {"machine", "hosted", "variants", "gpu_machines"} | settings
    assert found["machine"] == {
        "name": "box", "usd_per_hour": 0.18, "provider": "P", "date": "2026-10", "source": "a list"
    }  # fmt: skip
    int8 = found["variants"]["int8"]
    # one call a second, half of the time: 1,800 an hour for 0.18 USD
    assert int8["usd_per_thousand_calls"] == pytest.approx(0.1)
    assert int8["usd_per_million_tokens"] == pytest.approx(5.0)  # 20 tokens a call
    assert int8["usd_per_thousand_correct_calls"] == pytest.approx(0.125)
    assert int8["concurrency"] == 1  # two clients' p95 is 3 s
    assert int8["within_p95_limit"]
    assert found["hosted"]["break_even_calls_per_day"] == pytest.approx(2880)  # 4.32 USD a day, 0.0015 a call
    # five times the price of the box, which answers one call a second
    assert found["gpu_machines"][0]["calls_per_s_to_pay"]["int8"] == pytest.approx(5.0)


def test_a_days_traffic_is_on_whole_machines(tmp_path: Path) -> None:
    """A million tokens a day cost their share of a machine's price: two thirds of a machine, which nobody rents out."""
    write(tmp_path, 1.0, *VARIANTS)
    # 20 tokens a second, half of the day: 864,000
    for tokens, machines in ((864_000, 1), (10**6, 2), (10, 1)):
        int8 = priced(tmp_path, replace(CFG, tokens_per_day=tokens))["variants"]["int8"]
        assert int8["machines"] == machines
        assert int8["usd_per_day"] == pytest.approx(machines * 24 * 0.18)
        assert int8["usd_per_year"] == pytest.approx(365.25 * machines * 24 * 0.18)


def test_gpu_is_priced_on_the_machine_that_has_it(tmp_path: Path) -> None:
    write(tmp_path, 1.0, *VARIANTS)
    on_cpu = priced(tmp_path)
    write(tmp_path, 10.0, "torch-fp32", gpu="NVIDIA X1")
    write(tmp_path, 50.0, "int8", gpu="NVIDIA X1")
    found = priced(tmp_path)
    assert {key: found[key] for key in on_cpu} == on_cpu
    assert found["gpu_machine"] == {
        "name": "card", "usd_per_hour": 0.9, "provider": "Q", "date": "2026-11", "source": "another"
    }  # fmt: skip
    int8 = found["gpu_variants"]["int8"]
    assert set(int8) == set(found["variants"]["int8"])
    # 50 calls a second, half of the time: 90,000 an hour for 0.9 USD
    assert int8["usd_per_thousand_calls"] == pytest.approx(0.01)
    assert int8["usd_per_million_tokens"] == pytest.approx(0.5)
    assert int8["usd_per_thousand_correct_calls"] == pytest.approx(0.0125)
    assert int8["savings_fraction"] == pytest.approx(0.8)  # a fifth of torch-fp32's on the same GPU


def test_break_even_is_between_every_variant_there_and_here(tmp_path: Path) -> None:
    write(tmp_path, 1.0, *VARIANTS)
    write(tmp_path, 10.0, "int4", gpu="NVIDIA X1")
    write(tmp_path, 4.0, "int8", gpu="NVIDIA X1")
    found = priced(tmp_path)
    assert found["gpu_variants"]["int8"]["savings_fraction"] is None  # torch-fp32 was not measured there
    at = found["gpu_break_even"]
    assert at["utilisation"] == 0.5
    assert {name: set(rows) for name, rows in at["variants"].items()} == {"int8": set(VARIANTS), "int4": set(VARIANTS)}
    # half a day on the CPU is 43,200 calls; five boxes cost 0.9 USD an hour, as the card does, and answer 216,000
    assert at["variants"]["int4"]["int8"] == {
        "cpu_machines": 6, "calls_per_day": 216_000, "gpu_calls_per_day": 432_000, "cpu_machines_for_gpu_calls": 10,
    }  # fmt: skip
    assert at["variants"]["int8"]["int8"] == {  # four boxes do what the card does
        "cpu_machines": 6, "calls_per_day": None, "gpu_calls_per_day": 172_800, "cpu_machines_for_gpu_calls": 4,
    }  # fmt: skip


def test_a_gpu_that_no_machine_or_several_name_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"'NVIDIA X1 NVL', which 0 of .*gpu_machine must be one of \['card'\]"):
        gpu_machine("NVIDIA X1 NVL", CFG)
    two = replace(CFG, machines=CFG.machines | {"other": GPU, "third": replace(GPU, gpus=["NVIDIA X2"])})
    with pytest.raises(ValueError, match=r"which 2 of .*gpu_machine must be one of \['card', 'other'\]"):
        gpu_machine("NVIDIA X1", two)
    assert gpu_machine("X1 PCIe", CFG) == "card"
    assert gpu_machine("NVIDIA X1", replace(two, gpu_machine="other")) == "other"
