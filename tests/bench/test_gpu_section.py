from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.bench import gpu_section
from pipeline.bench.cuda import FOLDERS

PEAKS = {"gpu_peak_bytes": 2_000_000_000, "model_bytes": 500_000_000}


def evaluated() -> dict[str, Any]:
    return {"exact_call_fraction": 0.72, "exact_call_ci95": [0.68, 0.76], "same_reply_fraction_vs_cpu": 0.995}


def measured(p50_s: float, gpu: str = "NVIDIA H200") -> dict[str, Any]:
    clocks = {"max_sm_clock_hz": 1_980_000_000, "max_memory_clock_hz": 3_201_000_000}
    return PEAKS | {
        "call_s": {"p50": p50_s, "p95": 2 * p50_s, "p99": 3 * p50_s},
        "by_concurrency": [{"concurrency": 1, "calls_per_s": 1 / p50_s}, {"concurrency": 20, "calls_per_s": 2 / p50_s}],
        "gpu_utilisation_fraction": 0.5,
        "gpu_power_w": None,
        "bandwidth_fraction": 0.01,
        "provenance": {
            "settings_sha256": "0", "machine": {"gpu": {"name": gpu, "driver": "580.1", **clocks}}
        },
    }  # fmt: skip


def write(reports: Path, **benchmarks: dict[str, Any]) -> None:
    for name, bench in benchmarks.items():
        files.write_json(reports / f"evaluate/cuda/{name}.json", evaluated())
        files.write_json(reports / f"benchmark/cuda/{name}.json", bench)


def test_nothing_is_shown_where_no_gpu_was_measured(tmp_path: Path) -> None:
    assert gpu_section.markdown(gpu_section.read(tmp_path)) == []
    files.write_json(tmp_path / "benchmark/cuda/int8.json", measured(0.01))  # without the check that comes first
    assert gpu_section.markdown(gpu_section.read(tmp_path)) == []


def test_section_has_the_variants_and_names_the_gpu(tmp_path: Path) -> None:
    write(tmp_path, **{name: measured(0.1 / at) for at, name in enumerate(FOLDERS, start=1)})
    title, table, how = gpu_section.markdown(gpu_section.read(tmp_path))
    assert title == "## On a GPU"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    int8 = dict(zip(rows[0], rows[5], strict=True))  # heading, rule, then the fourth of the variants
    assert int8 == {
        "variant": "int8", "exact calls": "72.0% (68.0% to 76.0%)", "replies as on the CPU": "99.5%", "p50 ms": "25.0",
        "p95 ms": "50.0", "p99 ms": "75.0", "faster": "4.00x", "calls/s at 1": "40.0", "calls/s at 20": "80.0",
        "MB on disk": "500", "GPU peak MB": "2000", "GPU busy": "50%", "W": "", "of the memory's bandwidth": "1.0%",
    }  # fmt: skip
    assert how.startswith("NVIDIA H200, driver 580.1, clocks up to 1980 MHz (memory 3201 MHz).")


def test_variants_of_two_gpus_are_refused(tmp_path: Path) -> None:
    write(tmp_path, int8=measured(0.1), int4=measured(0.1, "NVIDIA L4"))
    with pytest.raises(ValueError, match=r"benchmark/cuda is of different runs \(settings or GPUs\): int8, int4"):
        gpu_section.read(tmp_path)


def test_other_sizes_are_called_what_they_are(tmp_path: Path) -> None:
    made = PEAKS | {"call_s": {"p50": 0.2, "p95": 0.3}, "decode_tokens_per_s": 90.0}
    shape = {"shape": "phi-4-mini", "source": "https://example.org", "variants": {"torch-fp32": made, "int8": made}}
    files.write_json(tmp_path / "benchmark/cuda/speed/phi-4-mini.json", shape)
    title, name, table = gpu_section.markdown(gpu_section.read(tmp_path))
    assert title == "## Other sizes on a GPU: speed only, random weights"
    assert name.startswith("phi-4-mini")
    assert "1.00x" in table
