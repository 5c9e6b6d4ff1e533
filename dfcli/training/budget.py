"""The clock of a training: how much of its budget is used, and what the rest is set aside for.

`--minutes` counts from just before the first step, evaluations and checkpoints included. Time for the last evaluation
and the last checkpoint is set aside, as long as the earlier ones took, and the learning rate reaches its end before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dfcli.system.processes import Pulse
from dfcli.training.settings import Recipe
from dfcli.training.state import State

EVALUATIONS = 10  # in a budget of time, if their share of the time allows
EVALUATION_SHARE = 1 / 30


class Budget:
    """Time and steps of the training whose `state` advances. `clock` gives seconds; an evaluation scores about
    `validation_tokens`."""

    def __init__(self, recipe: Recipe, state: State, pulse: Pulse, validation_tokens: int) -> None:
        self.recipe, self.state, self.validation_tokens = recipe, state, validation_tokens
        self.clock, self.beat = pulse.clock, pulse.beat
        self.start()

    def start(self) -> None:
        """Begin to count, just before the first step of this process."""
        self.began = self.clock() - self.state.seconds
        self.first_step, self.warm, self.evaluation_guess = self.state.step, 0.0, 0.0
        self.last_evaluation = self.state.seconds
        self.start_interval()

    @property
    def seconds(self) -> float:
        """Seconds spent, those of earlier processes included."""
        return self.clock() - self.began

    # --- the interval since the last line of metrics.jsonl, in which the speed is measured

    def start_interval(self) -> None:
        """Measure the speed of training anew from here."""
        self._interval = self.clock(), self.state.step, self.state.tokens
        self._paused = 0.0

    @property
    def interval_seconds(self) -> float:
        """How long this interval has lasted."""
        return self.clock() - self._interval[0]

    @property
    def tokens_per_second(self) -> float:
        """Of training alone, in this interval."""
        return (self.state.tokens - self._interval[2]) / self._busy()

    def _busy(self) -> float:
        """Seconds of training alone in this interval."""
        return max(1e-9, self.interval_seconds - self._paused)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the block as training when the speed is measured."""
        before = self.clock()
        yield
        self._paused += self.clock() - before

    # --- how much is used

    def fraction(self) -> float:
        """The share of the budget that is used, 0 to 1."""
        if self.recipe.steps:
            return min(1.0, self.state.step / self.recipe.steps)
        return min(1.0, self.seconds / max(1e-9, self._limit()))

    def used(self) -> bool:
        """Whether the last step is made: all of them, or another would not fit into the time."""
        if self.recipe.steps:
            return self.state.step >= self.recipe.steps
        step = self._busy() / max(1, self.state.step - self._interval[1])
        return self.state.seconds + step > self._limit()

    def eta(self) -> float | None:
        """Seconds until the budget is used; None while nothing is known."""
        s, r, spent = self.state, self.recipe, self.seconds
        if r.minutes:
            return max(0.0, 60 * r.minutes - spent)
        made = s.step - self.first_step - 1  # the first step of a process also warms up
        if made < 1:
            self.warm = spent
            return None
        return (spent - self.warm) / made * (r.steps - s.step)

    def _limit(self) -> float:
        """Seconds for steps: the budget without the last evaluation and checkpoint."""
        return 60 * self.recipe.minutes - self._evaluation_cost() - self.state.save_seconds

    # --- evaluations

    def evaluation_due(self) -> bool:
        """Whether to evaluate after this step."""
        s, r = self.state, self.recipe
        if s.done or r.eval_every:
            return s.done or s.step % r.eval_every == 0
        pause = max(60 * r.minutes / EVALUATIONS, self._evaluation_cost() / EVALUATION_SHARE)
        enough = s.seconds - self.last_evaluation >= pause
        return enough and s.seconds + pause / 2 < self._limit()  # not just before the last one

    def evaluated(self) -> None:
        """Note that an evaluation has ended now."""
        self.state.seconds = self.last_evaluation = self.seconds

    def _evaluation_cost(self) -> float:
        """Seconds of an evaluation: as long as the last one, else a third of training on as many tokens now."""
        if rate := self.tokens_per_second:  # the first step is slow: its guess must not end the training
            self.evaluation_guess = min(self.validation_tokens / rate / 3, 60 * self.recipe.minutes / 4)
        return self.state.evaluation_seconds or self.evaluation_guess
