"""When a training saves a checkpoint, and what it saves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dfcli.runs.tensors import fetched
from dfcli.system.events import OnEvent
from dfcli.training.budget import Budget
from dfcli.training.events import Saved
from dfcli.training.optim import Optimizer
from dfcli.training.settings import Recipe
from dfcli.training.state import State

SAVE_SECONDS = 60.0  # between two checkpoints at most: the time that a crash may cost
SAVE_SHARE = 1 / 50  # of the time, for checkpoints


class Store(Protocol):
    """Where lines and checkpoints go: `dfcli.runs.Run`."""

    def log(self, row: dict[str, Any], /) -> None: ...
    def save(
        self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], /
    ) -> Path: ...


class Nowhere:
    """The store of processes that do not write, of the run in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, row: dict[str, Any], /) -> None:
        pass

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], /) -> Path:
        for tensors in (model, optimizer):
            for _ in fetched(tensors):  # takes part where they are sharded
                pass
        return self.path


class Saver:
    """Saves `core` and `optimizer`, which belong to the training whose `state` advances, to `store`."""

    def __init__(
        self, recipe: Recipe, state: State, budget: Budget, core: nn.Module, optimizer: Optimizer, store: Store,
        on_event: OnEvent,
    ) -> None:  # fmt: skip
        self.recipe, self.state, self.budget = recipe, state, budget
        self.core, self.optimizer, self.store, self.on_event = core, optimizer, store, on_event
        self.saved_step: int | None = state.step or None
        self.last_save = state.seconds

    def due(self) -> bool:
        """Whether to save after this step: the best so far, every `checkpoint_every` steps, once a minute."""
        s, r = self.state, self.recipe
        if s.val_loss is not None and s.best_step == s.step:
            return True
        if r.checkpoint_every and s.step % r.checkpoint_every == 0:
            return True
        return s.seconds - self.last_save >= max(SAVE_SECONDS, s.save_seconds / SAVE_SHARE)

    def save(self) -> None:
        """Save a checkpoint of the current step, unless there is one. Raises DfError where it cannot be written."""
        s, began = self.state, self.budget.seconds
        if s.step == self.saved_step or not (s.step or s.val_losses):  # step 0 alone where it was evaluated
            return
        s.seconds = began
        tensors = self.core.state_dict(keep_vars=True)
        once = {id(tensor): name for name, tensor in reversed(tensors.items())}  # tied ones by the first of their names
        model = {name: tensors[name].detach() for name in once.values()}
        with self.budget.paused():
            path = self.store.save(s.step, model, self.optimizer.state_tensors(), asdict(s))
            self.budget.beat()
        self.saved_step = s.step
        self.last_save = self.budget.seconds
        s.save_seconds = self.last_save - began
        self.on_event(Saved(s.step, path, s.best_step == s.step))
