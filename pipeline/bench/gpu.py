"""What NVML says of the GPU: its properties, and how much of it this process uses. Only for the device cuda."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(frozen=True)
class Sample:
    memory_bytes: int
    # Share of NVML's last period (up to a second) in which any process ran a kernel. None if the GPU does not say.
    utilisation_fraction: float | None
    power_w: float | None


class Gpu:
    """The first of CUDA_VISIBLE_DEVICES, or of all GPUs, in NVML's order: set CUDA_DEVICE_ORDER=PCI_BUS_ID too."""

    def __init__(self, nvml: Any = pynvml) -> None:
        """`nvml`: pynvml, or a fake of it. Raises RuntimeError if it finds no GPU."""
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
            by = nvml.nvmlDeviceGetHandleByIndex if first.isdigit() else nvml.nvmlDeviceGetHandleByUUID
            self._handle = by(int(first) if first.isdigit() else first)
        except nvml.NVMLError as error:
            raise RuntimeError(f"the device is cuda, but NVML finds no GPU: {error}") from error
        self._before_bytes = int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def facts(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        return {
            "name": nvml.nvmlDeviceGetName(handle),
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            "max_sm_clock_hz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 10**6,
            "max_memory_clock_hz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM) * 10**6,
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s(),
        }

    def bandwidth_bytes_per_s(self) -> float:
        """Theoretical: the memory's highest clock, times two transfers per cycle, times the width of its bus."""
        clock_mhz = self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_MEM)
        return float(clock_mhz * 1e6 * 2 * self._nvml.nvmlDeviceGetMemoryBusWidth(self._handle) / 8)

    def sample(self) -> Sample:
        power_mw = self._offered(self._nvml.nvmlDeviceGetPowerUsage)
        used = self._offered(self._nvml.nvmlDeviceGetUtilizationRates)
        return Sample(
            self._memory_bytes(),
            None if used is None else used.gpu / 100,
            None if power_mw is None else power_mw / 1000,
        )

    def _offered(self, ask: Callable[[Any], Any]) -> Any:
        """None if this GPU, or its MIG instance, does not say."""
        try:
            return ask(self._handle)
        except self._nvml.NVMLError as error:
            if error.value not in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION):
                raise
            return None

    def _memory_bytes(self) -> int:
        """Of this process; if NVML does not list it, as in a container, the GPU's growth since this object was made."""
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return max(0, int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) - self._before_bytes)

    @contextmanager
    def watch(self, interval_s: float = 0.02) -> Iterator[list[Sample]]:
        """A list that gets a sample every `interval_s`, and one when the block ends."""
        samples: list[Sample] = []
        over = threading.Event()

        def keep_sampling() -> None:
            while not over.wait(interval_s):
                samples.append(self.sample())

        thread = threading.Thread(target=keep_sampling, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            over.set()
            thread.join()
            samples.append(self.sample())


def measures(alone: Sequence[Sample], busy: Sequence[Sample]) -> dict[str, Any]:
    """`alone`: samples while the model loads and answers one client. `busy`: samples under the largest load."""
    return {
        "gpu_peak_bytes": max(sample.memory_bytes for sample in alone),
        "gpu_utilisation_fraction": _mean([sample.utilisation_fraction for sample in busy]),
        "gpu_power_w": _mean([sample.power_w for sample in busy]),
    }


def _mean(found: Sequence[float | None]) -> float | None:
    said = [value for value in found if value is not None]
    return sum(said) / len(said) if said else None
