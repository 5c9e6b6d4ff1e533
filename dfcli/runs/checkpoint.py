"""One checkpoint: a folder `step-00000500` of a run that appears whole or not at all.

    model.safetensors      weights and buffers, tied ones once
    optimizer.safetensors  state of the optimiser
    state.json             step, the SHA-256 of both files, and the other state that resuming needs

torch is imported only where tensors are written or read, so that listing runs stays fast.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfcli.errors import CorruptError
from dfcli.system.files import DAMAGED, building, check_format, json_bytes, os_errors, read_json, reading

if TYPE_CHECKING:
    from torch import Tensor

    from dfcli.runs.rebuild import Blueprint

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory (on the CPU)."""

    step: int
    model: dict[str, Tensor]
    """By the names of the core's state dict, each of them, for `load_state_dict`."""
    optimizer: dict[str, Tensor] | None
    """None unless it was asked for."""
    state: dict[str, Any]
    """The state of the trainer, with `val_loss` (nats per token) if it was measured."""


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    with os_errors("read", run), os.scandir(run) as entries:
        names = {entry.name for entry in entries if STEP.fullmatch(entry.name) and entry.is_dir()}
    return sorted(int(name[5:]) for name in names)


def identity(run: Path, step: int) -> tuple[int, int] | None:
    """Tells a checkpoint from one that replaces it; None if there is none."""
    with os_errors("read", folder(run, step)), suppress(FileNotFoundError):
        stat = folder(run, step).stat()
        return stat.st_dev, stat.st_ino
    return None


def save(run: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write a checkpoint and return its folder; one of the same step is replaced.

    DfError if it cannot be written, ValueError if `state` holds what JSON cannot (NaN, infinity).
    """
    from dfcli.runs import tensors

    final = folder(run, step)
    with building(final, replace=True) as temporary:
        files = {
            name: {"sha256": tensors.write(temporary / name, content)}
            for name, content in ((MODEL, model), (OPTIMIZER, optimizer))
        }
        content = {"format": FORMAT, "step": step, "files": files, "state": state}
        (temporary / STATE).write_bytes(json_bytes(content))
    return final


def read_state(run: Path, step: int) -> dict[str, Any]:
    """The whole of `state.json`: format, step, files, state. CorruptError if it is damaged or missing."""
    path = folder(run, step) / STATE
    found = read_json(path)
    check_format(found, FORMAT, path)
    try:
        sound = found["step"] == step and isinstance(found["state"], dict)
        sound = sound and all(isinstance(found["files"][name]["sha256"], str) for name in (MODEL, OPTIMIZER))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise CorruptError(f"{path} is damaged: it is not the state of step {step}", DAMAGED)
    return found


def load(run: Path, step: int, core: Blueprint, *, optimizer: bool = False) -> Checkpoint:
    """Read a checkpoint. Every byte is verified, and what `core` has is compared before memory is taken for it.

    CorruptError naming the file where one is damaged or missing, or weights are not finite; DfError where one cannot be
    read.
    """
    from dfcli.runs import tensors

    found = read_state(run, step)
    place, files = folder(run, step), found["files"]
    path = place / MODEL
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
    if core.parameters > size:
        raise CorruptError(
            f"{path} is damaged: {size} bytes cannot hold the {core.parameters} parameters of {core.source.name}",
            DAMAGED,
        )
    kept = tensors.read(path, files[MODEL]["sha256"], core.layout.kinds)
    if not tensors.finite(kept):
        raise CorruptError(
            f"{path} holds weights that are not finite: its training diverged, or the file was damaged",
            "train it again with a lower `--lr`",
        )
    return Checkpoint(
        step=step,
        model={name: kept[first] for name, first in core.layout.names.items()},
        optimizer=tensors.read(place / OPTIMIZER, files[OPTIMIZER]["sha256"]) if optimizer else None,
        state=found["state"],
    )
