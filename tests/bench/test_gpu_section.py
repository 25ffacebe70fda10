from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.bench import gpu_section
from pipeline.bench.cuda import FOLDERS

PEAKS = {"gpu_peak_bytes": 2_000_000_000, "model_bytes": 500_000_000}


def evaluated() -> dict[str, Any]:
    return {
        "exact_call_fraction": 0.72,
        "exact_call_ci95": [0.68, 0.76],
        "same_reply_fraction_vs_cpu": 0.995,
        "withheld": False,
        "provenance": {"inputs_sha256": {"requests": "r", "model": "m"}},
    }


def measured(p50_s: float, gpu: str = "NVIDIA H200") -> dict[str, Any]:
    clocks = {"max_sm_clock_hz": 1_980_000_000, "max_memory_clock_hz": 3_201_000_000}
    return PEAKS | {
        "call_s": {"p50": p50_s, "p95": 2 * p50_s, "p99": 3 * p50_s},
        "by_concurrency": [{"concurrency": 1, "calls_per_s": 1 / p50_s}, {"concurrency": 20, "calls_per_s": 2 / p50_s}],
        "gpu_utilisation_fraction": 0.5,
        "gpu_power_w": None,
        "bandwidth_fraction": 0.01,
        "provenance": {
            "settings_sha256": "0", "machine": {"gpu": {"name": gpu, "driver": "580.1", **clocks}},
            "inputs_sha256": {"requests": "r", "model": "m"},
        },
    }  # fmt: skip


def cost(calls_per_day: float | None = 20_000.0) -> dict[str, Any]:
    priced = {"usd_per_million_tokens": 0.25, "usd_per_thousand_correct_calls": 0.0125}
    at = {"cpu_machines": 3, "calls_per_day": calls_per_day, "gpu_calls_per_day": 90_000.0}
    return {
        "machine": {"name": "box", "usd_per_hour": 2.0},
        "gpu_machine": {"name": "g", "usd_per_hour": 5.0, "provider": "P", "date": "2026-10", "source": "a list"},
        "gpu_variants": dict.fromkeys(FOLDERS, priced)
        | {"torch-fp32": priced | {"usd_per_thousand_correct_calls": None}},
        "gpu_break_even": {
            "utilisation": 0.5,
            "variants": {"int4": {"int8": at | {"cpu_machines_for_gpu_calls": 2}}},
        },
    }


def write(reports: Path, **benchmarks: dict[str, Any]) -> None:
    for name, bench in benchmarks.items():
        files.write_json(reports / f"evaluate/cuda/{name}.json", evaluated())
        files.write_json(reports / f"benchmark/cuda/{name}.json", bench)


def test_nothing_is_shown_where_no_gpu_was_measured(tmp_path: Path) -> None:
    assert gpu_section.markdown(gpu_section.read(tmp_path), {}, "int8") == []
    files.write_json(tmp_path / "benchmark/cuda/int8.json", measured(0.01))  # without the check that comes first
    assert gpu_section.markdown(gpu_section.read(tmp_path), {}, "int8") == []


def test_section_has_the_variants_and_names_the_gpu(tmp_path: Path) -> None:
    write(tmp_path, **{name: measured(0.1 / at) for at, name in enumerate(FOLDERS, start=1)})
    title, table, how, price = gpu_section.markdown(gpu_section.read(tmp_path), cost(), "int8")
    assert title == "## On a GPU"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    int8 = {row[0]: row[rows[0].index("int8")] for row in rows[2:]}  # after heading and rule
    assert int8 == {
        "exact calls": "72.0% (68.0% to 76.0%)", "same reply as CPU": "99.5%", "p50 ms": "25.0",
        "p95 ms": "50.0", "p99 ms": "75.0", "faster": "4.00x", "calls/s at 1": "40.0", "calls/s at 20": "80.0",
        "MB on disk": "500", "GPU peak MB": "2000", "GPU busy": "50%", "W": "", "memory bandwidth used": "1.0%",
        "USD per million tokens": "0.250", "USD per 1,000 exact calls": "0.0125",
    }  # fmt: skip
    assert rows[-1][rows[0].index("torch-fp32")] == ""  # never right here
    assert how.startswith("NVIDIA H200, driver 580.1, clocks up to 1980 MHz (memory 3201 MHz).")
    assert price == (
        "Price: g at 5.0 USD per hour (P, 2026-10: a list). Break-even of its fastest variant (p50), int4, vs int8 on "
        "box at 2.0 USD per hour: one g costs less above 20,000 calls/day, where 3 or more box are needed; it answers "
        "up to 90,000. Every machine is rented all day and busy 50% of it; all calls count, exact or not."
    )


def test_section_says_where_a_gpu_machine_never_costs_less(tmp_path: Path) -> None:
    write(tmp_path, int4=measured(0.1))
    *_, price = gpu_section.markdown(gpu_section.read(tmp_path), cost(calls_per_day=None), "int8")
    never = "one g never costs less: 2 box are enough for all 90,000 calls/day it can answer, at 4.00 USD per hour."
    assert never in price


def test_prices_from_before_the_gpu_was_measured_are_refused(tmp_path: Path) -> None:
    write(tmp_path, int8=measured(0.1), int4=measured(0.1))
    olds: list[tuple[dict[str, Any], str]] = [({}, "int8, int4"), ({"gpu_variants": {"int4": {}}}, "int8;")]
    for old, missing in olds:
        with pytest.raises(ValueError, match=f"no price on a GPU for {missing}"):
            gpu_section.markdown(gpu_section.read(tmp_path), old, "int8")


def test_variants_of_two_gpus_are_refused(tmp_path: Path) -> None:
    write(tmp_path, int8=measured(0.1), int4=measured(0.1, "NVIDIA L4"))
    with pytest.raises(ValueError, match=r"benchmark/cuda is of different runs \(settings or GPUs\): int8, int4"):
        gpu_section.read(tmp_path)


def test_a_variant_timed_as_another_model_than_it_was_scored_as_is_refused(tmp_path: Path) -> None:
    write(tmp_path, int8=measured(0.1))
    found = measured(0.1)
    found["provenance"]["inputs_sha256"]["model"] = "of before"
    files.write_json(tmp_path / "benchmark/cuda/int8.json", found)
    with pytest.raises(ValueError, match=r"cuda/int8\.json is of another model than .*evaluate/cuda/int8\.json"):
        gpu_section.read(tmp_path)


def test_a_variant_that_was_scored_and_not_timed_is_named(tmp_path: Path) -> None:
    files.write_json(tmp_path / "evaluate/cuda/int8.json", evaluated())
    said = gpu_section.markdown(gpu_section.read(tmp_path), {}, "int8")
    assert said == ["## On a GPU", "Not measured: int8; dvc repro pipeline/cuda/dvc.yaml says why."]


def test_other_sizes_are_called_what_they_are(tmp_path: Path) -> None:
    made = PEAKS | {
        "call_s": {"p50": 0.2, "p95": 0.3, "p99": 0.4},
        "decode_tokens_per_s": 90.0,
        "calls_per_s": {"1": 4.9, "20": 4.9},
        "gpu": {"name": "NVIDIA H200"},
    }
    rows = made | {"calls_per_s": {"1": 5.0, "20": 61.3}, "gpu_utilisation_fraction": 0.34}
    shape = {
        "shape": "phi-4-mini",
        "source": "https://example.org",
        "new_tokens": 10,
        "variants": {"torch-fp32": made, "int8": rows},
    }
    files.write_json(tmp_path / "benchmark/cuda/speed/phi-4-mini.json", shape)
    title, name, table, how = gpu_section.markdown(gpu_section.read(tmp_path), {}, "int8")
    assert how == "PyTorch answers one request at a time, regardless of the number of clients."
    assert (
        "on g at 5.0 USD per hour, busy 50% of it."
        in gpu_section.markdown(gpu_section.read(tmp_path), cost(), "int8")[-1]
    )
    assert title == "## Other model sizes on a GPU: speed only, random weights"
    assert name == "phi-4-mini (`https://example.org`), on NVIDIA H200:"
    assert "1.00x" in table
    assert "calls/s at 20" in table
    assert "61.3" in table
    assert "34%" in table
    assert "nan" not in table
    priced = gpu_section.speed(gpu_section.read(tmp_path)["speed"][0], cost())
    # 5 USD an hour, busy half of it: 613 and 49 tokens/s make 1.1034 and 0.0882 million tokens
    assert list(priced["USD per million tokens"]) == ["56.689", "4.531"]
    write(tmp_path, int8=measured(0.1, "NVIDIA L4"))  # whose machine's price would stand beside the other's speed
    with pytest.raises(ValueError, match=r"speed/ are of different GPUs: NVIDIA H200, NVIDIA L4; dvc repro"):
        gpu_section.read(tmp_path)


def test_a_variant_below_the_gate_shows_its_share_alone(tmp_path: Path) -> None:
    write(tmp_path, int8=measured(0.1), int4=measured(0.1))
    gate = {"gpu": "NVIDIA H200", "same_reply_fraction_vs_cpu": 0.424, "min_same_reply_fraction": 0.99}
    files.write_json(tmp_path / "evaluate/cuda/int4.json", gate | {"withheld": True})
    found = gpu_section.read(tmp_path)
    assert list(found["benchmark"]) == ["int8"]
    said = "Withheld: on NVIDIA H200, int4 gives the CPU's reply on 42.4% of the requests; 99.0% are required."
    priced = cost()
    priced["gpu_break_even"]["variants"] = {"int8": priced["gpu_break_even"]["variants"]["int4"]}
    assert gpu_section.markdown(found, priced, "int8")[-1] == said
    (tmp_path / "benchmark/cuda/int8.json").unlink()
    (tmp_path / "evaluate/cuda/int8.json").unlink()
    assert gpu_section.markdown(gpu_section.read(tmp_path), {}, "int8") == ["## On a GPU", said]
