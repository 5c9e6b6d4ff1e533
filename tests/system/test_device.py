from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dfcli.errors import UsageError
from dfcli.system import device as devices
from dfcli.system import limits


def gpu(name: str, precision: str = "bfloat16") -> devices.Device:
    return devices.Device(torch.device("cuda", 0), "cuda", name, precision, "", 1)


@pytest.mark.parametrize(("units", "precision"), [(False, "float32"), (True, "bfloat16")])
def test_a_cpu_has_the_precision_it_has_units_for_and_says_why(units: bool, precision: str, monkeypatch: Any):
    monkeypatch.setattr(devices, "_has_amx", lambda: units)
    cpu = devices.resolve("cpu")
    assert (cpu.kind, cpu.precision, cpu.torch_device) == ("cpu", precision, torch.device("cpu"))
    assert precision in cpu.reason
    assert f"{cpu.threads} thread" in cpu.name


@pytest.mark.parametrize(("unit", "answer"), [(False, 0), (True, -1)])
def test_a_unit_that_is_missing_or_not_allowed_is_not_used(unit: bool, answer: int, monkeypatch: Any):
    class Library:
        def syscall(self, *arguments: int) -> int:
            return answer

    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": unit})
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Library())
    assert not devices._has_amx.__wrapped__()


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
    monkeypatch.setattr(devices, "_cuda_problem", lambda: devices._NO_CUDA)
    with pytest.raises(UsageError) as caught:
        devices.resolve(name)
    assert caught.value.message == "no CUDA device was found"
    assert "--device auto" in caught.value.hint


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpus(count, capability)`: a machine with so many GPUs, whose PyTorch is built for sm_75 to sm_90."""

    def found(count: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(devices, "_cuda_problem", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"])
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(devices, "gpu_memory_used", lambda _: 0)

    return found


def under_torchrun(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    for name, value in (values | {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))


def test_a_cuda_index_out_of_range_names_those_there_are(gpus: Any):
    gpus(2)
    with pytest.raises(UsageError) as caught:
        devices.resolve("cuda:7")
    assert "cuda:7" in caught.value.message
    assert caught.value.hint == "this machine has cuda:0, cuda:1"


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((7, 5), "float32")]
)
def test_bfloat16_only_where_the_gpu_has_units(capability: Any, precision: str, gpus: Any):
    gpus(1, capability)
    found = devices.resolve("cuda")
    assert (found.name, found.precision, found.torch_device.index) == ("Test GPU", precision, 0)
    assert precision in found.reason


def test_float32_products_are_not_rounded_to_tf32(gpus: Any):
    gpus(1, (8, 0))
    devices.resolve("cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (10, 0)])
def test_a_gpu_that_this_pytorch_has_no_code_for(capability: Any, gpus: Any):
    gpus(1, capability)
    with pytest.raises(UsageError, match=f"no code for Test GPU .compute capability {capability[0]}.{capability[1]}"):
        devices.resolve("cuda")
    assert "no code for Test GPU" in devices.resolve("auto").reason  # that of the CPU


def test_of_several_gpus_one_that_is_not_busy(gpus: Any, monkeypatch: pytest.MonkeyPatch):
    gpus(4)
    assert devices.resolve("cuda").torch_device.index == 0
    assert "`torchrun --nproc-per-node 4 -m dfcli train ...`" in devices.resolve("auto").reason
    for used, chosen in (([40e9, 2e9, 0, 0], 2), ([9e9, 8e9, 9e9, 9e9], 1), ([5e8, 0, 0, 0], 0)):
        monkeypatch.setattr(devices, "gpu_memory_used", lambda device, used=used: int(used[device.index]))
        assert devices.resolve("cuda").torch_device.index == chosen
    assert devices.resolve("cuda:3").torch_device.index == 3


def test_each_process_of_torchrun_takes_a_gpu_of_its_own(gpus: Any, monkeypatch: pytest.MonkeyPatch):
    gpus(2)
    under_torchrun(monkeypatch, 1, 2)
    assert devices.resolve("cuda").torch_device.index == 1
    with pytest.raises(UsageError, match="a GPU of its own"):
        devices.resolve("cuda:0")
    under_torchrun(monkeypatch, 1, 4)
    with pytest.raises(UsageError) as caught:
        devices.resolve("cuda")
    assert caught.value.message == "4 processes were started, and this machine has 2 GPUs"
    assert "--nproc-per-node 2" in caught.value.hint


@pytest.mark.parametrize(
    ("warning", "visible", "message", "hint"),
    [
        (
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). Please update it",
            None,
            "the NVIDIA driver is too old: this PyTorch is built for CUDA 13.0, and the driver supports CUDA 12.4",
            "update the driver to 580 or newer, or install a PyTorch that is built for CUDA 12.4",
        ),
        ("", "", "CUDA_VISIBLE_DEVICES=`` hides every GPU", "unset it"),
        ("", "-1", "CUDA_VISIBLE_DEVICES=`-1` hides every GPU", "unset it"),
        ("CUDA unknown error\nmore", None, "no CUDA device was found", "(PyTorch says: CUDA unknown error)"),
        ("", None, "no CUDA device was found", "--device auto"),
    ],
)
def test_why_cuda_does_not_work(
    warning: str, visible: str | None, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
):
    def unavailable() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices._cuda_problem.cache_clear()
    try:
        with pytest.raises(UsageError) as caught:
            devices.resolve("cuda")
        assert caught.value.message == message
        assert hint in caught.value.hint
        assert devices.resolve("auto").kind == "cpu"
    finally:
        devices._cuda_problem.cache_clear()


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
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
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
    for precision, training, dtype in (
        ("float32", True, torch.float32), ("bfloat16", False, torch.float32), ("bfloat16", True, torch.bfloat16)
    ):  # fmt: skip
        with dataclasses.replace(cpu, precision=precision).autocast(training):
            assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_a_gpu_computes_the_same_bits_each_time_in_training():
    with gpu("Test GPU").repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]


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


def test_processes_of_torchrun_share_the_cores_and_the_memory(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(limits, "cpus", lambda: 8)
        monkeypatch.setattr(limits, "memory", lambda: (3_000, 4_000))
        monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 8)
        under_torchrun(monkeypatch, 0, 2)
        torch.set_num_threads(1)  # as torchrun's OMP_NUM_THREADS=1 has it
        assert [devices.set_threads(), devices.set_threads()] == [4, 4]
        assert devices.resolve("cpu").memory_bytes() == (1_500, 2_000)
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
