"""How a compiled engine uses the cores of a CPU: its sequences are split into lanes, one for each thread. Compiled code
lets go of Python's lock, so that the lanes run at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfcli.errors import DfError
from dfcli.generation.sampling import Filters


class Lane(Protocol):
    """B sequences in mid-course, which one thread advances."""

    @property
    def logits(self) -> NDArray[np.float32]:
        """After the newest ids: [B, at least V]."""
        ...

    def prefill(self, ids: NDArray[np.int64]) -> None:
        """Forgets everything and reads ids [B, T], or [1, T] where they are the same for all."""
        ...

    def generate(self, uniforms: NDArray[np.float64], filters: tuple[float, int, float, float]) -> NDArray[np.int64]:
        """`engines.Engine.generate` of these sequences; `filters` are `Filters.numbers`."""
        ...


class Lanes:
    """`engines.Engine` made of lanes: `lane(B)` makes one for B sequences of a model with V ids."""

    def __init__(self, name: str, reason: str, lane: Callable[[int], Lane], threads: int, vocab_size: int) -> None:
        self.name, self.reason = name, reason
        self._lane, self._threads, self._vocab_size = lane, threads, vocab_size
        self._lanes: list[Lane] = []
        self._ends: list[int] = []  # where a lane's sequences end, of all but the last

    def start(self, batch: int) -> None:
        count = min(self._threads, batch)
        sizes = [(batch + number) // count for number in range(count)]
        self._lanes = [self._lane(size) for size in sizes]
        self._ends = np.cumsum(sizes)[:-1].tolist()

    def prefill(self, ids: NDArray[np.int64]) -> None:
        same = bool((ids == ids[:1]).all())
        for lane, part in zip(self._lanes, np.split(ids, self._ends), strict=True):
            lane.prefill(ids[:1] if same else part)

    def generate(self, uniforms: NDArray[np.float64], filters: Filters) -> NDArray[np.int64]:
        numbers = filters.numbers(self._vocab_size)

        def run(lane: Lane, part: NDArray[Any]) -> NDArray[np.int64]:
            return lane.generate(np.ascontiguousarray(part), numbers)

        parts = np.split(uniforms, self._ends)
        if len(parts) == 1:
            ids = run(self._lanes[0], parts[0])
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                ids = np.concatenate(list(pool.map(run, self._lanes, parts)))
        if not all(np.isfinite(lane.logits).all() for lane in self._lanes):
            raise DfError(
                "the model's output is not finite", "its training may have diverged: try an earlier `--checkpoint`"
            )
        return ids
