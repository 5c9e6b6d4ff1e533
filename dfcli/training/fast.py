"""How a core's forward and backward pass are computed in training: by the core itself, or compiled."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dfcli import cores
from dfcli.cores import GPTConfig, WaveNetConfig
from dfcli.system.device import Device
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.words import first_line
from dfcli.training.loss import Backward
from dfcli.training.optim import Optimizer
from dfcli.training.settings import Recipe

WIDEST = 128  # channels: PyTorch's products of wider ones are faster than ours
COLUMNS = 16  # widths are multiples of it: vectors.COLUMNS, which numba is imported with
LONGEST = 512  # ids of a GPT's context: attention's shares are kept, T x T for each head

Forward = Callable[..., Tensor]


def by_numba(
    core: cores.Core, optimizer: Optimizer, recipe: Recipe, device: Device, on_event: OnEvent
) -> Backward | None:
    """On a CPU, loss and gradients by functions that numba compiles, once on a machine, for models of the default
    recipes' kinds, whose `optimizer` then uses such functions too; else None. What fails is told, and training goes on
    without it."""
    config = core.config
    module = cpu_module(config, recipe, device)
    if module is None:
        if (
            isinstance(config, GPTConfig)
            and config.dropout
            and cpu_module(replace(config, dropout=0.0), recipe, device)
        ):
            on_event(Note("a step with dropout takes two to three times as long here as with `--set dropout=0`"))
        return None
    try:
        from dfcli.kernels import optimizer as optim_cpu
        from dfcli.kernels.ops import WorkerPool

        workers = WorkerPool(device.threads)
        backward = importlib.import_module(module).build(core, workers, on_event)
        optim_cpu.speed_up(optimizer, workers, ignore)
        return backward
    except Exception as error:  # whatever a broken numba raises
        on_event(Note(f"numba does not work here ({first_line(error)[:200]}); training without it, more slowly"))
        return None


def by_torch(
    core: cores.Core, recipe: Recipe, device: Device, try_out: Callable[[Forward], None], on_event: OnEvent
) -> Forward:
    """torch.compile of the core where the recipe asks for it or it pays: on CUDA for budgets of more than two minutes
    or 2,000 steps, as it takes half a minute in each process. On a CPU it has not been shown to pay, and n-gram tables
    then have whole gradients. `try_out` makes one pass with it; where that fails it is told, and `core` returned."""
    long = recipe.minutes > 2 or recipe.steps > 2000
    if recipe.compile == "off" or (recipe.compile == "auto" and not (device.kind == "cuda" and long)):
        return core
    compiled = torch.compile(core)
    try:
        try_out(compiled)
        return compiled
    except Exception as error:  # whatever the compiler of this machine raises
        on_event(Note(f"torch.compile does not work here ({first_line(error)[:200]}); training uncompiled"))
        return core


def cpu_module(config: cores.CoreConfig, recipe: Recipe, device: Device) -> str | None:
    """The module with compiled functions for such a model, on this kind of processor; None where there is none, or
    where it has not been shown to pay. The module imports numba."""
    if recipe.compile != "auto" or recipe.packing == "last" or device.kind != "cpu":
        return None
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    if isinstance(config, GPTConfig) and _gpt_fits(config):
        return "dfcli.kernels.gpt_train"
    if isinstance(config, WaveNetConfig) and _wavenet_fits(config):
        return "dfcli.kernels.wavenet_train"
    return None


def _gpt_fits(c: GPTConfig) -> bool:
    kind = (c.position, c.norm, c.activation, c.qk_norm) == ("rotary", "rmsnorm", "relu2", True)
    plain = not (c.bias or c.qkv_bias or c.head_bias or c.tied_head or c.dropout)
    return kind and plain and c.channels // c.heads % COLUMNS == 0 and c.channels <= WIDEST and c.context <= LONGEST


def _wavenet_fits(c: WaveNetConfig) -> bool:
    plain = c.bias and c.layers > 1 and not (c.embedding or c.decoder or c.row)
    return plain and not any(width % COLUMNS for width in (c.residual, c.skip, c.head)) and c.residual <= WIDEST
