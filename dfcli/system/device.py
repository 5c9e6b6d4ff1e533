"""Where tensors live and how they are computed: device, precision, threads, memory and peak rate."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from dfcli.errors import UsageError
from dfcli.system import limits
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
    def autocast(self) -> Iterator[None]:
        """Matrix products in `precision` inside the block."""
        if self.precision == "float32":
            yield
        else:
            with torch.autocast(self.kind, getattr(torch, self.precision)):
                yield

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of the memory that tensors on this device live in."""
        if self.kind == "cuda":
            return torch.cuda.mem_get_info(self.torch_device)
        if self.kind == "mps":
            total = torch.mps.recommended_max_memory()
            return max(0, total - torch.mps.driver_allocated_memory()), total
        return limits.memory()

    def peak_flops(self) -> float | None:
        """FLOP/s of dense matrix products at best, in `precision`: from data sheets, measured for a CPU."""
        if self.kind == "cpu":
            return _measured_flops(torch.get_num_threads())
        table = _PEAK_BFLOAT16 if self.precision == "bfloat16" else _PEAK_FLOAT32
        words = f" {self.name.replace('-', ' ')} "  # so that "A100" is not found in "RTX A1000"
        if " Laptop " in words:  # a slower chip of the same name
            return None
        return next((peak for key, peak in table.items() if f" {key} " in words), None)

    def synchronize(self) -> None:
        """Wait until everything queued on the device has been computed."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.kind == "mps":
            torch.mps.synchronize()


def resolve(name: str = "auto") -> Device:
    """The device called `name`: "auto", "cpu", "cuda", "cuda:<n>" or "mps". Also sets PyTorch's thread count.

    Raises UsageError for an unknown name and for a device that this machine does not have.
    """
    threads = set_threads()
    if name == "auto":
        if _cuda_problem() is None:
            return _cuda(0, threads, "a CUDA GPU is present")
        if torch.backends.mps.is_available():
            return _mps(threads, "an Apple GPU is present")
        return _cpu(threads, "no GPU was found")
    if name == "cpu":
        return _cpu(threads, "asked for")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("no Apple GPU (mps) was found", _USE_AUTO)
        return _mps(threads, "asked for")
    kind, colon, number = name.partition(":")
    if kind == "cuda" and (not colon or (number.isascii() and number.isdigit() and len(number) < 5)):
        problem = _cuda_problem()
        if problem is not None:
            raise UsageError("no CUDA device was found", _USE_AUTO + problem)
        index, count = int(number or 0), torch.cuda.device_count()
        if index >= count:
            known = ", ".join(f"cuda:{i}" for i in range(count))
            raise UsageError(f"there is no device `{name}`", f"this machine has {known}")
        return _cuda(index, threads, "asked for")
    raise UsageError(f"`{name}` is no device", "use auto, cpu, cuda, cuda:<n> or mps")


def set_threads() -> int:
    """Let PyTorch use the processors this process may use, and no more; returns their number.

    PyTorch counts physical cores and honours OMP_NUM_THREADS, but does not see a container's quota:
    two processors' worth of time shared by 64 threads is several times slower than two threads.
    """
    threads = min(torch.get_num_threads(), limits.cpus())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


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
    why = f"{reason}; float32, which every CPU computes at full speed"
    name = f"CPU, {counted(threads, 'thread')}"
    return Device(torch.device("cpu"), "cpu", name, "float32", why, threads)


def _mps(threads: int, reason: str) -> Device:
    return Device(torch.device("mps"), "mps", "Apple GPU", "float32", f"{reason}; float32", threads)


def _cuda(index: int, threads: int, reason: str) -> Device:
    device = torch.device("cuda", index)
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8:  # Ampere was the first with bfloat16 units; PyTorch reports emulation as support
        precision, why = "bfloat16", "bfloat16, for which it has units"
    else:
        precision, why = "float32", "float32, since it has no bfloat16 units"
    return Device(device, "cuda", torch.cuda.get_device_name(device), precision, f"{reason}; {why}", threads)


@cache
def _cuda_problem() -> str | None:
    """None where CUDA works; otherwise what PyTorch says about it, as the end of a sentence."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return None
    return "".join(f" (PyTorch says: {str(warning.message).split(chr(10))[0]})" for warning in said[:1])


@cache
def _measured_flops(threads: int) -> float:
    """FLOP/s of the best of a few float32 products of 1024 x 1024 matrices; about 0.1 s on two cores."""
    n = 1024
    a, b = torch.ones(n, n), torch.ones(n, n)
    out = torch.empty(n, n)
    best = float("inf")
    for _ in range(6):  # the first warms the caches and the thread pool
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
