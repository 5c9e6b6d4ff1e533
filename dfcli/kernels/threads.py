"""Threads: a pool whose workers share one compiled function's work, their barrier, and an engine whose threads each
advance some of the sequences. Compiled code releases Python's lock, so that threads run at the same time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dfcli.cores.protocols import Picking
from dfcli.cores.wavenet import Condition
from dfcli.kernels.compile import Compiled, inner, once
from dfcli.kernels.gemm import call, fetch_add, load_acquire, store_release
from dfcli.system.events import OnEvent

_FLAG_STRIDE = 8  # int64 of one cache line
_COUNTERS = 2
_SPINS = 2000  # about 10 microseconds


def _yield_address() -> int:
    """The address of the system's function by which a thread lets others run."""
    library = ctypes.WinDLL("kernel32").SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield  # type: ignore[attr-defined]
    return ctypes.cast(library, ctypes.c_void_p).value or 0


@inner
def barrier(flags, worker, workers, count, yielder):
    """Wait until all `workers` threads have come here for the `count`-th time; what they wrote before is then seen.
    False where one never will: then stop.

    `flags` and `yielder` come from `WorkerPool`."""
    store_release(flags, worker * _FLAG_STRIDE, count)
    for other in range(workers):
        spins = 0
        while load_acquire(flags, other * _FLAG_STRIDE) < count:
            spins += 1
            if spins > _SPINS:  # that thread may wait for this very CPU
                if load_acquire(flags, workers * _FLAG_STRIDE):
                    return False
                call(yielder)
    return True


@inner
def take(flags, workers, counter):
    """The next number, from 0 on, of one of two counters that all workers share: how work is given out in portions, so
    that a worker whose CPU is busy takes fewer."""
    return fetch_add(flags, (workers + 1 + counter) * _FLAG_STRIDE)


def _flat(argument: Any) -> Any:
    if isinstance(argument, tuple):
        flat = [_flat(each) for each in argument]
        return type(argument)(*flat) if hasattr(argument, "_fields") else tuple(flat)  # a NamedTuple stays one
    return argument.detach().view(-1).numpy() if isinstance(argument, Tensor) else argument


def _flags(workers: int) -> NDArray[np.int64]:
    """Each on a cache line: how often each worker has come to a barrier, whether to stop, and the counters."""
    return np.zeros((workers + 1 + _COUNTERS) * _FLAG_STRIDE, np.int64)


class WorkerPool:
    """Runs a compiled function `function(worker, workers, flags, yielder, ...)` on threads, one a worker."""

    def __init__(self, threads: int) -> None:
        self.count, self._pool, self._yielder = threads, ThreadPoolExecutor(threads), _yield_address()

    def run(self, function: Callable[..., None], *arguments: Any, count: int | None = None) -> None:
        """Run `count` workers, by default as many as there are threads. Tensors among the arguments, or in tuples
        there, must be contiguous; they are passed as flat arrays."""
        count = count or self.count
        flat = [_flat(a) for a in arguments]
        flags = _flags(count)
        try:
            running = [
                self._pool.submit(function, worker, count, flags, self._yielder, *flat) for worker in range(count)
            ]
            for each in wait(running, return_when=FIRST_EXCEPTION).done:
                each.result()
        except BaseException:  # a worker that failed or never began, or a signal: nobody is to wait for it
            flags[count * _FLAG_STRIDE] = 1
            raise

    def load(self, on_event: OnEvent, *functions: tuple[Compiled, tuple[Any, ...]]) -> None:
        """Compile functions or load them: `Compiled.load`, each with arguments that make it do nothing."""
        on_event = once(on_event)
        for function, arguments in functions:
            function.load(on_event, 0, 1, _flags(1), self._yielder, *arguments)


class Sequences(Protocol):
    """Some sequences in mid-course, which one thread advances: an engine's methods for these alone."""

    @property
    def logits(self) -> NDArray[np.float32]:
        """After the newest ids: [B, at least V]."""
        ...

    def prefill(self, ids: NDArray[np.int64], condition: Condition | None) -> None:
        """Forget everything and read ids [B, T], or [1, T] where they are the same for all."""
        ...

    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None
    ) -> NDArray[np.int64]:
        """`Engine.generate` of these sequences."""
        ...


class ThreadedEngine:
    """`Engine` whose sequences are divided among threads: `make(B)` gives one thread's part of B sequences."""

    def __init__(self, name: str, reason: str, make: Callable[[int], Sequences], threads: int) -> None:
        self.name, self.reason = name, reason
        self._make, self._threads = make, threads
        self.parts: list[Sequences] = []
        self._ends: list[int] = []  # of each part's sequences but the last's

    def start(self, batch: int) -> None:
        count = min(self._threads, batch)
        sizes = [(batch + number) // count for number in range(count)]
        self.parts = [self._make(size) for size in sizes]
        self._ends = np.cumsum(sizes)[:-1].tolist()

    def prefill(self, ids: NDArray[np.int64], condition: Condition | None = None) -> None:
        if (ids == ids[:1]).all() and (condition is None or (condition.index == condition.index[:1]).all()):
            condition = condition and condition._replace(index=condition.index[:1])
            for part in self.parts:
                part.prefill(ids[:1], condition)
            return
        for part, its, told in zip(self.parts, np.split(ids, self._ends), self._divided(condition), strict=True):
            part.prefill(its, told)

    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None = None
    ) -> NDArray[np.int64]:
        def run(part: Sequences, its: NDArray[np.float64], told: Condition | None) -> NDArray[np.int64]:
            return part.generate(np.ascontiguousarray(its), picking, told)

        split, conditions = np.split(uniforms, self._ends), self._divided(condition)
        if len(split) == 1:
            return run(self.parts[0], split[0], conditions[0])
        with ThreadPoolExecutor(len(split)) as pool:
            return np.concatenate(list(pool.map(run, self.parts, split, conditions)))

    def _divided(self, condition: Condition | None) -> list[Condition | None]:
        """The condition of each part."""
        if condition is None:
            return [None] * len(self.parts)
        return [condition._replace(index=index) for index in condition.index.tensor_split(self._ends)]

    def finite(self) -> bool:
        return all(bool(np.isfinite(part.logits).all()) for part in self.parts)
