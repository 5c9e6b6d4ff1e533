"""What the processes of a test do: `python -m tests.distributed.work SCENARIO FOLDER`, in two processes at once.

A model of 6,000 parameters (beside tables) is trained on a text that the test has written, for 20 steps of 8 sequences.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dfcli
from dfcli.data.batches import Batches
from dfcli.errors import DfError
from dfcli.system import processes
from dfcli.training import backend, memory
from dfcli.training.train import TrainResult

STEPS = 20
SHAPE = {"context": "16", "layers": "1", "heads": "2", "channels": "16", "compile": "off", "checkpoint_every": "4"}
RECIPES: dict[str, dict[str, str]] = {
    "adamw": {"optimizer": "adamw", "ngrams": "1", "clip": "0.5", "accumulate": "2"},
    # From init=zero the first gradients of tables are zero, which whole gradients do not tell from rows not read.
    "muon": {"optimizer": "muon", "ngrams": "3", "ngram_dropout": "0", "init": "gpt2"},
}


def train(folder: Path, name: str, recipe: str = "muon", resume: bool = False, **options: Any) -> TrainResult:
    """A run called `name`, from the start or from its last checkpoint."""
    return dfcli.train(
        "gpt", [str(folder / "text.txt")], name=name, steps=STEPS, batch_size=8, device="cpu", resume=resume,
        overrides=SHAPE | RECIPES[recipe], **options,
    )  # fmt: skip


def at(step: int, act: Callable[[], str | None]) -> Callable[[], str | None]:
    """A `stop` that acts once it has been asked `step` times: about once a step."""
    calls = 0

    def stop() -> str | None:
        nonlocal calls
        calls += 1
        return act() if calls > step else None

    return stop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one_dies(folder: Path) -> None:
    train(folder, "one-dies", stop=at(9, die) if processes.rank() else lambda: None)


def all_die(folder: Path) -> None:
    train(folder, "all-die", stop=at(9, die))


def differing_backends(folder: Path) -> list[str]:
    """Train where the compiled kernels work in the first process alone: the choice of a backend, and its reason."""
    told: list[Any] = []

    class Compiled(backend.TorchBackend):
        name = "compiled"

        def __init__(self, *arguments: Any) -> None:
            if processes.rank():
                raise ImportError("no numba here")
            super().__init__(*arguments[:3])

    compiled, unsupported = backend.CompiledBackend, backend.unsupported
    backend.CompiledBackend, backend.unsupported = Compiled, lambda *_: None  # type: ignore[assignment,misc]
    train(folder, "mixed", on_event=told.append)
    backend.CompiledBackend, backend.unsupported = compiled, unsupported  # type: ignore[misc]
    return next([event.value, event.reason] for event in told if getattr(event, "what", "") == "backend")


def sharded(folder: Path) -> None:
    """Train with the weights in two parts, and go on from checkpoints of such trainings and of others."""
    rank, notes = processes.rank(), {}
    memory.shards = lambda *_: (2, [])
    notes["losses"] = {recipe: train(folder, f"parts-{recipe}", recipe).val_loss for recipe in RECIPES}
    for name in ("parts-half", "parts-again"):
        stopped = train(folder, name, stop=at(7, lambda: "terminated") if rank else lambda: None)
        notes[name] = stopped.steps
    for name in ("parts-again", "whole-half"):
        train(folder, name, resume=True)
    (folder / f"parts-{rank}.json").write_text(json.dumps(notes))


def life(folder: Path) -> None:
    """Train, stop, resume, fail: everything that leaves the processes alive. Notes go to a file for each process."""
    rank = processes.rank()
    seen: list[list[list[int]]] = []
    draw, fits = Batches.at, memory.check_fits

    def drawn(self: Batches, step: int, micro: int = 0) -> Any:
        batch = draw(self, step, micro)
        seen.append(batch.part(slice(4 * rank, 4 * rank + 4)).ids.tolist())
        return batch

    Batches.at = drawn
    losses = {recipe: train(folder, f"two-{recipe}", recipe).val_loss for recipe in RECIPES}
    Batches.at = draw
    notes: dict[str, Any] = {"losses": losses, "rows": seen[: 2 * STEPS]}

    # A request that one process alone has stops both at the same step.
    stopped = train(folder, "half", stop=at(7, lambda: "terminated") if rank else lambda: None)
    notes["stopped"] = [stopped.stopped, stopped.steps]
    for name in ("half", "one-dies", "all-die", "alone"):
        notes[name] = train(folder, name, resume=True).steps
    notes["finished"] = train(folder, "half", resume=True).steps
    train(folder, "less", stop=at(7, lambda: "terminated") if rank else lambda: None)
    notes["backends"] = differing_backends(folder)

    def refuse(plan: Any) -> None:
        raise DfError("there is too little memory", "take less")

    memory.check_fits = refuse if rank else fits
    try:
        train(folder, "fails")
    except DfError as error:
        notes["failure"] = [type(error).__name__, error.message, error.hint]
    memory.check_fits = fits
    try:
        dfcli.train("gpt", [str(folder / "text.txt")], steps=2, batch_size=9, device="cpu")
    except DfError as error:
        notes["odd"] = [type(error).__name__, error.message, error.hint]
    (folder / f"notes-{rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    {"one_dies": one_dies, "all_die": all_die, "life": life, "sharded": sharded}[sys.argv[1]](Path(sys.argv[2]))
