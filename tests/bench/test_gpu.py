"""NVML as a fake with its real signatures: no GPU is needed."""

import os
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pipeline.bench.gpu import Gpu, Sample, measures


class Nvml:
    """One H100-like GPU. `processes`: (pid, bytes) that NVML lists."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVMLError = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVMLError

    def __init__(self, processes: list[tuple[int, int | None]] | None = None, is_whole: bool = True) -> None:
        self.processes, self.is_whole, self.used_bytes, self.opened = processes or [], is_whole, 1000, ""

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.opened = f"index {index}"
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.opened = uuid
        return "handle"

    def nvmlDeviceGetName(self, _handle: str) -> str:  # noqa: N802
        return "NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, _handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(total=80_000, used=self.used_bytes)

    def nvmlDeviceGetMaxClockInfo(self, _handle: str, clock: int) -> int:  # noqa: N802
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[clock]

    def nvmlDeviceGetMemoryBusWidth(self, _handle: str) -> int:  # noqa: N802
        return 5120

    def nvmlDeviceGetPowerUsage(self, _handle: str) -> int:  # noqa: N802
        if not self.is_whole:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_000

    def nvmlDeviceGetUtilizationRates(self, _handle: str) -> Any:  # noqa: N802
        if not self.is_whole:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=40, memory=10)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


def test_facts_name_the_gpu_its_driver_and_its_limits() -> None:
    facts = Gpu(Nvml()).facts()
    assert (facts["name"], facts["driver"], facts["memory_bytes"]) == ("NVIDIA H100", "580.1", 80_000)
    assert (facts["max_sm_clock_hz"], facts["max_memory_clock_hz"]) == (1_980_000_000, 2_619_000_000)
    # 2619 MHz, twice a cycle, 640 bytes wide: 3.35 TB/s, as in NVIDIA's data sheet of the H100 SXM
    assert facts["bandwidth_bytes_per_s"] == pytest.approx(3.35e12, rel=0.001)


@pytest.mark.parametrize(
    ("visible", "opened"), [("", "index 0"), ("0,1", "index 0"), ("3", "index 3"), ("GPU-12ab", "GPU-12ab")]
)
def test_the_first_visible_gpu_is_watched(monkeypatch: pytest.MonkeyPatch, visible: str, opened: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml()
    Gpu(nvml)
    assert nvml.opened == opened


def test_memory_is_this_process_own_or_what_came_on_the_gpu_where_none_is_listed() -> None:
    nvml = Nvml([(1, 5000), (os.getpid(), 700)])
    assert Gpu(nvml).sample() == Sample(700, 0.4, 350.0)
    hidden = Nvml([(os.getpid(), None)], is_whole=False)
    gpu = Gpu(hidden)
    hidden.used_bytes += 300
    assert gpu.sample() == Sample(300, None, None)


def test_watch_samples_until_the_block_ends() -> None:
    with Gpu(Nvml()).watch(interval_s=3600) as samples:
        assert samples == []
    assert len(samples) == 1


def test_measures_are_the_peak_alone_and_means_under_load() -> None:
    alone = [Sample(100, 0.1, None), Sample(900, 0.0, None), Sample(300, 0.2, None)]
    busy = [Sample(9999, 0.5, 100.0), Sample(9999, 1.0, 300.0)]
    assert measures(alone, busy) == {
        "gpu_peak_bytes": 900, "gpu_utilisation_fraction": 0.75, "gpu_power_w": 200.0
    }  # fmt: skip
    assert measures(alone, alone)["gpu_power_w"] is None
    assert measures(alone, [Sample(1, None, None)])["gpu_utilisation_fraction"] is None


def test_a_machine_without_nvml_is_refused() -> None:
    class Absent(Nvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    with pytest.raises(RuntimeError, match="the device is cuda, but NVML finds no GPU"):
        Gpu(Absent())
