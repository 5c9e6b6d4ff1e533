"""What a training logs: Step events for whoever watches, and lines of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dfcli.system.events import OnEvent
from dfcli.training.budget import Budget
from dfcli.training.events import Step
from dfcli.training.settings import Recipe
from dfcli.training.state import State

DISPLAY_SECONDS = 0.5  # between two Step events
LOG_SECONDS = 2.0  # between two lines of metrics.jsonl where the budget is a time


class Meter:
    """Reports on the training whose `state` advances. `log` takes a line of metrics.jsonl; a forward pass takes
    `flops_per_token`."""

    def __init__(
        self,
        recipe: Recipe,
        state: State,
        budget: Budget,
        flops_per_token: int,
        log: Callable[[dict[str, Any]], None],
        on_event: OnEvent,
    ) -> None:
        self.recipe, self.state, self.budget, self.flops_per_token = recipe, state, budget, flops_per_token
        self.log, self.on_event = log, on_event
        self.shown = -math.inf

    def report(self, lr: float) -> None:
        """Tell of the step just made, at learning rate `lr`, if a line or an event is due."""
        s, budget, every = self.state, self.budget, self.recipe.log_every
        due = s.step % every == 0 if every else budget.interval_seconds >= LOG_SECONDS
        logged = s.step == 1 or due or s.done or s.val_loss is not None
        if not logged and budget.seconds - self.shown < DISPLAY_SECONDS:
            return
        self.shown = budget.seconds
        rate = budget.tokens_per_second
        step = Step(
            step=s.step, steps=self.recipe.steps or None, fraction=1.0 if s.done else budget.fraction(),
            tokens=s.tokens, seconds=self.shown,
            train_loss=s.interval_nats / s.interval_tokens if s.interval_tokens else math.nan, lr=lr,
            tokens_per_second=rate, flops_per_second=3 * self.flops_per_token * rate, val_loss=s.val_loss,
            eta_seconds=budget.eta(), skipped=s.skipped,
        )  # fmt: skip
        if logged:
            self.log(metrics_line(step))
            s.interval_nats, s.interval_tokens = 0.0, 0
            budget.start_interval()
        self.on_event(step)


def metrics_line(step: Step) -> dict[str, Any]:
    """A line of metrics.jsonl. Losses that are not finite are left out: JSON has no NaN."""
    line = {
        "step": step.step,
        "tokens": step.tokens,
        "seconds": step.seconds,
        "train_loss": step.train_loss,
        "lr": step.lr,
        "tokens_per_second": step.tokens_per_second,
        "val_loss": step.val_loss,
        "skipped": step.skipped or None,
    }
    return {key: value for key, value in line.items() if value is not None and math.isfinite(value)}
