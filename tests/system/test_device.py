from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dfcli.errors import UsageError
from dfcli.system import device as devices
from dfcli.system import limits


def gpu(name: str, precision: str = "bfloat16") -> devices.Device:
    return devices.Device(torch.device("cuda", 0), "cuda", name, precision, "", 1)


def test_cpu_is_float32_and_says_why():
    cpu = devices.resolve("cpu")
    assert (cpu.kind, cpu.precision, cpu.torch_device) == ("cpu", "float32", torch.device("cpu"))
    assert "float32" in cpu.reason
    assert f"{cpu.threads} thread" in cpu.name


def test_auto_takes_the_best_device_there_is():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert devices.resolve("auto").kind == expected


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "CPU", "cpu:0", "cuda:²"])
def test_unknown_names_are_refused_and_the_known_ones_listed(name: str):
    with pytest.raises(UsageError) as caught:
        devices.resolve(name)
    assert "is no device" in caught.value.message
    assert "auto, cpu, cuda" in caught.value.hint


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_cuda_is_one_sentence_and_a_hint(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "_cuda_problem", lambda: "")
    with pytest.raises(UsageError) as caught:
        devices.resolve(name)
    assert caught.value.message == "no CUDA device was found"
    assert "--device auto" in caught.value.hint


def test_a_cuda_index_out_of_range_names_those_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "_cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError) as caught:
        devices.resolve("cuda:7")
    assert "cuda:7" in caught.value.message
    assert caught.value.hint == "this machine has cuda:0, cuda:1"


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32")])
def test_bfloat16_only_where_the_gpu_has_units(capability, precision, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "_cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    found = devices.resolve("cuda")
    assert (found.name, found.precision, found.torch_device.index) == ("Test GPU", precision, 0)
    assert precision in found.reason


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A1000", None),  # not an A100
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some New GPU", None),
    ],
)
def test_peak_rates_of_gpus(name: str, peak: float | None):
    assert gpu(name).peak_flops() == peak


def test_peak_rate_without_bfloat16_is_the_float32_one():
    assert gpu("Tesla T4", "float32").peak_flops() == 8.1e12
    assert gpu("NVIDIA A100-SXM4-80GB", "float32").peak_flops() is None


def test_peak_rate_of_a_cpu_is_measured_once():
    cpu = devices.resolve("cpu")
    peak = cpu.peak_flops()
    assert peak is not None
    assert 1e8 < peak < 1e14
    assert cpu.peak_flops() == peak


def test_autocast_follows_the_precision():
    cpu = devices.resolve("cpu")
    a = torch.ones(4, 4)
    with cpu.autocast():
        assert (a @ a).dtype == torch.float32
    with dataclasses.replace(cpu, precision="bfloat16").autocast():
        assert (a @ a).dtype == torch.bfloat16
    assert (a @ a).dtype == torch.float32


def test_cpu_memory_and_synchronize():
    cpu = devices.resolve("cpu")
    free, total = cpu.memory_bytes()
    assert 0 < free <= total
    cpu.synchronize()


def test_threads_never_exceed_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(limits, "cpus", lambda: 1)
        assert devices.set_threads() == 1
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(limits, "cpus", lambda: 64)
        assert devices.set_threads() == 1  # never raised: OMP_NUM_THREADS and physical cores stay honoured
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),  # one and a half processors: two threads
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "garbage"}, 8),
    ],
)
def test_cpus_follow_container_quotas(files, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_cgroups(files, tmp_path, monkeypatch)
    monkeypatch.setattr(limits, "affinity", lambda: list(range(8)))
    assert limits.cpus() == expected


def test_cpus_follow_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_cgroups({"cpu.max": "800000 100000"}, tmp_path, monkeypatch)
    monkeypatch.setattr(limits, "affinity", lambda: [3])
    assert limits.cpus() == 1


def test_memory_follows_container_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "memory.max": "1000000",
        "memory.current": "700000",
        "memory.stat": "anon 5\ninactive_file 200000\n",
    }
    fake_cgroups(files, tmp_path, monkeypatch)
    assert limits.memory() == (500000, 1000000)
    fake_cgroups({"memory.max": "max", "memory.current": "700000", "memory.stat": ""}, tmp_path, monkeypatch)
    free, total = limits.memory()
    assert 1000000 < free <= total


def fake_cgroups(files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(limits, "_CGROUPS", folder)
