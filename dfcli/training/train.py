"""Train a model: request -> plan -> open run -> fit -> close. `df train` is a thin command over this.

`plan.py` decides what is trained, `trainer.py` has the loop, and `resume.py` finds the run to go on with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from dfcli import cores
from dfcli.data.batches import Batches
from dfcli.data.conditions import Conditions
from dfcli.data.dataset import Dataset
from dfcli.errors import DfError, UsageError
from dfcli.evaluation.sweep import sweep
from dfcli.ingest.reopen import prepared_from, run_dataset
from dfcli.runs import run as runs
from dfcli.runs.checkpoint import Checkpoint
from dfcli.runs.huggingface import start
from dfcli.runs.run import Run
from dfcli.system.device import Device, resolve
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.processes import ALONE, Processes, Pulse, joined
from dfcli.training import memory, resume, sharding
from dfcli.training import plan as plans
from dfcli.training.events import Closing, Finished, Started
from dfcli.training.logs import logged
from dfcli.training.plan import Plan
from dfcli.training.request import Request
from dfcli.training.result import TrainResult, read_result, write_result
from dfcli.training.saver import Nowhere
from dfcli.training.settings import Recipe
from dfcli.training.state import State
from dfcli.training.trainer import Trainer
from dfcli.training.validation import earlier_loss, preview_of, validation_of

MUCH = 1.05  # times the loss of the best checkpoint: from there on the last one differs much


class Stopped(Exception):
    """The closing evaluation was stopped."""


def plan(kind: str | Request, data: Sequence[str] = (), *, on_event: OnEvent = ignore, **options: Any) -> Plan:
    """What `train` with these arguments would train, and why. Allocates nothing, and prepares no data where the preset
    fixes the vocabulary. Raises as `train` does."""
    return plans.make(_request(kind, data, options | {"show": True}), on_event)


def train(
    kind: str | Request,
    data: Sequence[str] = (),
    *,
    previews: bool = False,
    on_event: OnEvent = ignore,
    stop: Callable[[], str | None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> TrainResult:
    """Train a "gpt" or a "wavenet" and keep it as a run.

    `data`: names of datasets or corpora, files, folders; none: a built-in corpus, or the preset's. The other `options`
    are the fields of `training.request.Request`: `preset`, `name`, `steps` or `minutes`, `device`, `batch_size`, `lr`,
    `seed`, `resume`, `init`, `overrides` (`--set`: field of the core's config or of the recipe to its value as text).
    Without a budget the preset's steps are taken, else 5 minutes.

    `resume` goes on with the run called `name` (else the newest of this kind), starts it where it has no checkpoint,
    and does nothing where it is finished. `init` starts from the best weights of another run. `previews` makes short
    texts for Sample events. `stop` is asked before each step: a reason ends the training after a checkpoint, and comes
    back in the result. During the closing evaluation a reason ends the evaluation at once. The run is finished then,
    and the next `resume`, `dfcli.evaluate` or `df runs show` measures the figure.

    Raises UsageError for what is asked wrongly, before anything is prepared or left behind; DfError for data that
    cannot be prepared, a loss that is not finite, memory or disk that do not suffice; CorruptError for damaged files.
    """
    request = _request(kind, data, options)
    calls = Calls(previews, on_event, stop, clock)
    with joined() as group, (_lead if group.first else _follow)(request, group, calls) as work:
        if isinstance(work, TrainResult):  # it was finished before
            return work
        run, made = work
        if group.first:
            calls = calls._replace(on_event=logged(request.log, run, calls.on_event))
        group.connect(made.device)
        with memory.explained(made), group.explained(), made.device.repeatable(), _forked_random_state(made.device):
            trainer = trainer_of(run, made, group, calls)
            calls.on_event(Started(made, run.path, trainer.state.step, trainer.state.best_val_loss))
            before = earlier_loss(made, trainer.core, group, on_event)
            stopped = trainer.run()
            state = trainer.state
            result = _result(run, made, state, stopped)
            del trainer  # and its memory
            if stopped is None:
                result = _close(run, made, result, group, calls)
                if result.closed:
                    _tell_start(run, made, result, before, group, on_event)
        calls.on_event(Finished(result))
        return result


Work = tuple[Run, Plan] | TrainResult  # the run to train and the plan with its dataset, or what was trained before


class Calls(NamedTuple):
    """What a caller of `train` gave to be called back, see there."""

    previews: bool = False
    on_event: OnEvent = ignore
    stop: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.perf_counter


def _request(kind: str | Request, data: Sequence[str], options: dict[str, Any]) -> Request:
    if isinstance(kind, Request):
        return kind
    return Request(kind, tuple(data), **options)


def _lead(request: Request, group: Processes, calls: Calls) -> AbstractContextManager[Work]:
    """The work of the first process, which alone prepares data and writes to the run."""
    try:
        run = resume.existing(request, calls.on_event) if request.resume else None
        made = plans.make(request, calls.on_event) if run is None else resume.plan_of(run, request)
        plans.check_shared(made)
    except DfError as error:
        group.refuse(error)
        raise
    return _created(made, group, calls) if run is None else _reopened(run, made, group, calls)


@contextmanager
def _created(made: Plan, group: Processes, calls: Calls) -> Iterator[Work]:
    """A new run, locked. It is removed again at the end where no checkpoint was written, because there is nothing to
    resume."""
    assert made.dataset is not None
    with made.dataset as dataset:
        for choice in made.choices:
            calls.on_event(choice)
        memory.check_fits(made)
        memory.warn(made, calls.on_event)
        run, made = _create(made, dataset)
        try:
            with run.lock():
                _invite(run, made, group)
                yield run, made
        finally:
            if not run.steps():
                runs.remove(run.name)


@contextmanager
def _reopened(run: Run, made: Plan, group: Processes, calls: Calls) -> Iterator[Work]:
    """A run that was begun before, locked; the result, where it is finished."""
    if run.result is None:
        with run.lock(), run_dataset(run, calls.on_event) as dataset:
            if run.result is None:  # nor has it finished while this process waited
                for choice in made.choices:
                    calls.on_event(choice)
                memory.warn(made, calls.on_event)
                if not run.steps():
                    calls.on_event(Note(f"run `{run.name}` has no checkpoint yet: it starts over"))
                _invite(run, made, group)
                yield run, replace(made, dataset=dataset)
                return
    group.from_first([run.name, 0])
    yield _finished(run, made.device, calls)


def _invite(run: Run, made: Plan, group: Processes) -> None:
    """Let the other processes take part, once they have found that they can."""
    group.from_first([run.name, made.shards])
    group.together(lambda: None)


@contextmanager
def _follow(request: Request, group: Processes, calls: Calls) -> Iterator[Work]:
    """The work of every other process: on the run that the first one has made or opened."""
    name, shards = group.from_first(None)  # 0 shards: it was finished before

    def opened() -> tuple[Run, Plan]:
        run = Run.open(name)
        made = replace(resume.plan_of(run, request), shards=shards)
        memory.check_fits(made)
        return run, replace(made, dataset=run_dataset(run))

    if not shards:
        result = read_result(Run.open(name))
        assert result is not None
        yield result
        return
    run, made = group.together(opened)
    assert made.dataset is not None
    with made.dataset:
        yield run, made


def _create(plan: Plan, dataset: Dataset) -> tuple[Run, Plan]:
    """The plan's run. Where another process has just taken a name that nobody asked for, the next one is taken."""
    while True:
        try:
            return Run.create(str(plan.name), _info(plan, dataset), dataset.codec), plan
        except UsageError:
            if not plan.stem:
                raise
            plan = replace(plan, name=plans.free_name(plan.stem))


def _forked_random_state(device: Device) -> AbstractContextManager[None]:
    """Leave torch's random state after the block as it was before it."""
    return torch.random.fork_rng(devices=[device.torch_device] if device.kind == "cuda" else [])


def trainer_of(run: Run, plan: Plan, group: Processes, calls: Calls) -> Trainer:
    """The trainer of a run: at its last checkpoint, or at the start with fresh weights or those of `plan.init`."""
    device, recipe, dataset = plan.device, plan.recipe, plan.dataset
    assert dataset is not None
    torch.manual_seed(plan.seed)
    core = cores.build(plan.core, asdict(plan.config))
    checkpoint = _checkpoint(run, group, calls.on_event)
    state = State.from_json(checkpoint.state) if checkpoint else State()
    checkpoint = checkpoint or (_start(plan.init, recipe) if plan.init else None)
    if checkpoint:
        core.load_state_dict(checkpoint.model)
    if group.first:
        _rewind(run, plan, state, calls.on_event)
    if plan.shards == 1:
        core.to(device.torch_device)
    group.send(list(core.state_dict().values()))  # the same bits everywhere, whatever processor drew them
    if plan.shards > 1:
        sharding.shard(core, group, device)
    batches = Batches(
        dataset.splits["train"], batch_size=recipe.batch_size, window=recipe.window, seed=plan.seed,
        packing=recipe.packing, boundary=dataset.boundary, lines=dataset.lines, lead=dataset.lead,
        conditions=Conditions(plan.conditioning, dataset, "train") if plan.conditioning else None,
    )  # fmt: skip
    validation = validation_of(core, dataset, plan, group, calls.on_event)
    if validation and calls.previews and group.first and plan.shards == 1:
        validation = replace(validation, preview=preview_of(core, dataset, device, plan.seed))
    trainer = Trainer(
        core, recipe, batches, run if group.first else Nowhere(run.path), device, seed=plan.seed, state=state,
        validation=validation, on_event=calls.on_event, pulse=Pulse(group, calls.clock, calls.stop),
    )  # fmt: skip
    if checkpoint:
        trainer.optimizer.load_state_tensors(checkpoint.optimizer or {})
    return trainer


def _start(init: str, recipe: Recipe) -> Checkpoint:
    """The best weights of a run or a folder. The optimizer's state comes with them where a run with the same optimizer
    has kept it: after 30 steps the loss on new text was 0.01 nats lower, after 150 on the same text 0.002."""
    parent = start(init)
    if isinstance(parent, Run) and parent.info["recipe"].get("optimizer") == recipe.optimizer:
        with suppress(DfError):  # a packed run has none; damaged weights are told below
            return parent.load("best", optimizer=True)
    return parent.load("best")


def _checkpoint(run: Run, group: Processes, on_event: OnEvent) -> Checkpoint | None:
    """The last sound checkpoint of a run, which the first process chooses; None where there is none."""
    chosen = None
    if group.first and run.steps():
        chosen = run.load("last", optimizer=True, fallback=True, on_event=on_event)
    step = group.from_first(chosen.step if chosen else None)
    return chosen if group.first or step is None else run.load(step, optimizer=True)


def _rewind(run: Run, plan: Plan, state: State, on_event: OnEvent) -> None:
    """Bring the folder of a run back to `state`, and say what a resumed run differs in."""
    if state.done:  # no later save will delete checkpoints that a crash left
        run.prune(state.step)
    run.truncate_metrics(state.step or -1, on_event)
    began = run.info.get("device"), run.info.get("precision")
    here = plan.device.name, plan.device.precision
    if state.step and began != here:
        text = f"the run began on {began[0]} in {began[1]}: it goes on on {here[0]} in {here[1]}, but not bit for bit"
        on_event(Note(text))


def _result(run: Run, plan: Plan, state: State, stopped: str | None) -> TrainResult:
    assert plan.dataset is not None
    val, limit = plan.dataset.splits.get("val"), plan.recipe.eval_tokens
    return TrainResult(
        run=run.name, path=str(run.path), preset=plan.preset, steps=state.step, tokens_seen=state.tokens,
        train_seconds=state.seconds, tokens_per_second=state.tokens / max(1e-9, state.seconds),
        val_loss=state.best_val_loss,
        closed=not state.val_losses or not limit or val is None or limit >= val.tokens_count,
        best_step=state.step if state.best_step is None else state.best_step,
        start_val_loss=state.val_losses[0] if plan.init and state.val_losses else None,
        last_val_loss=state.val_loss, overfitting=state.overfits(),
        parameters=plan.parameters, device=plan.device.name, seed=plan.seed, skipped=state.skipped, stopped=stopped,
    )  # fmt: skip


def _finished(run: Run, device: Device, calls: Calls) -> TrainResult:
    """The result of a run that was finished before, with its closing figure if that can be had."""
    calls.on_event(Note(f"run `{run.name}` is finished already"))
    try:
        return finish(run, device, calls.on_event, calls.stop)
    except DfError as error:
        calls.on_event(unmeasured(error))
        result = read_result(run)
        if result is None:
            raise
        return result


def unmeasured(error: DfError) -> Note:
    """Why `finish` could not measure the closing figure."""
    return Note(f"its loss over the whole validation split cannot be measured: {error.message}")


def finish(
    run: Run, device: Device | None = None, on_event: OnEvent = ignore, stop: Callable[[], str | None] = lambda: None
) -> TrainResult:
    """The result of a finished run, with the loss of its best checkpoint over the whole validation split. Where the
    training was stopped before it had measured that, it is measured now and kept, unless `stop` gives a reason to end.
    UsageError where the run is not finished, DfError where its data or checkpoints are gone."""
    result = read_result(run)
    if result is None:
        hint = f"train it further: `df train {run.kind} --name {run.name} --resume`"
        raise UsageError(f"run `{run.name}` is not finished", hint)
    if result.closed:
        return result
    where = device or resolve()
    with run_dataset(run, on_event) as dataset:
        return _measured(run, result, dataset, where, ALONE, Calls(False, on_event, stop))


def _close(run: Run, plan: Plan, result: TrainResult, group: Processes, calls: Calls) -> TrainResult:
    """Keep the result of a training that has just used its budget, complete it, and say what it means."""
    assert plan.dataset is not None
    if group.first:
        write_result(run, result)
    if not result.closed:
        result = _measured(run, result, plan.dataset, plan.device, group, calls)
    if group.first and result.closed:
        run.prune(result.steps)  # the start, if it is not the best
    _tell(result, plan.config.vocab_size, calls.on_event)
    return result


def _measured(
    run: Run, result: TrainResult, dataset: Dataset, device: Device, group: Processes, calls: Calls
) -> TrainResult:
    """The result with the loss of the best checkpoint over the whole validation split; as it was, where the caller asks
    to stop before that is known. Of a run that started from weights, these are the best where nothing is better than
    they are on the whole split."""
    calls.on_event(Closing())

    def watch(event: object) -> None:
        calls.on_event(event)
        if calls.stop():
            raise Stopped

    def loss(step: int) -> float:
        core, _ = run.build(step, device.torch_device)
        return sweep(
            core, dataset, "val", device, processes=group, conditioning=run.conditioning, on_event=watch
        ).mean  # fmt: skip

    best, started = run.resolve("best"), run.info.get("init") is not None and 0 in run.steps()
    try:
        losses = {step: loss(step) for step in ((0, best) if started else (best,))}
    except Stopped:
        group.sums([math.nan, 0.0])  # a process that was not stopped then has no figure either
        return result
    figures = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    if len(figures) < len(losses):
        calls.on_event(Note("the loss over the whole validation split is not finite"))
    best = min(figures, key=figures.__getitem__, default=result.best_step)  # of equals the start
    figure = None if best is None else figures.get(best)
    found = {"best_step": best, "start_val_loss": figures.get(0) if started else None}
    if group.first:
        run.set_closing_loss(figure, **found)
    return replace(result, val_loss=figure, closed=True, **found)


def _tell_start(
    run: Run, plan: Plan, result: TrainResult, before: float | None, group: Processes, on_event: OnEvent
) -> None:
    """Say what training changed in the weights that it started from, on the new data and on the earlier data."""
    if not plan.init:
        return
    if result.start_val_loss is not None:
        text = f"the validation loss went from {result.start_val_loss:.4f} to {result.val_loss:.4f}"
        on_event(Note(f"{text}: nothing was better than the start" if result.best_step == 0 else text))
    if before is not None:
        core, _ = run.build("best", plan.device.torch_device)
        after = earlier_loss(plan, core, group, on_event)
        on_event(Note(f"on the data of run `{plan.init}` the validation loss went from {before:.4f} to {after:.4f}"))


def _tell(result: TrainResult, vocab_size: int, on_event: OnEvent) -> None:
    """Say at the end what the validation losses mean."""
    if result.val_loss is None:
        return
    if result.best_step is not None and result.best_step < result.steps:
        best = f"the validation loss was lowest at step {result.best_step} of {result.steps}"
        last = result.last_val_loss
        if result.overfitting:
            best = f"overfitting: {best}, and rose while the training loss fell"
        elif last is not None and last > MUCH * result.val_loss:
            best += f", and is {last:.4f} now, so the last checkpoint differs much (`--checkpoint last`)"
        on_event(Note(f"{best}: sample and eval use the checkpoint of step {result.best_step}"))
    uniform = math.log(vocab_size)
    if result.val_loss > 1.02 * uniform:
        on_event(Note(
            f"the validation loss is above {uniform:.3f}, the loss of a uniform guess: the model learned nothing that "
            "holds for other data; a lower `--lr` may help"
        ))  # fmt: skip


def _info(plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """The contents of run.json, beside what `Run.create` adds."""
    return {
        "kind": plan.kind,
        "preset": plan.preset,
        "core": {"name": plan.core, "config": asdict(plan.config)},
        "recipe": asdict(plan.recipe),
        "seed": plan.seed,
        "init": plan.init,
        "device": plan.device.name,
        "precision": plan.device.precision,
        "parameters": plan.parameters,
        "dataset": {
            "name": dataset.name,
            "path": str(dataset.path),
            "fingerprint": dataset.fingerprint,
            "boundary": dataset.boundary,
            "lines": dataset.lines,
            "lead": dataset.lead,
            **{name: dataset.info["options"].get(name) for name in ("normalize", "separator", "field")},
            "sources": resume.identities(plan.data),
            "splits": {name: split.tokens_count for name, split in dataset.splits.items()},
            "protocol": plan.protocol,
            "prepared": prepared_from(dataset),
        },
        "choices": [asdict(choice) for choice in plan.choices],
        **({"conditioning": plan.conditioning.to_json()} if plan.conditioning else {}),
    }
