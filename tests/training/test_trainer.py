from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfcli import cores
from dfcli.data.batches import Batch
from dfcli.errors import DfError
from dfcli.system.device import resolve
from dfcli.system.events import Note
from dfcli.system.processes import Pulse
from dfcli.training.backend import TorchBackend
from dfcli.training.events import Sample, Saved, Step
from dfcli.training.meter import metrics_line
from dfcli.training.settings import Recipe
from dfcli.training.state import State
from dfcli.training.trainer import Trainer, step_seed
from dfcli.training.validation import Validation

CORES: dict[str, dict[str, Any]] = {
    "gpt": {"vocab_size": 11, "context": 8, "layers": 2, "heads": 2, "channels": 8, "tied_head": False, "dropout": 0.2},
    "wavenet": {"vocab_size": 11, "dilations": (1, 2), "cycles": 2, "residual": 16, "skip": 16, "head": 8},
    "charwavenet": {"vocab_size": 11, "levels": 3, "embedding": 4, "hidden": 6},
}
DEVICE = resolve("cpu")
TIMES = ("seconds", "tokens_per_second")


class Rows:
    """Batches of random rows: micro-batch m of b rows holds the rows m b to (m + 1) b of the step's."""

    def __init__(self, batch_size: int, window: int = 8) -> None:
        self.batch_size, self.window = batch_size, window
        self.asked: Callable[[], None] = lambda: None

    def at(self, step: int, micro: int = 0) -> Batch:
        self.asked()
        rows = np.random.default_rng([step]).integers(0, 11, (64, self.window + 1))
        rows = torch.from_numpy(rows[micro * self.batch_size : (micro + 1) * self.batch_size])
        targets = rows[:, 1:].clone()
        targets[0, : micro + 1] = -100  # micro-batches differ in how many targets they score
        return Batch(rows[:, :-1].contiguous(), targets, None)


class Memory:
    """A store that keeps everything in memory, as a run would on disk."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.saves: dict[int, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]] = {}

    def log(self, row: dict[str, Any], /) -> None:
        self.lines.append(row)

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], /) -> Path:
        self.saves[step] = copy.deepcopy(({k: v.clone() for k, v in model.items()}, optimizer, state))
        return Path(f"step-{step}")


def build(core_name: str = "gpt", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return cores.build(core_name, CORES[core_name])


def trainer(core: Any, recipe: Recipe, store: Memory, **options: Any) -> Trainer:
    source = options.pop("source", Rows(recipe.batch_size))
    if validate := options.pop("validate", None):
        options["validation"] = Validation(validate, options.pop("validation_tokens", 0), options.pop("preview", None))
    given = {name: options.pop(name) for name in ("clock", "stop") if name in options}
    return Trainer(core, recipe, source, store, DEVICE, seed=5, pulse=Pulse(**given), **options)


def validator(core: Any) -> Callable[[], float]:
    """A loss on fixed rows, in eval mode."""
    batch = Rows(4).at(10**6)

    def validate() -> float:
        core.eval()
        with torch.no_grad():
            loss = F.cross_entropy(core(batch.ids).flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        core.train()
        return float(loss)

    return validate


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


RECIPE = {"lr": 0.01, "log_every": 2, "eval_every": 3, "checkpoint_every": 4, "schedule": "cosine", "warmup": 2}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("core_name", ["gpt", "wavenet", "charwavenet"])
def test_a_run_stopped_anywhere_ends_as_one_that_never_stopped(core_name: str, optimizer: str) -> None:
    packing = "last" if core_name == "charwavenet" else "packed"
    recipe = Recipe(
        steps=9, batch_size=3, accumulate=2, optimizer=optimizer, momentum=0.9, packing=packing, clip=1.0, **RECIPE
    )
    core = build(core_name)
    whole = Memory()
    assert trainer(core, recipe, whole, validate=validator(core)).run() is None

    for at in (1, 4, 5, 8):
        core, parts = build(core_name), Memory()
        polls: Iterator[int] = iter(range(100))
        stop = lambda at=at, polls=polls: "interrupted" if next(polls) == at else None  # noqa: E731
        assert trainer(core, recipe, parts, validate=validator(core), stop=stop).run() == "interrupted"
        model, optimizer_state, state = parts.saves[at]

        core = build(core_name, seed=99)
        core.load_state_dict(model)
        resumed = trainer(core, recipe, parts, state=State.from_json(state), validate=validator(core))
        resumed.optimizer.load_state_tensors(optimizer_state)
        assert resumed.run() is None
        assert timeless(parts.lines) == timeless(whole.lines)
        for part, other in zip(parts.saves[9][:2], whole.saves[9][:2], strict=True):
            assert part.keys() == other.keys()
            assert all(torch.equal(part[name], other[name]) for name in other)
        times = {"seconds", "evaluation_seconds", "save_seconds"}
        assert {k: v for k, v in parts.saves[9][2].items() if k not in times} == {
            k: v for k, v in whole.saves[9][2].items() if k not in times
        }


def test_accumulated_micro_batches_equal_one_batch() -> None:
    class Whole(Rows):
        """The step's micro-batches of `Rows` as one batch."""

        def at(self, step: int, micro: int = 0) -> Batch:
            parts = [Rows(2).at(step, m) for m in range(3)]
            return Batch(torch.cat([p.ids for p in parts]), torch.cat([p.targets for p in parts]), None)

    grads = []
    for recipe, source in (
        (Recipe(batch_size=2, accumulate=3, precision="float32"), Rows(2)),
        (Recipe(batch_size=6, precision="float32"), Whole(6)),
    ):
        core = build("wavenet")
        one = trainer(core, recipe, Memory(), source=source)
        nats, tokens, norm = one.gradients(0)
        grads.append((nats, tokens, norm, [p.grad for p in core.parameters() if p.grad is not None]))
    (nats, tokens, norm, some), (nats2, tokens2, norm2, others) = grads
    assert tokens == tokens2 == 6 * 8 - (1 + 2 + 3)
    assert nats == pytest.approx(nats2, rel=1e-6)
    assert norm == pytest.approx(norm2, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(some, others, strict=True))


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    core = build("wavenet")
    nats, tokens, norm = trainer(core, Recipe(batch_size=4, precision="float32"), Memory()).gradients(3)
    found = [p.grad.clone() for p in core.parameters() if p.grad is not None]
    core.zero_grad()
    batch = Rows(4).at(3)
    loss = F.cross_entropy(core(batch.ids).flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    loss.backward()
    assert nats / tokens == pytest.approx(loss.item(), rel=1e-6)
    plain = [p.grad for p in core.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, plain, strict=True))
    assert norm == pytest.approx(torch.cat([g.flatten() for g in plain]).norm().item(), rel=1e-5)


def test_clipping_bounds_the_gradient() -> None:
    moved = []
    for clip in (0.0, 1e-3):
        core = build("wavenet")
        before = [p.detach().clone() for p in core.parameters()]
        trainer(core, Recipe(steps=1, batch_size=2, optimizer="sgd", lr=1.0, clip=clip), Memory()).run()
        moved.append(
            math.sqrt(
                sum((p - q).detach().square().sum().item() for p, q in zip(core.parameters(), before, strict=True))
            )
        )
    assert moved[0] > 0.01
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)


def broken(one: Trainer, at: set[int], what: float = math.nan) -> Trainer:
    """A trainer whose loss is not finite at some steps."""
    sound = one.backward
    one.backward = lambda batch, count: sound(batch, count) * (what if one.state.step in at else 1.0)
    return one


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(what: float) -> None:
    core, store = build(), Memory()
    one = broken(trainer(core, Recipe(steps=9, batch_size=2, checkpoint_every=2, lr=0.05), store), {3}, what)
    after_three: list[Tensor] = []
    update = one.optimizer.step

    def step(factor: float) -> None:
        update(factor)
        after_three[:] = [p.detach().clone() for p in core.parameters()]

    one.optimizer.step = step
    with pytest.raises(DfError, match=r"the loss of step 4 is not finite, at a learning rate of 0\.05") as caught:
        one.run()
    assert "checkpoint of step 2 is kept" in caught.value.message
    assert "--lr" in caught.value.hint
    assert all(torch.equal(p, q) for p, q in zip(core.parameters(), after_three, strict=True))
    assert list(store.saves) == [2]


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    core = build()
    one = trainer(core, Recipe(steps=3, batch_size=2), Memory())
    core.head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(DfError, match=r"the gradient of step 1 is not finite.*there is no checkpoint"):
        one.run()


def test_on_request_batches_are_skipped_and_counted_up_to_a_bound() -> None:
    events: list[object] = []
    recipe = Recipe(steps=6, batch_size=2, on_nonfinite="skip", skip_limit=2, log_every=1)
    core, store = build(), Memory()
    assert broken(trainer(core, recipe, store, on_event=events.append), {1, 4}).run() is None
    assert store.saves[6][2]["skipped"] == 2
    assert store.saves[6][2]["tokens"] == 4 * 15
    assert sum(isinstance(event, Note) for event in events) == 2
    assert all(torch.isfinite(p).all() for p in core.parameters())
    assert "train_loss" not in store.lines[1]

    with pytest.raises(DfError, match="2 batches were left out before"):
        broken(trainer(build(), recipe, Memory()), {1, 2, 3}).run()


class Clock:
    """Seconds that pass only when something is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


def timed(
    clock: Clock, step: float, evaluation: float, state: State | None = None, **options: Any
) -> tuple[Trainer, Memory]:
    core, store = build("charwavenet"), Memory()
    source = Rows(2)
    source.asked = lambda: clock.take(step)
    save = store.save

    def slow_save(*arguments: Any) -> Path:
        clock.take(0.2)
        return save(*arguments)

    store.save = slow_save  # pyright: ignore
    sound = validator(core)

    def validate() -> float:
        clock.take(evaluation)
        return sound()

    recipe = Recipe(batch_size=2, schedule="linear", decay_start=0.3, **options)
    one = trainer(core, recipe, store, source=source, validate=validate, validation_tokens=40, clock=clock, state=state)
    return one, store


@pytest.mark.parametrize(
    ("minutes", "step", "evaluation"), [(1.0, 0.3, 0.5), (0.25, 0.1, 0.3), (3.0, 2.0, 0.1), (0.1, 1.0, 1.0)]
)
def test_a_time_budget_is_kept_and_the_rate_decayed(minutes: float, step: float, evaluation: float) -> None:
    clock = Clock()
    one, store = timed(clock, step, evaluation, minutes=minutes)
    assert one.run() is None
    spent = clock.now - 1000
    last = store.lines[-1]
    assert 60 * minutes - 3 * step - 0.5 <= spent <= 60 * minutes + 0.5
    assert last["lr"] <= one.recipe.lr * (4 * step / (60 * minutes) + 0.02) / 0.7
    assert one.state.seconds == pytest.approx(spent - 0.2, abs=0.01)
    assert one.state.done
    evaluations = [line for line in store.lines if "val_loss" in line]
    assert evaluations[-1]["step"] == last["step"] == one.state.step
    assert len(evaluations) <= 11
    # but for the last evaluation they take no more than about their share
    assert (len(evaluations) - 1) * evaluation <= 60 * minutes / 25


def test_a_resumed_time_budget_counts_what_was_spent() -> None:
    clock = Clock()
    one, store = timed(clock, 0.1, 0.5, minutes=0.5)
    one.stop = lambda: "terminated" if clock.now > 1010 else None
    assert one.run() == "terminated"
    clock.take(500)
    state = State.from_json(store.saves[max(store.saves)][2])
    two, later = timed(clock, 0.1, 0.5, state, minutes=0.5)
    before = clock.now
    assert two.run() is None
    assert 30 - 10.7 - 1 <= clock.now - before <= 30 - 10 + 0.5
    assert two.state.seconds <= 30.5
    assert later.lines[0]["seconds"] > 10


def test_long_time_budgets_are_saved_every_minute() -> None:
    clock = Clock()
    one, store = timed(clock, 5.0, 100.0, minutes=20)
    one.run()
    times = [state["seconds"] for _, _, state in store.saves.values()]
    assert max(b - a for a, b in zip([0, *times], times, strict=False)) <= 60 + 5 + 100 + 5


def test_every_figure_of_a_line_and_an_event() -> None:
    clock, events = Clock(), []
    core, store, source = build("wavenet"), Memory(), Rows(2)
    source.asked = lambda: clock.take(0.5)
    losses: list[float] = []
    recipe = Recipe(steps=6, batch_size=2, lr=0.01, log_every=3, eval_every=6, checkpoint_every=6)
    one = trainer(
        core, recipe, store, source=source, clock=clock, on_event=events.append, validate=lambda: clock.take(2) or 1.25
    )
    inner = one.gradients

    def gradients(step: int) -> tuple[float, int, float]:
        found = inner(step)
        losses.append(found[0])
        return found

    one.gradients = gradients
    one.run()
    first, third, sixth = store.lines
    assert (first["step"], third["step"], sixth["step"]) == (1, 3, 6)
    assert (first["tokens"], third["tokens"], sixth["tokens"]) == (15, 45, 90)
    assert third["train_loss"] == pytest.approx((losses[1] + losses[2]) / 30)
    assert sixth["train_loss"] == pytest.approx(sum(losses[3:]) / 45)
    assert third["tokens_per_second"] == pytest.approx(30 / 1.0)
    assert sixth["tokens_per_second"] == pytest.approx(45 / 1.5)  # the evaluation's two seconds are not training
    assert third["seconds"] == pytest.approx(1.5)
    assert sixth["seconds"] == pytest.approx(5.0)
    assert sixth["val_loss"] == 1.25
    assert "val_loss" not in third
    assert third["lr"] == 0.01
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[0].eta_seconds is None
    assert steps[1].step == 2  # shown between lines, twice a second
    assert steps[1].eta_seconds == pytest.approx(0.5 * 4)
    assert steps[-1].flops_per_second == pytest.approx(3 * core.config.flops_per_token() * 30)
    assert [step.fraction for step in steps] == pytest.approx([step.step / 6 for step in steps])
    assert [event.step for event in events if isinstance(event, Saved)] == [6]


def test_better_evaluations_are_saved_and_known_as_best() -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4])
    store, events = Memory(), []
    recipe = Recipe(steps=8, batch_size=2, eval_every=2, checkpoint_every=100)
    one = trainer(build(), recipe, store, validate=lambda: next(losses), on_event=events.append, preview=lambda: "hm")
    one.run()
    assert list(store.saves) == [2, 4, 8]
    assert [store.saves[step][2]["val_loss"] for step in store.saves] == [3.0, 2.0, 2.4]
    assert (one.state.best_step, one.state.best_val_loss) == (4, 2.0)
    assert [event.best for event in events if isinstance(event, Saved)] == [True, True, False]
    assert [event.step for event in events if isinstance(event, Sample)] == [2, 4, 6, 8]


def test_a_validation_loss_that_is_not_finite_is_told_and_never_best() -> None:
    store, events = Memory(), []
    recipe = Recipe(steps=2, batch_size=2, eval_every=1, checkpoint_every=1)
    trainer(build(), recipe, store, validate=lambda: math.nan, on_event=events.append).run()
    assert store.saves[2][2]["val_loss"] is None
    assert store.saves[2][2]["best_step"] is None
    assert any(isinstance(event, Note) for event in events)


def test_a_line_holds_no_value_that_json_lacks() -> None:
    step = Step(1, None, 0.5, 0, 1.0, math.nan, 0.1, 0.0, 0.0, None, None, 0)
    assert metrics_line(step) == {"step": 1, "tokens": 0, "seconds": 1.0, "lr": 0.1, "tokens_per_second": 0.0}


def test_seeds_of_steps_differ() -> None:
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batches_drawn_while_a_gpu_computes_are_those_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is said to be a GPU: the same weights, and each batch is drawn one step ahead."""
    ends, asked = [], []
    for device in (DEVICE, dataclasses.replace(DEVICE, kind="cuda")):
        core = build("wavenet")
        recipe = Recipe(batch_size=2, accumulate=2, steps=3, compile="off", precision="float32")
        one = Trainer(core, recipe, Rows(2), Memory(), device, seed=5)
        drawn: list[int] = []
        monkeypatch.setattr(
            one, "draw", lambda step, one=one, drawn=drawn: drawn.append(step) or Trainer.draw(one, step)
        )
        one.run()
        ends.append(core.state_dict())
        asked.append(drawn)
    assert asked == [[0, 1, 2], [0, 1, 2, 3]]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


class Waits(TorchDispatchMode):
    """Counts the operations whose result a program can only go on with once the device has computed it."""

    NAMES = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "_coalesce", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0].startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_a_gpu_waits_once(optimizer: str) -> None:
    """A CPU that is said to be a GPU: beside the one `tolist` of loss and norm nothing asks for a number, but for the
    targets of each micro-batch, which are counted before they go to the device."""
    values = CORES["gpt"] | {"ngrams": 3, "ngram_dropout": 0.2}
    torch.manual_seed(0)
    core = cores.build("gpt", values)
    recipe = Recipe(batch_size=2, accumulate=2, steps=9, compile="off", optimizer=optimizer, clip=1e-3, momentum=0.9)
    gpu = dataclasses.replace(DEVICE, kind="cuda", precision="float32")
    one = Trainer(core, recipe, Rows(2), Memory(), gpu, seed=5)
    one.optimizer.use(TorchBackend(core, recipe, one.device))
    one.step()
    with Waits() as waits:
        one.step()
    assert waits.count == recipe.accumulate
