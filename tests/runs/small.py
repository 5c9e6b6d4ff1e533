"""A run small enough to be written thousands of times."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcli import cores
from dfcli.codecs import Chars, Codec
from dfcli.runs import Run

CONFIG = cores.GPTConfig(vocab_size=3, context=4, layers=1, heads=1, channels=2)  # its head is tied


def make_run(name: str = "r", codec: Codec | None = None, **info: Any) -> Run:
    core = {"name": "gpt", "config": asdict(CONFIG)}
    return Run.create(name, {"kind": "gpt", "core": core, "seed": 1, **info}, codec or Chars("abc"))


def weights(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cores.GPT(CONFIG).state_dict()


def save(run: Run, step: int, val_loss: float | None = None) -> Path:
    return run.save(step, weights(step), {"moment": torch.full((3,), float(step))}, {"val_loss": val_loss})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its relative path, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
