"""Engines run a model one id at a time. All follow one protocol and make the same picks (see `sampling`),
so that only speed depends on which one runs. `choose` says which one and why."""

from __future__ import annotations

import importlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dfcli.errors import DfError, UsageError
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Filters
from dfcli.system.device import Device
from dfcli.system.events import OnEvent, ignore
from dfcli.system.words import first_line

ENGINES = ("auto", "plain", "fast")

# Modules with a fast engine, by core and kind of device. Each offers `build(core, batch, device, exact,
# on_event) -> Engine`, which raises Unavailable with the reason when this core, batch or machine is not for
# it. Unless `exact`, it may compute less precisely where that is much faster and cannot be heard or read.
FAST = {
    ("wavenet", "cpu"): "dfcli.kernels.wavenet_sample",
    ("gpt", "cpu"): "dfcli.kernels.gpt_sample",
    ("wavenet", "cuda"): "dfcli.kernels.cuda.wavenet",
    ("gpt", "cuda"): "dfcli.kernels.cuda.gpt",
}


class Unavailable(Exception):
    """A fast engine cannot, or need not, run this model here; the text is the reason, a clause without a
    full stop."""


class Engine(Protocol):
    """A model in mid-sequence, for a batch of B sequences that advance together."""

    name: str  # what the result calls it: "plain", "numba", ...
    reason: str  # why one would take it, a clause

    def start(self, batch: int) -> None:
        """Forgets everything; B = batch from here on."""
        ...

    def prefill(self, ids: NDArray[np.int64]) -> None:
        """Reads ids [B, T], T >= 1, at once. Called once after `start`, with at most `core.config.context`
        ids."""
        ...

    def generate(self, uniforms: NDArray[np.float64], filters: Filters) -> NDArray[np.int64]:
        """Makes n further ids of each sequence: for uniforms [B, n] ids [B, n].

        Id j is `sampling.pick` of the logits after everything before it, with uniforms[:, j]; it is then
        read in turn, so that calls can follow each other: where the chunks are cut changes nothing.
        Raises DfError if the logits after the last id are not finite.
        """
        ...


def choose(
    core_name: str,
    core: nn.Module,
    batch: int,
    device: Device,
    engine: str = "auto",
    on_event: OnEvent = ignore,
) -> tuple[Engine, str]:
    """The engine for `batch` sequences of this core on this device, and the reason in a sentence's clause.

    `engine` is "auto" (the fastest there is), "plain" or "fast" (compiled, with the plain engine's picks).
    Raises UsageError for another word, or for "fast" where no fast engine runs.
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}", "the engines are " + ", ".join(ENGINES))
    if engine == "plain":
        return Plain(core, device), "asked for"
    try:
        fast = _fast(core_name, core, batch, device, engine == "fast", on_event)
        return fast, "asked for" if engine == "fast" else fast.reason
    except Unavailable as why:
        if engine == "fast":
            raise UsageError(f"no fast engine runs this model here: {why}", "use `--engine auto`") from None
        return Plain(core, device), str(why)


def try_out(engine: Engine, batch: int, failure: str) -> None:
    """Makes two ids of each of `batch` sequences, to see whether the machine can. Where it cannot, raises Unavailable:
    `failure` and what was said."""
    try:
        engine.start(batch)
        engine.prefill(np.zeros((batch, 1), np.int64))
        engine.generate(np.zeros((batch, 2)), Filters())
    except DfError:  # a model that diverged; it is told when it runs
        pass
    except Exception as error:  # of Triton, a missing C compiler, the driver, the memory: they share no base class
        raise Unavailable(f"{failure} ({first_line(error)})") from error


def _fast(core_name: str, core: nn.Module, batch: int, device: Device, exact: bool, on_event: OnEvent) -> Engine:
    module = FAST.get((core_name, device.kind))
    if module is None:
        raise Unavailable(f"there is no fast engine for {core_name} on {device.kind}")
    try:
        build = importlib.import_module(module).build
    except ImportError as error:
        raise Unavailable(f"{error.name or module} cannot be imported") from None
    except Exception as error:  # what a broken installation raises: OSError for a library that is missing, and others
        raise Unavailable(f"{module} cannot be imported ({first_line(error)})") from error
    return build(core, batch, device, exact, on_event)
