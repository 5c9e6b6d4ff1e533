"""Where tensors live and how they are computed: device, precision, threads, memory and peak rate."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch

from dfcli.errors import UsageError
from dfcli.system import limits, processes
from dfcli.system.options import check_device
from dfcli.system.stats import gpu_memory_used
from dfcli.system.words import counted

# Dense peak rates in FLOP/s from the makers' data sheets: bfloat16 with float32 accumulation, and float32
# for the GPUs without bfloat16 units. The first key whose words stand in the device's name counts.
_PEAK_BFLOAT16 = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "A40": 150e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 3090": 71e12,
    "RTX 3080": 60e12,
}  # fmt: skip
_PEAK_FLOAT32 = {"V100": 15.7e12, "T4": 8.1e12, "P100": 9.3e12}

# The oldest driver that runs programs of a CUDA version (CUDA release notes, "minor version compatibility").
_DRIVERS = {13: 580, 12: 525, 11: 450}
# The call by which a process on x86-64 Linux may use the state of AMX tiles (arch/x86/include/uapi/asm/prctl.h).
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18
_IN_USE = 2**30  # bytes: a GPU with more in use is busy

_USE_AUTO = "use `--device auto` to take what this machine has"


@dataclass(frozen=True)
class Device:
    """A resolved device. `precision` is that of matrix products in training; weights are float32."""

    torch_device: torch.device
    kind: str  # "cpu", "cuda" or "mps"
    name: str  # as a person would call it
    precision: str  # "float32" or "bfloat16"
    reason: str  # why this device and this precision
    threads: int  # of the CPU, for one operation

    @contextmanager
    def autocast(self, training: bool = False) -> Iterator[None]:
        """Matrix products in `precision` inside the block; on a CPU in training alone: its evaluations are in float32,
        the same on every CPU."""
        if self.precision == "float32" or (self.kind == "cpu" and not training):
            yield
        else:
            with torch.autocast(self.kind, getattr(torch, self.precision)):
                yield

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Inside the block a GPU computes the same bits each time, so that a resumed training is exact. The backward
        pass of fused attention adds in any order otherwise. A step of GPT-2 124M took 82.6 ms with this and 87.1 ms
        without on an H200: no difference that could be told from noise."""
        if self.kind != "cuda":
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        settings: Any = torch.utils.deterministic
        filled = settings.fill_uninitialized_memory
        settings.fill_uninitialized_memory = False  # a safeguard that writes all new memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*deterministic.*")
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = filled

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of the memory that tensors on this device live in; of a CPU's, the share of a process."""
        if self.kind == "cuda":
            return torch.cuda.mem_get_info(self.torch_device)
        if self.kind == "mps":
            total = torch.mps.recommended_max_memory()
            return max(0, total - torch.mps.driver_allocated_memory()), total
        free, total = limits.memory()
        return free // processes.local_count(), total // processes.local_count()

    def peak_flops(self) -> float | None:
        """FLOP/s of dense matrix products at best, in `precision`: from data sheets, measured for a CPU."""
        if self.kind == "cpu":
            return _measured_flops(torch.get_num_threads(), self.precision)
        table = _PEAK_BFLOAT16 if self.precision == "bfloat16" else _PEAK_FLOAT32
        words = f" {self.name.replace('-', ' ')} "  # so that "A100" is not found in "RTX A1000"
        if " Laptop " in words or " MIG " in words:  # a slower chip of the same name; a part of the chip
            return None
        return next((peak for key, peak in table.items() if f" {key} " in words), None)

    def synchronize(self) -> None:
        """Wait until everything queued on the device has been computed."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.kind == "mps":
            torch.mps.synchronize()


def resolve(name: str = "auto") -> Device:
    """The device called `name`: "auto", "cpu", "cuda", "cuda:<n>" or "mps". Also sets PyTorch's thread count and its
    current CUDA device.

    Without a number, CUDA means the GPU with this process's local rank, or the first GPU that is not busy.
    Raises UsageError for an unknown name and for a device that this machine does not have or cannot use.
    """
    check_device(name)
    threads = set_threads()
    if name == "auto":
        return _auto(threads)
    if name == "cpu":
        return _cpu(threads, "asked for")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("no Apple GPU (mps) was found", _USE_AUTO)
        return _mps(threads, "asked for")
    if problem := _cuda_problem():
        raise UsageError(*problem)
    number = name.partition(":")[2]
    return _cuda(int(number) if number else None, threads, "asked for")


def _auto(threads: int) -> Device:
    problem = _cuda_problem()
    if problem is None:
        try:
            return _cuda(None, threads, "a CUDA GPU is present")
        except UsageError as error:
            problem = error.message, error.hint
    if torch.backends.mps.is_available():
        return _mps(threads, "an Apple GPU is present")
    return _cpu(threads, "no GPU was found" if problem == _NO_CUDA else problem[0])


def set_threads() -> int:
    """Let PyTorch use the processors this process may use, and no more; returns their number.

    PyTorch counts physical cores and honours OMP_NUM_THREADS, but does not see a container's quota:
    two processors' worth of time shared by 64 threads is several times slower than two threads.
    torchrun sets OMP_NUM_THREADS to 1: its processes share the cores of their machine instead.
    """
    threads, sharing = torch.get_num_threads(), processes.local_count()
    if sharing > 1:
        cores = min(limits.cpus(), psutil.cpu_count(logical=False) or limits.cpus())
        threads = cores if threads == 1 else threads * sharing
    threads = max(1, min(threads, limits.cpus()) // sharing)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the machine."""
    # Of the CPU's allocator; of cuBLAS, cuDNN and the driver; of MPS.
    said = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in said)


@contextmanager
def pytorch_threads(count: int) -> Iterator[None]:
    """Inside the block an operation of PyTorch uses so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu(threads: int, reason: str) -> Device:
    # bfloat16 without units for it is emulated, about 300 times slower, and most CPUs have none.
    if _has_amx():
        precision, why = "bfloat16", "it has units for bfloat16 (AMX), which training uses where that is faster"
    else:
        precision, why = "float32", "float32, which every CPU computes at full speed"
    name = f"CPU, {counted(threads, 'thread')}"
    return Device(torch.device("cpu"), "cpu", name, precision, f"{reason}; {why}", threads)


@cache
def _has_amx() -> bool:
    """Whether this process may use a unit for products of bfloat16 tiles, and asks the system for it."""
    if sys.platform != "linux" or not torch.cpu.get_capabilities().get("amx_bf16"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


def _mps(threads: int, reason: str) -> Device:
    return Device(torch.device("mps"), "mps", "Apple GPU", "float32", f"{reason}; float32", threads)


def _cuda(number: int | None, threads: int, reason: str) -> Device:
    index, which = _choose_gpu(number)
    device = torch.device("cuda", index)
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    built = [
        divmod(int(digits), 10) for arch in torch.cuda.get_arch_list() for digits in re.findall(r"^sm_(\d+)", arch)
    ]
    if built and not any(known == major and least <= minor for known, least in built):
        raise UsageError(
            f"this PyTorch has no code for {name} (compute capability {major}.{minor})",
            "install a PyTorch that is built for it (for older GPUs: for an older CUDA), or use `--device cpu`",
        )
    torch.cuda.set_device(device)  # kernels of Triton, graphs and random numbers belong to the current device
    if major >= 8:  # Ampere was the first with bfloat16 units; PyTorch reports emulation as support
        precision, why = "bfloat16", "bfloat16, for which it has units"
    else:
        precision, why = "float32", "float32, because it has no bfloat16 units"
    return Device(device, "cuda", name, precision, f"{reason}; {why}{which}", threads)


def _choose_gpu(number: int | None) -> tuple[int, str]:
    """The index of the GPU to use, `number` where one is given, and the reason as the end of a sentence."""
    count, sharing = torch.cuda.device_count(), processes.local_count()
    if sharing > 1:
        if number is not None:
            raise UsageError("each process of torchrun takes a GPU of its own", "use `--device cuda`")
        if sharing > count:
            raise UsageError(
                f"{sharing} processes were started, and this machine has {counted(count, 'GPU')}",
                f"use `torchrun --nproc-per-node {count}`, or `--device cpu`",
            )
        return processes.local_rank(), f"; GPU {processes.local_rank()} of {count}"
    if number is not None:
        if number >= count:
            known = ", ".join(f"cuda:{i}" for i in range(count))
            raise UsageError(f"there is no device `cuda:{number}`", f"this machine has {known}")
        return number, ""
    if count == 1:
        return 0, ""
    used = [gpu_memory_used(torch.device("cuda", index)) or 0 for index in range(count)]
    index = next((i for i in range(count) if used[i] < _IN_USE), used.index(min(used)))
    busy = f"; GPU {index}, because {used[0] / 1e9:.1f} GB of GPU 0 are in use" if index else ""
    return index, f"{busy}; to train on all {count} GPUs: `torchrun --nproc-per-node {count} -m dfcli train ...`"


_NO_CUDA = ("no CUDA device was found", _USE_AUTO)


@cache
def _cuda_problem() -> tuple[str, str] | None:
    """None where CUDA works; otherwise the reason as a sentence, and what to do."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return None
    words = " ".join(str(warning.message) for warning in said)
    if old := re.search(r"driver on your system is too old \(found version (\d+)\)", words):
        here, built = int(old[1]), str(torch.version.cuda)
        driver = _DRIVERS.get(int(built.split(".")[0]))
        needed = f" to {driver} or newer" if driver else ""
        has = f"{here // 1000}.{here % 1000 // 10}"
        return (
            f"the NVIDIA driver is too old: this PyTorch is built for CUDA {built}, and the driver supports CUDA {has}",
            f"update the driver{needed}, or install a PyTorch that is built for CUDA {has}",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return (f"CUDA_VISIBLE_DEVICES=`{visible}` hides every GPU", "unset it, or set it to 0")
    if torch.version.cuda is None and torch.version.hip is None:
        return ("this PyTorch is built without CUDA", "install a PyTorch with CUDA, or use `--device auto`")
    if words:
        return (_NO_CUDA[0], f"{_USE_AUTO} (PyTorch says: {words.splitlines()[0]})")
    return _NO_CUDA


@cache
def _measured_flops(threads: int, precision: str) -> float:
    """FLOP/s of the best of a few products of 1024 x 1024 matrices; about 0.1 s on two cores in float32."""
    n, dtype = 1024, getattr(torch, precision)
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    out = torch.empty(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first warms the caches and the thread pool
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
