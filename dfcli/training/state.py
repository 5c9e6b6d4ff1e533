"""Where a training stands: what a checkpoint holds beside the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dfcli.errors import CorruptError

RISE = 1.01  # times the lowest validation loss: from there on an evaluation counts as worse
ADDED = ("train_losses", "nats", "scored")  # fields that checkpoints of version 0.1 lack


@dataclass
class State:
    """Everything the next step depends on, and what has been reached."""

    step: int = 0  # updates made
    tokens: int = 0  # targets scored
    seconds: float = 0.0  # spent, evaluations and checkpoints included
    done: bool = False  # the budget is used
    val_loss: float | None = None  # measured at this step
    val_losses: list[float] = field(default_factory=list)  # of every evaluation so far
    train_losses: list[float] = field(default_factory=list)  # the mean of the steps before each of them
    best_step: int | None = None
    best_val_loss: float | None = None
    skipped: int = 0  # batches left out because they were not finite
    interval_nats: float = 0.0  # since the last line of metrics.jsonl
    interval_tokens: int = 0
    nats: float = 0.0  # since the last evaluation
    scored: int = 0
    evaluation_seconds: float = 0.0  # how long the last evaluation and the last checkpoint took
    save_seconds: float = 0.05

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        """The state that `asdict` gave. Raises CorruptError where a field is missing."""
        try:
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values or f.name not in ADDED})
        except KeyError as error:
            raise CorruptError(f"the checkpoint's state lacks {error}") from None

    def trained(self, nats: float, tokens: int) -> None:
        """Count a step's loss, summed in nats over `tokens` targets."""
        self.tokens += tokens
        self.interval_nats += nats
        self.interval_tokens += tokens
        self.nats += nats
        self.scored += tokens

    def validated(self, loss: float) -> None:
        """Note a finite validation loss, in nats a token, of the current step."""
        self.val_loss = loss
        self.val_losses.append(loss)
        before = self.train_losses[-1] if self.train_losses else loss
        self.train_losses.append(self.nats / self.scored if self.scored else before)
        self.nats, self.scored = 0.0, 0
        if self.best_val_loss is None or loss < self.best_val_loss:
            self.best_val_loss, self.best_step = loss, self.step

    def overfits(self, before: int = 0) -> bool:
        """Whether the model overfits, as of the last evaluation but `before`: since the evaluation with the lowest loss
        the training loss has fallen, and the validation loss of the two newest evaluations is higher."""
        end = len(self.val_losses) - before
        val, missing = self.val_losses[:end], len(self.val_losses) - len(self.train_losses)
        best = min(range(end), key=val.__getitem__, default=0)
        if best < missing or end - best < 3:  # checkpoints of version 0.1 lack the first training losses
            return False
        fell = self.train_losses[end - 1 - missing] < self.train_losses[best - missing]
        return fell and min(val[-2:]) > RISE * val[best]
