"""What the machine is doing: CPU, memory and GPU figures, read by a thread of its own at most once a second.

Drawing and training only ever look at `Sampler.latest`; asking a driver takes milliseconds and can stall.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from dfcli.system import limits

if TYPE_CHECKING:
    import torch

    from dfcli.system.device import Device

_UUID_PREFIXES = ("GPU-", "MIG-")


@dataclass(frozen=True)
class Stats:
    """One reading; None where a figure is not known. Memory in bytes, temperature in degrees Celsius."""

    cpu_percent: float | None = None  # of the processors this process may use
    memory_used: int | None = None
    memory_total: int | None = None
    process_memory: int | None = None
    gpu_name: str | None = None
    gpu_percent: float | None = None
    gpu_memory_used: int | None = None
    gpu_memory_total: int | None = None
    gpu_temperature: float | None = None
    gpu_power_watts: float | None = None


class Sampler:
    """Keeps `latest` fresh from `start()` to `stop()`; a context manager too. Missing figures stay None."""

    def __init__(self, device: Device | None = None, interval: float = 1.0) -> None:
        self.latest = Stats()
        self._device = device
        self._interval = max(1.0, interval)
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Sampler:
        """Begin to read; the first reading is there when the thread has made it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dfcli-stats", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; `latest` keeps its last value."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def __enter__(self) -> Sampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        gpu = _Gpu.find(self._device.torch_device) if self._device and self._device.kind == "cuda" else None
        psutil.cpu_percent(percpu=True)  # psutil reports the share since the call before
        wait = 0.2  # so that the first figures are there at once
        try:
            while not self._stop.wait(wait):
                self.latest = Stats(**_machine(self._process), **(gpu.read() if gpu else {}))
                wait = self._interval
        finally:
            if gpu:
                gpu.close()


def gpu_memory_used(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that all programs together use; None where NVML does not say. Starts nothing on it."""
    if (gpu := _Gpu.find(device)) is None:
        return None
    try:
        return gpu.read().get("gpu_memory_used")
    finally:
        gpu.close()


def _machine(process: psutil.Process) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        shares = psutil.cpu_percent(percpu=True)
        mine = [shares[i] for i in limits.affinity() if i < len(shares)]
        found["cpu_percent"] = sum(mine) / len(mine) if mine else None
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        free, total = limits.memory()
        found |= {"memory_used": total - free, "memory_total": total}
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        found["process_memory"] = process.memory_info().rss
    return found


class _Gpu:
    """One GPU seen through NVML (the library under nvidia-smi)."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def find(cls, device: torch.device) -> _Gpu | None:
        """The GPU that PyTorch calls `device`, by its UUID: the two libraries count in different orders."""
        try:
            import pynvml
            import torch

            uuid = str(torch.cuda.get_device_properties(device).uuid)
            pynvml.nvmlInit()
        except Exception:  # no NVML, no driver, an older PyTorch: the figures stay unknown
            return None
        for prefix in _UUID_PREFIXES:
            with contextlib.suppress(pynvml.NVMLError):
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid))
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return None

    def read(self) -> dict[str, Any]:
        """What NVML will say now; figures it does not support on this GPU are left out."""
        nvml, handle, found = self._nvml, self._handle, {}
        with contextlib.suppress(nvml.NVMLError):
            name = nvml.nvmlDeviceGetName(handle)
            found["gpu_name"] = name.decode() if isinstance(name, bytes) else name
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_percent"] = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(nvml.NVMLError):
            memory = self._memory()
            found |= {"gpu_memory_used": int(memory.used), "gpu_memory_total": int(memory.total)}
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_temperature"] = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        with contextlib.suppress(nvml.NVMLError):
            found["gpu_power_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000  # NVML counts milliwatts
        return found

    def _memory(self) -> Any:
        """As nvidia-smi counts it: without what the driver reserves, 0.6 GB on an H200, which older drivers do not
        tell apart."""
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2)
        except nvml.NVMLError:
            return nvml.nvmlDeviceGetMemoryInfo(self._handle)

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
