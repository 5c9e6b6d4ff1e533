"""Which engine generates: the plain one, or a compiled one of `kernels/`. All make the same picks (see `sampling`), so
that only speed depends on the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dfcli.cores import Condition
from dfcli.cores.protocols import Engine, Picking
from dfcli.errors import UsageError
from dfcli.generation.plain import Plain
from dfcli.system.device import Device
from dfcli.system.events import OnEvent, ignore
from dfcli.system.words import first_line

ENGINES = ("auto", "plain", "fast")
NAMES = {"gpt": "a GPT", "wavenet": "a WaveNet", "charwavenet": "the character-level WaveNet"}  # of cores


def choose(
    core_name: str, core: nn.Module, batch: int, device: Device, engine: str = "auto", on_event: OnEvent = ignore
) -> tuple[Engine, str]:
    """The engine for `batch` sequences of this core, in eval mode and on its device, and the reason, a clause.

    `engine` is "auto" (the fastest there is), "plain", or "fast" (compiled, with the plain engine's picks).
    Raises UsageError for another word, or for "fast" where no compiled engine runs.
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}", f"there are {', '.join(ENGINES)}")
    if engine == "plain":
        return Plain(core, device), "asked for"
    try:
        kernel = _kernel(core_name, device.kind)
        if kernel is None:
            why: str | None = f"there is no compiled engine for {NAMES[core_name]} on {device.kind}"
        else:
            why = kernel.supports(core.config, device)
        if kernel is not None and why is None:
            fast = kernel.build(core, device, engine == "fast", on_event)
            if device.kind != "cpu":  # a GPU's driver, Triton or memory may fail only when they are used
                _try_out(fast, batch, core.config)
            return fast, "asked for" if engine == "fast" else fast.reason
    except Exception as error:  # numba, Triton, CUDA and a missing library share no base class
        why = f"the compiled engine does not work here ({first_line(error)})"
    if engine == "fast":
        raise UsageError(f"no fast engine runs this model here: {why}", "use `--engine auto`")
    return Plain(core, device), str(why)


def _kernel(core_name: str, kind: str) -> Any:
    """The module of `kernels/` that generates with such a core on such a device, or None. Raises ImportError and others
    where the module or what it needs is absent or broken."""
    if (core_name, kind) == ("gpt", "cpu"):
        from dfcli.kernels import gpt_sample as kernel
    elif (core_name, kind) == ("wavenet", "cpu"):
        from dfcli.kernels import wavenet_sample as kernel
    elif (core_name, kind) == ("gpt", "cuda"):
        from dfcli.kernels.cuda import gpt as kernel
    elif (core_name, kind) == ("wavenet", "cuda"):
        from dfcli.kernels.cuda import wavenet as kernel
    else:
        return None
    return kernel


def _try_out(engine: Engine, batch: int, config: Any) -> None:
    """Make two ids of each sequence. Raises what the machine raises where it cannot."""
    told, drawn = _stand_in(config, batch, 1), _stand_in(config, batch, 2)
    engine.start(batch)
    engine.prefill(np.zeros((batch, 1), np.int64), told)
    engine.generate(np.zeros((batch, 2)), Picking(), drawn)


def _stand_in(config: Any, batch: int, length: int) -> Condition | None:
    """Some condition [batch, length] that a model of this config takes, or None."""
    if not getattr(config, "row", 0):
        return None
    labels = torch.zeros((1, len(config.labels)), dtype=torch.int64) if config.labels else None
    series = torch.zeros((1, config.series)) if config.series else None
    return Condition(labels, series, torch.zeros((batch, length), dtype=torch.int64))
