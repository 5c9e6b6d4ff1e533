"""The training loop: batches to gradients to updates, with what is watched, kept and resumed on the way.

Exact resume: a batch is a pure function of (seed, step), dropout's random numbers are seeded from (seed, step) before
each step, and everything else that the next step depends on is in a checkpoint. So a run that was stopped and resumed
on a CPU ends with the same weights, bit for bit, as one that never stopped.

Time: `--minutes` counts from just before the first step, validation and checkpoints included. (What numba compiles once
on a machine is prepared before; what torch.compile compiles in each process is included.) Time for the last
evaluation and checkpoint is set aside, as long as the earlier ones took, and the learning rate reaches its end before.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dfcli import cores
from dfcli.data.batches import IGNORED, Batch
from dfcli.errors import CorruptError, DfError
from dfcli.system.allocator import kept_memory, settled_objects
from dfcli.system.device import Device, pytorch_threads
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.training.events import Sample, Saved, Step
from dfcli.training.fast import by_numba, by_torch
from dfcli.training.loss import Backward, cross_entropy
from dfcli.training.optim import Optimizer
from dfcli.training.schedule import lr_factor
from dfcli.training.settings import Recipe

DISPLAY_SECONDS = 0.5  # between two Step events
LOG_SECONDS = 2.0  # between two lines of metrics.jsonl where the budget is a time
SAVE_SECONDS = 60.0  # between two checkpoints at most: what a crash may cost
SAVE_SHARE = 1 / 50  # of the time, for those
EVALUATION_SHARE = 1 / 30  # of the time, where the budget is a time
EVALUATIONS = 10  # in a budget of time, if that share allows


class Source(Protocol):
    """Where batches come from: `dfcli.data.batches.Batches`."""

    def at(self, step: int, micro: int = 0) -> Batch: ...


class Store(Protocol):
    """Where lines and checkpoints go: `dfcli.runs.Run`."""

    def log(self, row: dict[str, Any], /) -> None: ...
    def save(
        self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], /
    ) -> Path: ...


@dataclass
class State:
    """What a checkpoint holds beside the tensors: everything the next step depends on, and what has been reached."""

    step: int = 0  # updates made
    tokens: int = 0  # targets scored
    seconds: float = 0.0  # spent, evaluations and checkpoints included
    done: bool = False  # the budget is used
    val_loss: float | None = None  # measured at this step
    val_losses: list[float] = field(default_factory=list)  # of every evaluation so far
    best_step: int | None = None
    best_val_loss: float | None = None
    skipped: int = 0  # batches left out because they were not finite
    interval_nats: float = 0.0  # since the last line of metrics.jsonl
    interval_tokens: int = 0
    evaluation_seconds: float = 0.0  # what the last evaluation and the last checkpoint took
    save_seconds: float = 0.05

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        """The state that `asdict` gave. Raises CorruptError where a field is missing."""
        try:
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except KeyError as error:
            raise CorruptError(f"the checkpoint's state lacks {error}") from None


class Trainer:
    """Trains `core`, which is on `device`, until the recipe's budget is used.

    `validate` gives the validation loss in nats a token, or is None where there is nothing to validate on; about
    `validation_tokens` are scored. `preview` makes a short text for a Sample event after an evaluation. `stop` is asked
    before every step; a reason it gives ends the loop after a checkpoint. `clock` gives seconds.
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
        validate: Callable[[], float] | None = None,
        validation_tokens: int = 0,
        preview: Callable[[], str] | None = None,
        on_event: OnEvent = ignore,
        stop: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.core, self.recipe, self.batches, self.store, self.device = core, recipe, batches, store, device
        self.seed, self.state = seed, state or State()
        self.validate, self.validation_tokens, self.preview = validate, validation_tokens, preview
        self.on_event, self.stop, self.clock = on_event, stop, clock
        self.optimizer = Optimizer(core, recipe)
        self.forward: Callable[..., Tensor] = core
        self.fast_backward: Backward | None = None
        self.saved_step: int | None = self.state.step or None

    # --- the loop

    def run(self) -> str | None:
        """Train until the budget is used; gives None then, or the reason `stop` gave.

        Raises DfError where the loss or the gradient is not finite (before the update), and where a checkpoint cannot
        be written."""
        s = self.state
        if s.done:
            return None
        self.fast_backward = by_numba(self.core, self.optimizer, self.recipe, self.device, self.on_event)
        self.began = self.clock() - s.seconds
        self.first_step, self.shown, self.warm, self.guess = s.step, -math.inf, 0.0, 0.0
        self.last_evaluation = self.last_save = s.seconds
        self.core.train()
        if self.fast_backward is None:
            self.forward = by_torch(self.core, self.recipe, self.device, self.try_out, self.on_event)
        self.optimizer.rows.sparse(self.forward is self.core and self.device.kind == "cpu")
        self._start_interval()
        # What compiled functions leave to PyTorch is too short to be worth waking threads for.
        threads = 1 if self.fast_backward else self.device.threads
        with kept_memory(), settled_objects(), pytorch_threads(threads):
            while not s.done:
                reason = self.stop()
                if reason is not None:
                    if s.step and self.saved_step != s.step:
                        self._save()
                    return reason
                self._step()
        return None

    def _step(self) -> None:
        s, r = self.state, self.recipe
        self.factor = lr_factor(r, s.step, self.fraction(), s.val_losses)
        nats, tokens, norm = self.gradients(s.step)
        if math.isfinite(nats) and math.isfinite(norm):
            if r.clip:
                self.optimizer.clip_gradients(norm, r.clip)
            self.optimizer.step(self.factor)
            s.tokens += tokens
            s.interval_nats += nats
            s.interval_tokens += tokens
        else:
            self._not_finite(nats)
        s.step += 1
        s.seconds = self.clock() - self.began
        s.done = s.step >= r.steps if r.steps else s.seconds + self._step_seconds() > self._limit()
        s.val_loss = None
        if self.validate and self._evaluation_due():
            with pytorch_threads(self.device.threads):
                self._evaluate(self.validate)
        self._report()
        if s.done or self._save_due():
            self._save()

    def gradients(self, step: int) -> tuple[float, int, float]:
        """Fill the gradients for update `step`. Returns the summed loss in nats, the number of targets it is over,
        and the gradient's norm. The gradient is that of the mean over the targets of all micro-batches together."""
        self._seed(step_seed(self.seed, step))
        micros = [self.batches.at(step, micro) for micro in range(self.recipe.accumulate)]
        count = sum(int((batch.targets != IGNORED).sum()) for batch in micros)
        total = torch.zeros((), device=self.device.torch_device)
        for batch in micros:
            total += self.backward(batch, count)
        nats, norm = torch.stack((total, self.optimizer.gradient_norm())).tolist()  # the step's one wait for the device
        return nats, count, norm

    def _seed(self, seed: int) -> None:
        """Seed what dropout draws from. Not by torch.manual_seed: on a machine whose GPU is not used it keeps a stack
        trace for each call, which takes 0.5 ms and is never freed."""
        if self.device.kind == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.kind == "mps":
            torch.mps.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def backward(self, batch: Batch, count: int) -> Tensor:
        """Add the gradients of a micro-batch to those there are, of the mean over `count` targets. Returns its
        cross-entropy in nats, summed over the targets that are scored; a scalar."""
        ids, targets, positions = (
            None if x is None else x.to(self.device.torch_device, non_blocking=True)
            for x in (batch.ids, batch.targets, batch.positions)
        )
        assert ids is not None
        assert targets is not None
        if self.fast_backward:
            return self.fast_backward(ids, targets, positions, count)
        last = self.recipe.packing == "last"
        with self.device.autocast():
            logits = self.forward(ids, positions, last)
            targets = targets[:, -1:] if last else targets
            loss = cross_entropy(logits, targets)
        (loss / max(1, count)).backward()
        return loss.detach()

    def _not_finite(self, nats: float) -> None:
        s, r = self.state, self.recipe
        self.optimizer.drop_gradients()
        s.skipped += 1
        what = f"the {'gradient' if math.isfinite(nats) else 'loss'} of step {s.step + 1} is not finite"
        if r.on_nonfinite == "stop" or s.skipped > r.skip_limit:
            kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint"
            earlier = "1 batch was" if s.skipped == 2 else f"{s.skipped - 1} batches were"
            often = f" ({earlier} left out before)" if s.skipped > 1 else ""
            raise DfError(
                f"{what}{often}, at a learning rate of {r.lr * self.factor:.3g}; "
                f"training stopped before the update, and {kept}",
                "train again under a new name with a lower `--lr`, a longer `--set warmup=...` or `--set clip=1`",
            )
        self.on_event(Note(f"{what}: its batch is left out"))

    def try_out(self, forward: Callable[..., Tensor]) -> None:
        """One pass of a batch, forwards and backwards, that changes nothing. Raises what `forward` raises."""
        buffers = {name: buffer.clone() for name, buffer in self.core.named_buffers()}  # BatchNorm's, which it moves
        before, self.forward = self.forward, forward
        try:
            self.backward(self.batches.at(self.state.step), 1)
        finally:
            self.forward = before
            self.optimizer.drop_gradients()
            for name, buffer in self.core.named_buffers():
                buffer.copy_(buffers[name])

    # --- time

    def fraction(self) -> float:
        """The share of the budget that is used, 0 to 1."""
        if self.recipe.steps:
            return min(1.0, self.state.step / self.recipe.steps)
        return min(1.0, (self.clock() - self.began) / max(1e-9, self._limit()))

    def _limit(self) -> float:
        """Seconds for steps: the budget without what the last evaluation and checkpoint will take."""
        s = self.state
        return 60 * self.recipe.minutes - self._evaluation_cost() - s.save_seconds

    def _evaluation_cost(self) -> float:
        """Seconds an evaluation takes: as the last one, else a third of what training on as many tokens takes now."""
        tokens = self.state.tokens - self.interval_start_tokens
        if tokens:  # the first step is slow: its guess must not end the training
            self.guess = min(self._busy() / tokens * self.validation_tokens / 3, 60 * self.recipe.minutes / 4)
        return self.state.evaluation_seconds or self.guess

    def _busy(self) -> float:
        """Seconds of training alone in this interval."""
        return max(1e-9, self.clock() - self.interval_began - self.interval_pause)

    def _step_seconds(self) -> float:
        """Seconds a step takes, on the average of this interval."""
        return self._busy() / max(1, self.state.step - self.interval_step)

    def _start_interval(self) -> None:
        self.interval_began, self.interval_pause = self.clock(), 0.0
        self.interval_step, self.interval_start_tokens = self.state.step, self.state.tokens

    # --- what is watched and kept

    def _evaluation_due(self) -> bool:
        s, r = self.state, self.recipe
        if s.done or r.eval_every:
            return s.done or s.step % r.eval_every == 0
        pause = max(60 * r.minutes / EVALUATIONS, self._evaluation_cost() / EVALUATION_SHARE)
        enough = s.seconds - self.last_evaluation >= pause
        return enough and s.seconds + pause / 2 < self._limit()  # not just before the last one

    def _evaluate(self, validate: Callable[[], float]) -> None:
        s, before = self.state, self.clock()
        loss = validate()
        if math.isfinite(loss):
            s.val_loss = loss
            s.val_losses.append(loss)
            if s.best_val_loss is None or loss < s.best_val_loss:
                s.best_val_loss, s.best_step = loss, s.step
        else:
            self.on_event(Note(f"the validation loss after step {s.step} is not finite"))
        s.evaluation_seconds = self.clock() - before
        if self.preview:
            self.on_event(Sample(s.step, self.preview()))
        self.interval_pause += self.clock() - before
        s.seconds = self.last_evaluation = self.clock() - self.began

    def _save_due(self) -> bool:
        s, r = self.state, self.recipe
        if s.val_loss is not None and s.best_step == s.step:
            return True
        if r.checkpoint_every and s.step % r.checkpoint_every == 0:
            return True
        return s.seconds - self.last_save >= max(SAVE_SECONDS, s.save_seconds / SAVE_SHARE)

    def _save(self) -> None:
        s, before = self.state, self.clock()
        s.seconds = before - self.began
        model = {name: tensor.detach() for name, tensor in self.core.state_dict().items()}
        path = self.store.save(s.step, model, self.optimizer.state_tensors(), asdict(s))
        self.saved_step = s.step
        self.on_event(Saved(s.step, path, s.best_step == s.step))
        s.save_seconds = self.clock() - before
        self.interval_pause += s.save_seconds
        self.last_save = self.clock() - self.began

    def _report(self) -> None:
        s, r, now = self.state, self.recipe, self.clock()
        first = s.step == 1
        due = s.step % r.log_every == 0 if r.log_every else now - self.interval_began >= LOG_SECONDS
        logged = first or due or s.done or s.val_loss is not None
        if not logged and now - self.shown < DISPLAY_SECONDS:
            return
        self.shown = now
        rate = (s.tokens - self.interval_start_tokens) / self._busy()
        loss = s.interval_nats / s.interval_tokens if s.interval_tokens else math.nan
        step = Step(
            step=s.step, steps=r.steps or None, fraction=1.0 if s.done else self.fraction(), tokens=s.tokens,
            seconds=now - self.began, train_loss=loss, lr=r.lr * self.factor, tokens_per_second=rate,
            flops_per_second=3 * self.core.config.flops_per_token() * rate, val_loss=s.val_loss,
            eta_seconds=self._eta(), skipped=s.skipped,
        )  # fmt: skip
        if logged:
            self.store.log(metrics_line(step))
            s.interval_nats, s.interval_tokens = 0.0, 0
            self._start_interval()
        self.on_event(step)

    def _eta(self) -> float | None:
        s, r = self.state, self.recipe
        spent = self.clock() - self.began
        if r.minutes:
            return max(0.0, 60 * r.minutes - spent)
        made = s.step - self.first_step - 1  # the first step of a session also warms up
        if made < 1:
            self.warm = spent
            return None
        return (spent - self.warm) / made * (r.steps - s.step)


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


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generators (dropout) for a step: 63 bits of a hash, so that neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "little") >> 1
