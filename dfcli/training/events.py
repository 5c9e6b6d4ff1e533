"""What training tells its caller while it works, beside the events of `dfcli.system.events`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfcli.training.plan import Plan
    from dfcli.training.result import TrainResult


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on after `step` updates; `path` is the run's folder."""

    plan: Plan
    path: Path
    step: int
    best: float | None  # lowest validation loss so far, nats a token


@dataclass(frozen=True)
class Step:
    """Where training stands after `step` updates. Sent once or twice a second, and for every line of metrics.jsonl."""

    step: int
    steps: int | None  # None where the budget is a time
    fraction: float  # of the budget, 0 to 1
    tokens: int  # scored so far
    seconds: float  # spent so far, what `--minutes` counts
    train_loss: float  # mean since the last line of metrics.jsonl, nats a token
    lr: float
    tokens_per_second: float  # of training alone, since the last line of metrics.jsonl
    flops_per_second: float  # of the matrix products of training: 3 forward passes a token
    val_loss: float | None  # of this step, nats a token; None where it was not measured
    eta_seconds: float | None  # until the budget is used; None while nothing is known
    skipped: int  # batches left out because their loss or gradient was not finite


@dataclass(frozen=True)
class Saved:
    """A checkpoint was committed; `best` says that it has the lowest validation loss so far."""

    step: int
    path: Path
    best: bool


@dataclass(frozen=True)
class Sample:
    """A short text made by the model as it is now."""

    step: int
    text: str


@dataclass(frozen=True)
class Overfitting:
    """The validation loss has risen since step `best_step`, while the training loss has fallen. All in nats a token."""

    step: int
    best_step: int
    best_val_loss: float
    val_loss: float


@dataclass(frozen=True)
class Closing:
    """Training is finished and saved; the best checkpoint is measured over the whole validation split. A stop from here
    on loses nothing: the next command that needs the figure measures it."""


@dataclass(frozen=True)
class Finished:
    """Training is over, or was stopped (`result.stopped`)."""

    result: TrainResult
