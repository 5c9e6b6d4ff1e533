"""A run on disk: a plain folder with everything that sampling, evaluation and resuming need. It can be copied.

    run.json            what was trained, on what, how: written once
    metrics.jsonl       its history
    step-00000500/      checkpoints, see `checkpoint.py`
    (side files of the codec)

Opening, listing and reading states or metrics does not import torch.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.runs import checkpoint, lock, metrics
from dfcli.runs.checkpoint import Checkpoint
from dfcli.system import files
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.words import closest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dfcli.codecs import Codec
    from dfcli.cores import Core
    from dfcli.data.conditions import Conditioning
    from dfcli.runs.rebuild import Blueprint

FORMAT = 1
RUN, METRICS = "run.json", "metrics.jsonl"
RESULT = "result.json"  # of a training that is finished
KEPT_LAST = 2


def runs_home() -> Path:
    """The folder whose folders are the runs."""
    return files.data_home() / "runs"


@dataclass(frozen=True)
class Run:
    """An existing run. Made by `Run.create` or `Run.open`."""

    name: str
    path: Path
    info: dict[str, Any]
    """What `run.json` holds: format, kind, core {"name", "config"}, codec, recipe, dataset, created, ..."""

    @classmethod
    def create(cls, name: str, info: dict[str, Any], codec: Codec) -> Run:
        """A new run of the data home. Adds format, codec, versions and created to `info`.

        UsageError for a name that is not allowed, or taken (also where it differs only in case).
        """
        files.check_name(name, "run")
        home = runs_home()
        files.clean_debris(home)
        refuse_taken(name)
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        info = {
            "format": FORMAT,
            **info,
            "codec": codec.to_json(),
            "versions": _versions() | info.get("versions", {}),
            "created": created,
        }
        try:
            with files.building(home / name) as folder:
                (folder / RUN).write_bytes(files.json_bytes(info))
                (folder / METRICS).write_bytes(metrics.HEADER)
                codec.save_files(folder)
        except DfError:
            refuse_taken(name)  # by another process, in the meantime
            raise
        return cls.open(home / name)

    @classmethod
    def open(cls, name_or_path: str | Path) -> Run:
        """The run of that name in the data home, else the one in that folder or packed file (`./x` is a path).

        UsageError if there is none, CorruptError if its `run.json` is damaged, DfError if that is of a newer
        format.
        """
        path = _find(name_or_path)
        source = path / RUN
        info = files.read_json(source)
        files.check_format(info, FORMAT, source)
        core = info.get("core")
        sound = isinstance(core, dict) and isinstance(core.get("name"), str) and isinstance(core.get("config"), dict)
        sound = sound and all(isinstance(info.get(key, {}), dict) for key in ("dataset", "recipe"))
        if not sound or not isinstance(info.get("kind"), str) or not isinstance(info.get("codec"), dict):
            raise CorruptError(f"{source} is damaged: it does not describe a run", files.DAMAGED)
        packed = info.get("packed")
        is_file = isinstance(packed, str) and files.NAME.fullmatch(packed) and path.name.startswith(".")
        return cls(str(packed) if is_file else path.name, path, info)

    @property
    def kind(self) -> str:
        """ "gpt" or "wavenet"."""
        return self.info["kind"]

    @property
    def order(self) -> tuple[str, str]:
        """By which runs are sorted: when it was created, then its name."""
        return str(self.info.get("created")), self.name

    @property
    def makes(self) -> str:
        """ "text" or "audio": what its ids stand for."""
        return "audio" if self.info["codec"].get("name") == "mulaw" else "text"

    @property
    def dataset(self) -> dict[str, Any]:
        """What `run.json` says of the data: name, path, fingerprint, boundary, lead, lines, ... CorruptError where that
        is wrong."""
        from dfcli.codecs.boundary import is_boundary

        found = self.info.get("dataset") or {}
        try:
            names = all(isinstance(found[key], str) for key in ("name", "path", "fingerprint", "normalize"))
            begins = is_boundary(found["boundary"], found["lead"], self.codec.vocab_size)
            sound = names and begins and isinstance(found["lines"], bool)
        except (KeyError, TypeError):
            sound = False
        if not sound:
            raise CorruptError(f"{self.path / RUN} is damaged: it does not describe the data of the run", files.DAMAGED)
        return found

    @cached_property
    def codec(self) -> Codec:
        """The codec that its ids belong to."""
        from dfcli.codecs import codec_from_json

        return codec_from_json(self.info["codec"], self.path)

    @cached_property
    def conditioning(self) -> Conditioning | None:
        """What its model is told beside the ids; None for a model without conditions. CorruptError where run.json does
        not describe it, or describes another model's."""
        values, config = self.info.get("conditioning"), self.info["core"]["config"]
        takes = (tuple(config.get("labels", ())), config.get("series", 0))
        found = None
        try:
            if values is not None:
                from dfcli.data.conditions import Conditioning  # imports PyTorch, which takes seconds

                found = Conditioning.from_json(values, self.codec.sample_rate)
            told = ((), 0) if found is None else (found.counts, found.series)
            sound = told == takes
        except (KeyError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise CorruptError(f"{self.path / RUN} is damaged: it does not say what its model is told", files.DAMAGED)
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of this run, or raise DfError naming its holder. Removes debris of a killed trainer."""
        with lock.held(self.path):
            files.clean_debris(self.path)
            yield

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Commit a checkpoint durably and return its folder; then remove those that are no longer needed.

        `model` is the core's state dict, on any device. Kept are this step, the one before it and the best by
        `state["val_loss"]`; a run that went back to an earlier step has given up the later ones. DfError if it
        cannot be written: then the run is as before. ValueError if it could not be loaded again.
        """
        metrics.sync(self.path / METRICS)  # the metrics up to a checkpoint must be durable before it
        kinds = self._core.layout.kinds
        weights = {name: model[name] for name in kinds}
        if any((x.dtype, tuple(x.shape)) != kinds[name] for name, x in weights.items()):
            raise ValueError("the tensors are not those of the core that run.json describes")
        path = checkpoint.save(self.path, step, weights, optimizer, state)
        self.prune(step)
        return path

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return checkpoint.steps(self.path)

    def state(self, step: int) -> dict[str, Any]:
        """The state that the trainer stored with a checkpoint. CorruptError if it is damaged."""
        return checkpoint.read_state(self.path, step)["state"]

    def resolve(self, which: str | int, *, passed_over: Container[int] = ()) -> int:
        """The step of the checkpoint that "best" (as the result says, else the lowest val_loss, else the last), "last"
        or a number means.

        UsageError if `which` is none of these or that step is not there; DfError if there is no checkpoint.
        """
        steps = [step for step in self.steps() if step not in passed_over]
        if which not in ("best", "last"):
            with suppress(ValueError):
                if (step := int(which)) in steps:
                    return step
            there = ", ".join(map(str, steps)) or "none"
            raise UsageError(f"run `{self.name}` has no checkpoint `{which}`", f"there are best, last and: {there}")
        if not steps and passed_over:
            raise CorruptError(f"no checkpoint of run `{self.name}` can be read", files.DAMAGED)
        if not steps:
            hint = f"train it further: `df train {self.kind} --name {self.name} --resume`"
            raise DfError(f"run `{self.name}` has no checkpoint yet", hint)
        if which == "best" and (chosen := self._chosen()) in steps:
            return chosen
        return steps[-1] if which == "last" else min(steps, key=lambda step: (self._val_loss(step), -step))

    def load(
        self, which: str | int = "best", *, optimizer: bool = False, fallback: bool = False, on_event: OnEvent = ignore
    ) -> Checkpoint:
        """Read a checkpoint, verified, into the CPU's memory, also while a trainer adds and removes some.

        A damaged one is a CorruptError that names the file; with `fallback` the next of "best" or "last" is
        taken, and a Note says so. Other errors are those of `resolve`.
        """
        with files.hold(self.path / RUN) or nullcontext():  # nobody removes it before it is in memory
            return self._load(which, optimizer, fallback, on_event)

    def _load(self, which: str | int, optimizer: bool, fallback: bool, on_event: OnEvent) -> Checkpoint:
        damaged = set[int]()
        while True:
            step = self.resolve(which, passed_over=damaged)
            chosen = checkpoint.identity(self.path, step)
            try:
                return checkpoint.load(self.path, step, self._core, optimizer=optimizer)
            except DfError as error:
                if chosen is None or checkpoint.identity(self.path, step) != chosen:
                    continue  # its trainer removed or replaced it meanwhile: choose from what there is now
                if not isinstance(error, CorruptError):
                    raise
                if not fallback or which not in ("best", "last"):
                    others = ", ".join(str(other) for other in self.steps() if other != step)
                    takers = "`--checkpoint` of `df sample`, `df eval` and `df runs pack`"
                    instead = f"{takers} chooses another ({others})" if others else error.hint
                    raise CorruptError(error.message, instead) from error
                damaged.add(step)
                on_event(Note(f"checkpoint {step} is passed over: {error.message}"))

    def build(self, which: str | int = "best", device: torch.device | str = "cpu") -> tuple[Core, Checkpoint]:
        """The core with a checkpoint's weights, on `device`, in evaluation mode. Errors as `load`'s."""
        if self._core.vocab_size != self.codec.vocab_size:
            raise CorruptError(f"{self.path / RUN} is damaged: the codec does not fit the model", files.DAMAGED)
        saved = self.load(which)
        return self._core.build(saved.model).to(device).eval(), saved

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to the history. Readers see it at once."""
        metrics.append(self.path / METRICS, row)

    def metrics(self) -> list[dict[str, Any]]:
        """The history, a row a line. CorruptError if a line is damaged; one cut off by a crash is left out."""
        return metrics.read(self.path / METRICS)

    def truncate_metrics(self, step: int, on_event: OnEvent = ignore) -> None:
        """Drop the history after `step`, atomically. A damaged one is no part of what a training goes on from: it is
        set aside whole, and a Note says so."""
        try:
            metrics.truncate(self.path / METRICS, step)
        except CorruptError as error:
            aside = metrics.set_aside(self.path / METRICS)
            kept = f", and what is there is kept as {aside.name}" if aside else ""
            on_event(Note(f"{error.message}: the history begins anew{kept}"))

    @property
    def result(self) -> dict[str, Any] | None:
        """What `result.json` holds, in the words of `training.result.TrainResult`; None while the training is not
        finished. CorruptError where the file is damaged."""
        path = self.path / RESULT
        return files.read_json(path) if path.exists() else None

    def set_closing_loss(self, val_loss: float | None, **others: Any) -> None:
        """Complete the result of a finished run, whose best checkpoint has this loss over the whole validation split in
        nats a token, None where it is not finite; `others` are more values of the result. Does nothing where the result
        is complete, or the run not finished."""
        result = self.result
        if result is not None and not result.get("closed", True):
            files.write_json(self.path / RESULT, result | {"val_loss": val_loss, "closed": True} | others)

    def size_bytes(self) -> int:
        """Bytes of the run on disk."""
        total = 0
        for place, _, names in os.walk(self.path):
            for name in names:
                with suppress(OSError):  # removed meanwhile
                    total += os.lstat(os.path.join(place, name)).st_size
        return total

    @cached_property
    def _core(self) -> Blueprint:
        from dfcli.runs.rebuild import Blueprint

        return Blueprint(self.info["core"], self.path / RUN)

    def _val_loss(self, step: int) -> float:
        """For ordering. A damaged state comes first, so that its damage is reported and not skipped."""
        try:
            return _number(self.state(step).get("val_loss"))
        except DfError:
            return -math.inf

    def _chosen(self) -> int | None:
        """The best checkpoint as the result says: of weights that training made no better that is the start, whatever a
        part of the validation split said."""
        with suppress(DfError):  # a damaged result chooses nothing
            return (self.result or {}).get("best_step")
        return None

    def prune(self, newest: int) -> None:
        """Remove the checkpoints that `save` no longer needs once the one of step `newest` is there: by itself it does,
        unless the process dies between the two."""
        losses: dict[int, float] = {}
        for step in self.steps():
            with suppress(DfError):  # a damaged one is neither the best nor one to go back to
                if step <= newest:
                    losses[step] = _number(self.state(step).get("val_loss"))
        kept = {
            *sorted(losses)[-KEPT_LAST:],
            min(losses, key=lambda step: (losses[step], -step), default=newest),
            self._chosen(),
        }
        if self.info.get("init") and not (self.path / RESULT).exists():
            kept.add(0)  # the weights it started from are compared with the best at the end
        for step in self.steps():
            if step not in kept:
                with suppress(DfError):  # Windows keeps what a reader has open; the next time will do
                    files.remove_folder(checkpoint.folder(self.path, step))


def refuse_taken(name: str, hint: str = "choose another name") -> None:
    """Raise UsageError where there is a run of that name, also where it differs only in case."""
    if taken := files.same_name(runs_home(), name):
        who = lock.holder(runs_home() / taken)
        free = taken == name and not who
        raise UsageError(
            f"there is a run `{taken}` already" + (f", in use by {who}" if who else ""),
            hint if free else "choose another name",
        )


def list_runs(on_event: OnEvent = ignore) -> list[Run]:
    """The runs of the data home by name. One that cannot be read is left out, and a Note says why."""
    runs = []
    for folder in _folders():
        try:
            runs.append(Run.open(folder))
        except DfError as error:
            on_event(Note(f"run `{folder.name}` is left out: {error.message}"))
    return runs


def newest(makes: str | None = None, on_event: OnEvent = ignore) -> Run:
    """The run created last, among those that have a checkpoint and make "text" or "audio" (None: either). UsageError if
    there is none."""
    runs = [run for run in list_runs(on_event) if makes in (None, run.makes) and run.steps()]
    if not runs:
        what = {None: "run", "text": "run that makes text", "audio": "run that makes sound"}[makes]
        kind = "wavenet" if makes == "audio" else "gpt"
        raise UsageError(f"there is no {what} yet", f"train one first: `df train {kind}`")
    return max(runs, key=lambda run: run.order)


def folder_of(name: str) -> Path:
    """The folder of the run of that name in the data home, be it damaged. UsageError if there is none."""
    folder = runs_home() / files.check_name(name, "run")
    if not folder.is_dir():
        raise _no_run(name)
    return folder


def rename(name: str, new: str) -> None:
    """Give a run of the data home another name. UsageError where there is none or `new` is taken, DfError in use."""
    folder = folder_of(name)
    files.check_name(new, "run")
    if new.casefold() != name.casefold():
        refuse_taken(new)
    with lock.held(folder):
        if os.name != "nt":
            files.rename_folder(folder, new)
            (folder.with_name(new) / lock.OWNER).unlink(missing_ok=True)
    if os.name == "nt":  # there a folder with an open file in it, the lock, cannot be renamed
        files.rename_folder(folder, new)


def remove(name: str) -> None:
    """Remove a run of the data home, be it damaged. UsageError if there is none, DfError while it is in use."""
    folder = folder_of(name)
    in_use = DfError(f"run `{name}` is in use: a checkpoint of it is being read", "wait until that has ended")
    with lock.held(folder), files.alone(folder.glob(RUN), in_use):
        if os.name != "nt":
            files.remove_folder(folder)
    if os.name == "nt":  # there a folder with an open file in it, the lock, cannot be renamed
        files.remove_folder(folder)
    files.clean_debris(folder.parent)


def _find(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and files.NAME.fullmatch(name_or_path):
        folder = runs_home() / name_or_path
        if folder.is_dir():
            return folder
    path = Path(name_or_path).absolute()
    with files.os_errors("read", path):
        if (path / RUN).is_file():
            return path
    if path.suffix == ".zip" and path.is_file():
        from dfcli.runs.unpack import unpack

        return unpack(path)
    raise _no_run(str(name_or_path))


def _no_run(name: str) -> UsageError:
    names = [folder.name for folder in _folders()]
    with suppress(OSError, ValueError):
        if Path(name).is_file():
            return UsageError(f"{name} is a file, not a run", "a run is a name, a folder or a file of `df runs pack`")
    return UsageError(f"there is no run `{name}`", closest(name, names) if names else "train one: `df train gpt`")


def _folders() -> list[Path]:
    home = runs_home()
    if not home.is_dir():
        return []
    with files.os_errors("read", home):
        return sorted(folder for folder in home.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _number(val_loss: object) -> float:
    """A validation loss for ordering; infinite where it was not measured."""
    return float(val_loss) if isinstance(val_loss, int | float) and math.isfinite(val_loss) else math.inf


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("dfcli", "torch"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
