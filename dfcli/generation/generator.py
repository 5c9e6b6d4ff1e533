"""The common part of generating text and sound: a model and its boundary, samples in batches, and ids in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.codecs import Codec
from dfcli.errors import DfError
from dfcli.generation.conditions import At
from dfcli.generation.engines import choose
from dfcli.generation.request import Filters
from dfcli.generation.sampling import Dice
from dfcli.runs.run import Run, newest
from dfcli.system.device import Device, resolve
from dfcli.system.events import Choice, Note, OnEvent, ignore

AT_ONCE = {"cpu": 64, "mps": 64, "cuda": 256}  # clips of one batch at most; the wav of each is two open files


@dataclass(frozen=True)
class Model:
    """A core on its device, in eval mode, and the data it was made for."""

    core_name: str
    core: nn.Module
    codec: Codec
    device: Device
    boundary: int | None  # the id that stands before every document
    lead: int  # how often it stands there
    lines: bool  # whether it also ends them

    @property
    def context(self) -> int:
        core: Any = self.core
        return core.context

    def opening(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """The ids that the model reads before it generates: the boundary and `ids`, cut to the newest that fit into its
        context."""
        lead = [] if self.boundary is None else [self.boundary] * self.lead
        return np.concatenate([np.array(lead, np.int64), ids.astype(np.int64)])[-self.context :]


def chosen(run: Run | str | Path | None, makes: str, on_event: OnEvent) -> Run:
    """The run that is meant. None is the newest run that makes "text" or "audio"; a Note names it."""
    if run is None:
        run = newest(makes)
        on_event(Note(f"the newest run that makes {'text' if makes == 'text' else 'sound'} is {run.name}"))
    return run if isinstance(run, Run) else Run.open(run)


def load(run: Run, checkpoint: str | int, device: str) -> tuple[int, Model]:
    """The step of the checkpoint that is used, and its model."""
    where = resolve(device)
    core, loaded = run.build(checkpoint, where.torch_device)
    data = run.dataset
    model = Model(run.info["core"]["name"], core, run.codec, where, data["boundary"], data["lead"], data["lines"])
    return loaded.step, model


class Generator:
    """Generates the clips 0 .. num - 1 with one engine, in batches that fit into memory.

    Which engine it is (`engine`: "auto", "plain" or "fast") is told as a Choice. Raises as `engines.choose`.
    """

    def __init__(self, model: Model, num: int, engine: str = "auto", on_event: OnEvent = ignore) -> None:
        core: Any = model.core
        free, _ = model.device.memory_bytes()
        fitting = free // 4 // max(1, _bytes(core.init_state(1)))  # in a quarter of the free memory
        self._num, self._at_once = num, max(1, min(num, AT_ONCE[model.device.kind], fitting))
        self.engine, reason = choose(model.core_name, model.core, self._at_once, model.device, engine, on_event)
        on_event(Choice("engine", self.engine.name, reason))

    def generate(
        self,
        opening: NDArray[np.int64],
        tokens: int,
        filters: Filters,
        seed: int,
        *,
        seconds: float,
        longest: int | None = None,
        done: Callable[[range], bool] = lambda clips: False,
        conditions: Callable[[range, int], At] | None = None,
    ) -> Iterator[tuple[range, NDArray[np.int64]]]:
        """Yields `tokens` ids after `opening` for each clip, as they come: (clips, their ids [clips, n]).

        A chunk is about `seconds` of work and at most `longest` ids; where the cuts fall changes no id.
        Clips end early when `done` says so after one of their chunks. `conditions(clips, ids of the opening)` gives the
        conditions of a conditioned model's positions. Raises DfError where the model's output is not finite.
        """
        picking = filters.picking()
        for start in range(0, self._num, self._at_once):
            clips = range(start, min(self._num, start + self._at_once))
            dice = Dice(seed, clips)
            self.engine.start(len(clips))
            at = conditions(clips, len(opening)) if conditions else None
            self.engine.prefill(np.tile(opening, (len(clips), 1)), at and at(0, len(opening)))
            made, size = 0, 1
            while made < tokens and not (made and done(clips)):
                size = min(size, tokens - made, longest or tokens)
                began = time.perf_counter()
                place = len(opening) + made
                ids = self.engine.generate(dice.draw(size), picking, at and at(place, place + size))
                took = time.perf_counter() - began
                if not self.engine.finite():  # once a chunk: weights that were loaded are known to be finite
                    raise DfError(
                        "the model's output is not finite",
                        "its training may have diverged: try an earlier `--checkpoint`",
                    )
                yield clips, ids
                made += size
                size = max(1, min(2 * size, int(size * seconds / max(took, 1e-9))))


def _bytes(state: Any) -> int:
    """Bytes of the tensors in a core's state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, list | tuple):
        return sum(_bytes(part) for part in state)
    return _bytes(list(vars(state).values())) if is_dataclass(state) else 0
