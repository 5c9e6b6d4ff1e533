"""Train a model: from what was asked for to a run on disk and its figures. `df train` is a thin skin over this."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch

from dfcli import cores
from dfcli.data.batches import Batches
from dfcli.data.conditions import Conditions
from dfcli.data.dataset import Dataset, find_dataset, reopen
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.evaluation.sweep import sweep
from dfcli.ingest.download import corpus_path
from dfcli.runs import run as runs
from dfcli.runs.huggingface import start
from dfcli.runs.run import Run
from dfcli.system.device import resolve
from dfcli.system.events import Choice, Note, OnEvent, ignore
from dfcli.system.files import DAMAGED, read_json, same_name, write_json
from dfcli.system.processes import Processes, joined
from dfcli.system.words import size
from dfcli.training import plan as plans
from dfcli.training.events import Finished, Started
from dfcli.training.plan import Plan
from dfcli.training.request import Request
from dfcli.training.saver import Nowhere
from dfcli.training.settings import Recipe, override
from dfcli.training.state import State
from dfcli.training.trainer import Trainer
from dfcli.training.validation import preview_of, validation_of

FINISHED = "finished"  # in place of a state: there is nothing left to train


OLD_TOKENS = 32_768  # that the loss on earlier data is measured over


@dataclass(frozen=True)
class TrainResult:
    """What came of a training. Its fields are the keys of `df train --json`."""

    run: str
    path: str
    preset: str | None
    steps: int  # updates made
    tokens_seen: int  # targets the updates were made on
    train_seconds: float  # from just before the first step, evaluations and checkpoints included
    tokens_per_second: float  # tokens_seen / train_seconds
    val_loss: float | None  # nats a token, of the checkpoint that sample and eval use by default: over the whole
    # validation split of a finished run, over the part of it that the recipe says of one that was stopped
    best_step: int | None  # that checkpoint's step
    parameters: int
    device: str
    seed: int
    skipped: int  # batches left out because their loss or gradient was not finite
    stopped: str | None  # why it ended early: "interrupted", "terminated"; None when it is finished


def plan(
    kind: str,
    data: Sequence[str] = (),
    *,
    preset: str | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    init: str | None = None,
    overrides: dict[str, str] | None = None,
    condition: str | None = None,
    label: str | None = None,
    on_event: OnEvent = ignore,
) -> Plan:
    """What `train` with these arguments would train, and why. Allocates nothing, and prepares no data where the preset
    fixes the vocabulary. Raises as `train` does."""
    request = Request(
        kind,
        tuple(data),
        preset,
        None,
        steps,
        minutes,
        device,
        batch_size,
        lr,
        seed,
        init,
        overrides or {},
        condition,
        label,
    )
    return plans.make(request, show=True, on_event=on_event)


def train(
    kind: str,
    data: Sequence[str] = (),
    *,
    preset: str | None = None,
    name: str | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    resume: bool = False,
    init: str | None = None,
    overrides: dict[str, str] | None = None,
    condition: str | None = None,
    label: str | None = None,
    previews: bool = False,
    on_event: OnEvent = ignore,
    stop: Callable[[], str | None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainResult:
    """Train a "gpt" or a "wavenet" and keep it as a run.

    `data`: names of datasets or corpora, files, folders; none: a built-in corpus, or the preset's. The budget is
    `steps` or `minutes`; else the preset's steps, else 5 minutes. `overrides` are `--set`'s: field of the core's
    config or of the recipe to its value as text. `resume` goes on with the run called `name` (else the newest of
    this kind), starts it where it has no checkpoint, and does nothing where it is finished. `init` starts from the
    best weights of another run. `condition`: "labels" (where the data has them, the default), "mel" (a vocoder) or
    "none"; `label` says how paths give labels: "folder", or a pattern with named groups. `previews` makes short texts
    for Sample events. `stop` is asked before each step: a reason ends the training after a checkpoint, and comes back
    in the result.

    Raises UsageError for what is asked wrongly, before anything is prepared or left behind; DfError for data that
    cannot be prepared, a loss that is not finite, memory or disk that do not suffice; CorruptError for damaged files.
    """
    request = Request(
        kind,
        tuple(data),
        preset,
        name,
        steps,
        minutes,
        device,
        batch_size,
        lr,
        seed,
        init,
        overrides or {},
        condition,
        label,
    )
    with joined() as group:
        session = Session(group, previews, on_event, stop, clock)
        if not group.first:
            return _follow(request, session)
        try:
            return _lead(request, resume, session)
        except DfError as error:
            group.refuse(error)
            raise


def _lead(request: Request, resume: bool, session: Session) -> TrainResult:
    """Train in the first process, which alone prepares data, makes the run and writes to it."""
    on_event = session.on_event
    request.check(resume=resume)
    run = _existing(request, on_event) if resume else None
    if run is not None:
        return _resume(run, request, session)

    made = plans.make(request, on_event=on_event)
    assert made.dataset is not None
    with made.dataset as dataset:
        for choice in made.choices:
            on_event(choice)
        plans.check_shared(made)
        plans.check_fits(made)
        _warn(made, on_event)
        run = Run.create(str(made.name), _info(made, dataset), dataset.codec)
        try:
            with run.lock():
                session.invite(run, None)
                return session.run(run, made, dataset, None)
        finally:
            if not run.steps():  # nothing was reached that could be gone on with
                runs.remove(run.name)


def _follow(request: Request, session: Session) -> TrainResult:
    """Train in another process than the first: on the run that the first one has made or opened."""
    session = replace(session, previews=False)
    name, values = session.group.from_first(None)

    def opened() -> tuple[Run, Plan, Dataset]:
        run = Run.open(name)
        plan = _plan_of(run, request)
        plans.check_fits(plan)
        return run, plan, _dataset_of(run, ignore)

    if values == FINISHED:
        return _finished(Run.open(name), ignore)
    run, plan, dataset = session.group.together(opened)
    with dataset:
        return session.run(run, plan, dataset, State.from_json(values) if values else None)


@dataclass(frozen=True)
class Session:
    """One call of `train`: who takes part, whom to tell, whom to ask, and what time it is."""

    group: Processes
    previews: bool
    on_event: OnEvent
    stop: Callable[[], str | None]
    clock: Callable[[], float]

    def invite(self, run: Run, state: State | None) -> None:
        """Let the other processes take part, once they have found that they can."""
        self.group.from_first([run.name, asdict(state) if state else None])
        self.group.together(lambda: None)

    def run(self, run: Run, plan: Plan, dataset: Dataset, state: State | None) -> TrainResult:
        """Train a run, whose lock the first process holds, from its last checkpoint (`state`) or from the start, and
        close it."""
        device, recipe, group = plan.device, plan.recipe, self.group
        group.connect(device)
        gpus = [device.torch_device] if device.kind == "cuda" else []
        with _memory(plan), device.repeatable(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(plan.seed)
            core = cores.build(plan.core, asdict(plan.config))
            if state is None and plan.init:
                core.load_state_dict(start(plan.init).load("best").model)
            core.to(device.torch_device)
            batches = Batches(
                dataset.splits["train"], batch_size=recipe.batch_size, window=recipe.window, seed=plan.seed,
                packing=recipe.packing, boundary=dataset.boundary, lines=dataset.lines, lead=dataset.lead,
                conditions=Conditions(plan.told, dataset, "train") if plan.told else None,
            )  # fmt: skip
            validation = validation_of(core, dataset, plan, group, self.on_event)
            if validation and self.previews:
                validation = replace(validation, preview=preview_of(core, dataset, device, plan.seed))
            trainer = Trainer(
                core, recipe, batches, run if group.first else Nowhere(run.path), device, seed=plan.seed, state=state,
                validation=validation, on_event=self.on_event, stop=self.stop, clock=self.clock, processes=group,
                start_counts=plan.init is not None,
            )  # fmt: skip
            if state is not None:
                saved = run.load(state.step, optimizer=True)
                core.load_state_dict(saved.model)
                trainer.optimizer.load_state_tensors(saved.optimizer or {})
            group.send(list(core.state_dict().values()))  # the same bits everywhere, whatever processor drew them
            reached = trainer.state
            self.on_event(Started(plan, run.path, reached.step, reached.best_val_loss))
            before = self._old_loss(plan, dataset, core)
            stopped = trainer.run()
            val_loss = reached.best_val_loss
            if stopped is None and validation is not None:
                val_loss = self._close(run, plan, dataset, core, reached)
            if stopped is None and plan.init:
                self._tell_start(run, plan, dataset, core, reached, before)
        if reached.best_step is not None and reached.best_step < reached.step and stopped is None:
            of = f"step {reached.best_step} of {reached.step}"
            self.on_event(Note(f"the validation loss was lowest at {of}: sample and eval use that checkpoint"))
        uniform = math.log(dataset.codec.vocab_size)
        if stopped is None and val_loss is not None and val_loss > 1.02 * uniform:
            text = f"the validation loss is above {uniform:.3f}, that of a uniform guess"
            self.on_event(Note(f"{text}: nothing was learned that holds for other data; a lower `--lr` may help"))
        result = TrainResult(
            run=run.name, path=str(run.path), preset=plan.preset, steps=reached.step, tokens_seen=reached.tokens,
            train_seconds=reached.seconds, tokens_per_second=reached.tokens / max(1e-9, reached.seconds),
            val_loss=val_loss,
            best_step=reached.step if reached.best_step is None else reached.best_step, parameters=plan.parameters,
            device=device.name, seed=plan.seed, skipped=reached.skipped, stopped=stopped,
        )  # fmt: skip
        if stopped is None and group.first:
            write_json(run.path / runs.RESULT, {"format": 1, **asdict(result)})
        self.on_event(Finished(result))
        return result

    def _old_loss(self, plan: Plan, dataset: Dataset, core: cores.Core) -> float | None:
        """The loss on what the weights were trained on before, over about OLD_TOKENS of its validation split; None
        where that is not at hand, or is what they are trained on now."""
        parent = start(plan.init) if plan.init else None
        if not isinstance(parent, Run) or not parent.dataset["name"]:
            return None
        old = reopen(parent.dataset)
        if old is None:
            return None
        with old:
            if old.fingerprint == dataset.fingerprint or "val" not in old.splits:
                return None
            found = sweep(core, old, "val", plan.device, limit=OLD_TOKENS, processes=self.group, on_event=self.on_event)
            return found.mean

    def _tell_start(
        self, run: Run, plan: Plan, dataset: Dataset, core: cores.Core, reached: State, before: float | None
    ) -> None:
        """Tell what training changed, on the new data and on the old."""
        if reached.val_losses and reached.best_val_loss is not None:
            text = f"the validation loss went from {reached.val_losses[0]:.4f} to {reached.best_val_loss:.4f}"
            self.on_event(Note(f"{text}: nothing was better than the start" if reached.best_step == 0 else text))
        if before is not None:
            core.load_state_dict(run.load("best").model)
            after = self._old_loss(plan, dataset, core)
            data = f"the data of run `{plan.init}`"
            self.on_event(Note(f"on {data} the validation loss went from {before:.4f} to {after:.4f}"))

    def _close(self, run: Run, plan: Plan, dataset: Dataset, core: cores.Core, reached: State) -> float | None:
        """The loss of the best checkpoint over the whole validation split."""
        limit = plan.recipe.eval_tokens
        if reached.best_val_loss is not None and (not limit or limit >= dataset.splits["val"].tokens_count):
            return reached.best_val_loss  # measured over the whole split already
        core.load_state_dict(run.load("best").model)
        return sweep(
            core, dataset, "val", plan.device, processes=self.group, conditioning=plan.told, on_event=self.on_event
        ).mean


def _existing(request: Request, on_event: OnEvent) -> Run | None:
    """The run that --resume means: the one of that name, else the newest of the kind; None, which is said, where there
    is none."""
    if request.name is not None:
        if found := same_name(runs.runs_home(), request.name):
            return Run.open(runs.runs_home() / found)
        close = get_close_matches(request.name, [run.name for run in runs.list_runs()], 1)
        other = f" (but a run `{close[0]}`)" if close else ""
        on_event(Note(f"there is no run `{request.name}` to resume{other}: it is started"))
        return None
    there = [run for run in runs.list_runs() if run.kind == request.kind]
    if not there:
        on_event(Note(f"there is no {request.kind} run to resume: one is started"))
        return None
    newest = max(there, key=lambda run: (str(run.info.get("created")), run.name))
    on_event(Choice("run", newest.name, f"the newest {request.kind} run; --name says which one to resume"))
    return newest


def _resume(run: Run, request: Request, session: Session) -> TrainResult:
    if "imported" in run.info:
        hint = f"start a new run from its weights with `--init {run.name}`"
        raise UsageError(f"run `{run.name}` was imported: there is no training to go on with", hint)
    made = _plan_of(run, request)
    if option := changed_option(run, request):
        raise UsageError(
            f"run `{run.name}` was started with another {option}, which would change its result",
            f"leave {option} out, or start a new run from its weights with `--init {run.name}`",
        )
    plans.check_shared(made)
    if (run.path / runs.RESULT).exists():
        session.group.from_first([run.name, FINISHED])
        return _finished(run, session.on_event)
    with run.lock(), _dataset_of(run, session.on_event) as dataset:
        # One that finished while this one waited is not trained again.
        if (run.path / runs.RESULT).exists():
            session.group.from_first([run.name, FINISHED])
            return _finished(run, session.on_event)
        _warn(made, session.on_event)
        state = None
        if not run.steps():
            session.on_event(Note(f"run `{run.name}` has no checkpoint yet: it starts over"))
        else:
            # Loading shows which checkpoint is sound; with the optimiser, since both are needed.
            last = run.load("last", optimizer=True, fallback=True, on_event=session.on_event)
            state = State.from_json(last.state)
            if state.done:  # no save is to come that would tidy up what a death behind the last one left
                run.prune(last.step)
        run.truncate_metrics(state.step if state else -1, session.on_event)
        began, here = run.info.get("device"), made.device.name
        if began != here:
            session.on_event(Note(f"the run began on {began}: on {here} it goes on, but not bit for bit"))
        session.invite(run, state)
        return session.run(run, replace(made, dataset=dataset), dataset, state)


def _finished(run: Run, on_event: OnEvent) -> TrainResult:
    values = read_json(run.path / runs.RESULT)
    kinds = get_type_hints(TrainResult)
    if not all(name in values and isinstance(values[name], kind) for name, kind in kinds.items()):
        raise CorruptError(f"{run.path / runs.RESULT} is damaged: it is not the result of a training", DAMAGED)
    result = TrainResult(**{name: values[name] for name in kinds})
    on_event(Note(f"run `{run.name}` is finished already"))
    return result


def changed_option(run: Run, request: Request) -> str:
    """The option of `request` that differs from what the run was started with, or "" where there is none."""
    info = run.info
    if request.kind != run.kind:
        raise UsageError(f"run `{run.name}` is a {run.kind}, not a {request.kind}")
    for name in ("preset", "seed", "init"):
        wanted = getattr(request, name)
        if name == "init" and wanted is not None and wanted != info[name]:
            wanted = os.path.abspath(wanted)  # as a folder is recorded
        if wanted is not None and wanted != info[name]:
            return f"--{name}"
    if request.condition is not None and request.condition != (run.conditioning.kind if run.conditioning else "none"):
        return "--condition"
    if request.label is not None and request.label != info["dataset"]["protocol"].get("label"):
        return "--label"
    for name, wanted in request.options().items():
        if wanted != info["recipe"].get(name):
            return "--" + name.replace("_", "-")
    tables = (info["core"]["config"], info["recipe"])
    for table, values in zip(tables, override(info["core"]["name"], request.overrides), strict=True):
        for name, wanted in values.items():
            if (list(wanted) if isinstance(wanted, tuple) else wanted) != table.get(name):
                return f"--set {name}"
    data = [identity(source) for source in request.data]
    if data and data not in (run.dataset["sources"], [run.dataset["name"]]):
        return "--data"
    return ""


def identity(source: str) -> str:
    """A source as it stays the same in every folder: names of datasets and corpora as they are, else absolute paths."""
    if source == "-" or find_dataset(source) is not None or corpus_path(source) is not None:
        return source
    return str(Path(source).absolute())


def _info(plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """What run.json says, beside what `Run.create` adds."""
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
            "normalize": dataset.info["options"]["normalize"],
            "sources": [identity(source) for source in plan.data],
            "splits": {name: split.tokens_count for name, split in dataset.splits.items()},
            "protocol": plan.protocol,
        },
        "choices": [asdict(choice) for choice in plan.choices],
        **({"conditioning": plan.told.to_json()} if plan.told else {}),
    }


def _plan_of(run: Run, request: Request) -> Plan:
    """The plan that a run was started with, on the device asked for now."""
    info, data = run.info, run.dataset
    try:
        names, sources = (info["init"], info["preset"]), data["sources"]
        sound = isinstance(info["seed"], int) and isinstance(data["protocol"], dict)
        if not sound or not all(isinstance(name, str) for name in (*filter(None, names), *sources)):
            raise ValueError("its seed, init, preset, sources or protocol are of another kind")
        return Plan(
            kind=run.kind, name=run.name, preset=info["preset"], source="", published="", corpus="",
            core=info["core"]["name"], config=cores.config(info["core"]["name"], info["core"]["config"]),
            recipe=Recipe.from_json(info["recipe"]), seed=info["seed"], device=resolve(request.device),
            data=tuple(data["sources"]), protocol=data["protocol"], codec_name=info["codec"]["name"],
            dataset=None, init=info["init"], choices=(), told=run.conditioning,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{run.path / runs.RUN} does not describe a training: {error}") from None


def _dataset_of(run: Run, on_event: OnEvent) -> Dataset:
    """The dataset that a run is trained on, prepared again where it was removed."""
    record = run.dataset
    if (dataset := reopen(record)) is not None:
        return dataset
    # Else the data give the same codec again, and the same name.
    codec = run.codec if run.info["init"] or run.codec.name == "bpe" else None
    dataset = plans.prepare_for(record["sources"], record["protocol"], codec, on_event)
    if dataset.fingerprint != record["fingerprint"]:
        dataset.close()
        raise DfError(
            f"the data of run `{run.name}` is not what it was: dataset {record['name']} has changed",
            f"restore its sources, or start a new run from its weights with `--init {run.name}`",
        )
    return dataset


def _warn(plan: Plan, on_event: OnEvent) -> None:
    free, _ = plan.device.memory_bytes()
    if plan.memory > free:
        text = f"training takes about {size(plan.memory)} of memory, and {size(free)} are free"
        on_event(Note(f"{text}: {plans.fitting(plan)}"))


@contextmanager
def _memory(plan: Plan) -> Iterator[None]:
    """Say what to lower where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        cpu = ("can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(part in str(error) for part in cpu):
            raise
        message = f"there is not enough memory on {plan.device.name} for this training"
        raise DfError(message, plans.fitting(plan)) from None
