"""The training loop: batches to gradients to updates.

Exact resume: a batch is a pure function of (seed, step), dropout's random numbers are seeded from (seed, step) before
each step, and everything else that the next step depends on is in a checkpoint. So a run that was stopped and resumed
on a CPU ends with the same weights, bit for bit, as one that never stopped.

The clock is in `budget.py`, what is logged in `meter.py`, what is saved in `saver.py`. The time that numba takes to
compile, once on a machine, comes before the clock starts; the time of torch.compile, in each process, is inside.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor

from dfcli import cores
from dfcli.cores.protocols import Backend
from dfcli.data.batches import IGNORED, Batch
from dfcli.system.allocator import kept_memory, settled_objects
from dfcli.system.device import Device, pytorch_threads
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.processes import Pulse
from dfcli.training.backend import TorchBackend, choose, tensors
from dfcli.training.budget import Budget
from dfcli.training.events import Overfitting, Sample
from dfcli.training.meter import Meter
from dfcli.training.optim import Optimizer
from dfcli.training.saver import Saver, Store
from dfcli.training.schedule import lr_factor
from dfcli.training.settings import Recipe
from dfcli.training.state import State
from dfcli.training.validation import Validation


class Source(Protocol):
    """Where batches come from: `dfcli.data.batches.Batches`."""

    def at(self, step: int, micro: int = 0) -> Batch: ...


class Trainer:
    """Trains `core`, which is on `device`, until the recipe's budget is used.

    `state` is where to go on from. `pulse` has the clock, the processes, and the request to stop, which is looked for
    before every step and ends the loop after a checkpoint.
    """

    def __init__(
        self,
        core: cores.Core,
        recipe: Recipe,
        batches: Source,
        store: Store,
        device: Device,
        *,
        seed: int = 0,
        state: State | None = None,
        validation: Validation | None = None,
        on_event: OnEvent = ignore,
        pulse: Pulse | None = None,
    ) -> None:
        self.core, self.recipe, self.batches, self.device = core, recipe, batches, device
        self.seed, self.validation, self.on_event = seed, validation, on_event
        pulse = pulse or Pulse()
        self.stop, self.processes = pulse.stop, pulse.processes
        self.state = state = state or State()
        self.optimizer = Optimizer(core, recipe)
        self.budget = Budget(recipe, state, pulse, validation.tokens if validation else 0)
        self.meter = Meter(recipe, state, self.budget, core.config.flops_per_token(), store.log, on_event)
        self.saver = Saver(recipe, state, self.budget, core, self.optimizer, store, on_event)
        self.drawn: dict[int, list[Batch]] = {}  # the next step's micro-batches, where they are drawn ahead
        self.backend: Backend = TorchBackend(core, recipe, device)

    def run(self) -> str | None:
        """Train until the budget is used; gives None then, or the reason `stop` gave.

        Raises DfError where the loss or the gradient is not finite (before the update), and where a checkpoint cannot
        be written."""
        if self.state.done:
            return None
        self.core.train()
        if self.validation and self.validation.of_start and not self.state.val_losses:
            self.evaluate(self.validation)
            self.saver.save()
            self.state.seconds = 0.0
        self.backend = choose(self.core, self.recipe, self.device, self.on_event, self.processes)
        self.budget.beat()
        self.budget.start()
        # Of the first batch, also in a resumed training, so that the same graph is recorded: the same bits.
        self.backend.warm_up(lambda: self.part(self.batches.at(0)), self.on_event)
        dense, _ = self.processes.agree(int(not self.backend.sparse), 0.0)  # torch.compile may fail in one process
        self.backend.sparse = not dense
        self.optimizer.use(self.backend)
        with kept_memory(), settled_objects(), pytorch_threads(self.backend.threads):
            while not self.state.done:
                if reason := self.stop():
                    self.saver.save()
                    return reason
                self.step()
        return None

    def step(self) -> None:
        """One update, and what is due after it: an evaluation, a report, a checkpoint."""
        s, r = self.state, self.recipe
        factor = lr_factor(r, s.step, self.budget.fraction(), s.val_losses)
        nats, tokens, norm = self.gradients(s.step)
        self.budget.beat()
        if math.isfinite(nats) and math.isfinite(norm):
            if r.clip:
                self.optimizer.clip_gradients(norm, r.clip)
            self.optimizer.step(factor)
            s.trained(nats, tokens)
        else:
            self.leave_out(nats, r.lr * factor)
        s.step += 1
        s.seconds = self.budget.seconds
        s.done = self.budget.used()
        s.val_loss = None
        if self.validation and self.budget.evaluation_due():
            self.evaluate(self.validation)
        self.meter.report(r.lr * factor)
        if s.done or self.saver.due():
            self.saver.save()

    def gradients(self, step: int) -> tuple[float, int, float]:
        """Fill the gradients for update `step`. Returns the summed loss in nats, the number of targets it is over,
        and the gradient's norm. The gradient is that of the mean over the targets of all micro-batches together, of
        which each process computes its rows."""
        seed_dropout(step_seed(self.seed, step, self.processes.rank), self.device)
        micros = self.drawn.pop(step, None) or self.draw(step)
        count = sum(int((batch.targets != IGNORED).sum()) for batch in micros)
        total = torch.zeros((), device=self.device.torch_device)
        for batch in micros:
            total += self.backward(self.part(batch), count)
        if self.device.kind != "cpu":  # which computes meanwhile
            self.drawn = {step + 1: self.draw(step + 1)}
        self.processes.add_gradients(self.optimizer.named.values(), total)
        nats, norm = torch.stack((total, self.optimizer.gradient_norm())).tolist()  # the step's one wait for the device
        return nats, count, norm

    def draw(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        return [self.batches.at(step, micro) for micro in range(self.recipe.accumulate)]

    def part(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        return batch.part(self.processes.rows(len(batch.ids)))

    def backward(self, batch: Batch, count: int) -> Tensor:
        """Add the gradients of a micro-batch to those there are, of the mean over `count` targets. Returns its
        cross-entropy in nats, summed over the targets that are scored; a scalar."""
        return self.backend.backward(*tensors(batch, self.device), count)

    def evaluate(self, validation: Validation) -> None:
        """Measure the validation loss of the model as it is, and make a preview."""
        with self.budget.paused(), pytorch_threads(self.device.threads):
            began = self.budget.seconds
            loss = validation.loss()
            self.processes.check_equal(list(self.core.parameters()))
            self.budget.beat()
            self.state.evaluation_seconds = self.budget.seconds - began
            if math.isfinite(loss):
                self.state.validated(loss)
                self.warn_overfitting(loss)
            else:
                self.on_event(Note(f"the validation loss after step {self.state.step} is not finite"))
            if validation.preview:
                self.on_event(Sample(self.state.step, validation.preview()))
            self.budget.beat()
        self.budget.evaluated()

    def warn_overfitting(self, val_loss: float) -> None:
        """Tell when the model begins to overfit."""
        s = self.state
        if s.overfits() and not s.overfits(before=1) and s.best_step is not None and s.best_val_loss is not None:
            self.on_event(Overfitting(s.step, s.best_step, s.best_val_loss, val_loss))

    def leave_out(self, nats: float, lr: float) -> None:
        """Go on without an update where the loss or the gradient is not finite, or raise DfError."""
        s, r, saved = self.state, self.recipe, self.saver.saved_step
        self.optimizer.drop_gradients()
        s.skipped += 1
        what = f"the {'gradient' if math.isfinite(nats) else 'loss'} of step {s.step + 1} is not finite"
        if r.on_nonfinite == "stop" or s.skipped > r.skip_limit:
            kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint"
            earlier = "1 batch was" if s.skipped == 2 else f"{s.skipped - 1} batches were"
            often = f" ({earlier} left out before)" if s.skipped > 1 else ""
            raise self.processes.error(
                f"{what}{often}, at a learning rate of {lr:.3g}; training stopped before the update, and {kept}",
                "train again under a new name with a lower `--lr`, a longer `--set warmup=...` or `--set clip=1`",
            )
        self.on_event(Note(f"{what}: its batch is left out"))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of torch's generators (dropout) for a step in the process `rank`: 63 bits of a hash, so that neighbours
    share nothing."""
    words = f"{seed}:{step}:{rank}" if rank else f"{seed}:{step}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1


def seed_dropout(seed: int, device: Device) -> None:
    """Seed the generator that dropout draws from. torch.manual_seed would keep a stack trace for each call on a machine
    whose GPU is not used: 0.5 ms each, and memory that is never freed."""
    if device.kind == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.kind == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
