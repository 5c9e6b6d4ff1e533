from __future__ import annotations

import dataclasses
import sys
import threading
import time
import types

import pytest
import torch

from dfcli.system.device import Device, resolve
from dfcli.system.stats import Sampler, Stats

CUDA = Device(torch.device("cuda", 0), "cuda", "Test GPU", "bfloat16", "", 1)


def first_reading(sampler: Sampler) -> Stats:
    with sampler:
        deadline = time.monotonic() + 10
        while sampler.latest.memory_total is None and time.monotonic() < deadline:
            time.sleep(0.02)
    return sampler.latest


def test_cpu_and_memory_are_read_and_gpu_figures_stay_unknown():
    stats = first_reading(Sampler(resolve("cpu")))
    assert stats.cpu_percent is not None
    assert 0 <= stats.cpu_percent <= 100
    assert stats.memory_used is not None
    assert stats.memory_total is not None
    assert 0 < stats.memory_used <= stats.memory_total
    assert stats.process_memory is not None
    assert stats.process_memory > 10 * 2**20
    gpu = {name: value for name, value in dataclasses.asdict(stats).items() if name.startswith("gpu")}
    assert set(gpu.values()) == {None}


def test_stop_ends_the_thread_and_keeps_the_last_reading():
    before = threading.active_count()
    sampler = Sampler(None)
    stats = first_reading(sampler)
    assert threading.active_count() == before
    assert sampler.latest == stats
    Sampler(None).stop()  # never started


def test_a_gpu_without_nvml_gives_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes its import fail
    assert first_reading(Sampler(CUDA)).gpu_name is None


class FakeNvml(types.ModuleType):
    """An NVML with one GPU that does not report its power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, old: bool = False) -> None:
        super().__init__("pynvml")
        self.open, self.old = 0, old

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"Fake {handle}"

    def nvmlDeviceGetUtilizationRates(self, _: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(gpu=87)

    nvmlMemory_v2 = 2

    def nvmlDeviceGetMemoryInfo(self, _: str, version: int = 1) -> types.SimpleNamespace:
        if version == 2 and self.old:
            raise self.NVMLError
        return types.SimpleNamespace(used=3 if version == 2 else 4, total=5)

    def nvmlDeviceGetTemperature(self, _: str, __: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        raise self.NVMLError


@pytest.mark.parametrize(("uuid", "old"), [("1234", False), ("1234", True), ("another", False)])
def test_gpu_figures_come_from_nvml_by_uuid(uuid: str, old: bool, monkeypatch: pytest.MonkeyPatch):
    nvml = FakeNvml(old)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid=uuid))
    stats = first_reading(Sampler(CUDA))
    if uuid == "1234":
        assert (stats.gpu_name, stats.gpu_percent, stats.gpu_temperature) == ("Fake handle", 87.0, 61.0)
        assert (stats.gpu_memory_used, stats.gpu_memory_total) == (4 if old else 3, 5)
    else:
        assert stats.gpu_name is None
    assert stats.gpu_power_watts is None
    assert nvml.open == 0
