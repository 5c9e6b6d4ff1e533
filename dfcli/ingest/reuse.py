"""Prepared datasets that are used again, and those that are kept because a run was trained on them.

The datasets of one name are its versions: NAME, NAME-2, NAME-3 ... A version is replaced only while no run was trained
on it and no process has it open.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dfcli.data.dataset import Busy, Dataset, datasets_folder, list_datasets, open_folder, preparation_lock
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.ingest.build import SOURCES
from dfcli.ingest.sources import Source, list_some
from dfcli.runs.run import list_runs
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.files import alone, reading, same_name

SETTLED = 2 * 10**9  # ns after which a change surely shows in a file's times (FAT counts in 2 s)


def place_for(
    name: str, key: str, groups: list[list[Source]], *, chosen_name: bool, on_event: OnEvent
) -> tuple[Path, Dataset | None]:
    """Where the dataset `name` of these sources is to be written, and the dataset if it is there already.

    UsageError where the name is taken by other sources or options or differs from a taken one only by case, or where
    the user chose the name (`chosen_name`) and a run was trained on its earlier contents.
    """
    root = datasets_folder()
    if (other := same_name(root, name)) not in (None, name):
        raise UsageError(f"{name!r} differs only by case from the dataset {other!r}", "choose another name")
    replaceable: Path | None = None
    for folder in [root / name] * (root / name).exists() if chosen_name else _versions(root, name):
        try:
            dataset = open_folder(folder)
        except CorruptError as error:
            on_event(Note(f"{error.message}: preparing it again"))
            replaceable = folder
            continue
        if dataset.info.get("key") != key:
            dataset.close()
            if not chosen_name:
                continue
            raise UsageError(
                f"there is a dataset {name} of other sources or options already",
                f"choose another name, or `df data remove {name}` first",
            )
        if unchanged(dataset, groups):
            return folder, dataset
        dataset.close()
        if trained := users(dataset):
            if chosen_name:
                raise UsageError(
                    f"the sources of the dataset {name} have changed, and {needed_by(trained)} as it is",
                    "choose another name for the new one",
                )
            on_event(Note(f"the sources of {folder.name} have changed; it is kept, because {needed_by(trained)}"))
        else:
            on_event(Note(f"the sources of {folder.name} have changed: preparing it again"))
            replaceable = folder
    return replaceable or _next_version(root, name), None


def users(dataset: Dataset) -> list[str]:
    """Who needs a dataset as it is: the runs that were trained on it, and a process that has it open. As words."""
    names = [f"run `{name}`" for name in users_of([dataset])[dataset.name]]
    try:
        with alone(sorted(dataset.path.glob("*.tokens")), DfError("in use")):
            return names
    except DfError:
        return names or ["another process"]


def needed_by(names: list[str]) -> str:
    """["run `a`"] -> "run `a` needs it"."""
    return f"{list_some(names)} {'needs' if len(names) == 1 else 'need'} it"


def users_of(datasets: list[Dataset]) -> dict[str, list[str]]:
    """For each dataset's name the runs of the data home that were trained on it."""
    found: dict[str, list[str]] = {dataset.name: [] for dataset in datasets}
    by_fingerprint = {(dataset.name, dataset.fingerprint): dataset.name for dataset in datasets}
    for run in list_runs():
        record = run.info.get("dataset") or {}
        key = str(record.get("name")), str(record.get("fingerprint"))
        if (name := by_fingerprint.get(key)) is not None:
            found[name].append(run.name)
    return found


def unused_datasets(on_event: OnEvent = ignore) -> list[str]:
    """The names of the prepared datasets that no run of the data home was trained on."""
    return [name for name, runs in users_of(list_datasets(on_event)).items() if not runs]


def unchanged(dataset: Dataset, groups: list[list[Source]]) -> bool:
    """Whether the sources are those that the dataset was made from: by what the file system says of them,
    else by their contents. Times are not trusted when the file was read within their resolution."""
    before = recorded(dataset)
    now = [(k, source) for k, group in enumerate(groups) for source in group]
    if [(k, identity) for k, identity, *_ in before] != [(k, source.identity) for k, source in now]:
        return False
    for (_, _, was, read_at, sha256), (_, source) in zip(before, now, strict=True):
        stamp = source.stamp()
        settled = stamp is not None and max(stamp.mtime_ns, stamp.ctime_ns) < read_at - SETTLED
        if settled and stamp is not None and was == list(stamp):
            continue
        try:
            if sha256 is None or source.sha256() != sha256:
                return False
        except DfError:
            return False
    return True


def recorded(dataset: Dataset) -> list[Any]:
    """What each source of a dataset was when it was read: label, identity, stamp, time, SHA-256. Empty where that is
    lost or damaged."""
    try:
        with reading(dataset.path / SOURCES) as file:
            data = file.read()
    except DfError:
        return []
    if hashlib.sha256(data).hexdigest() != dataset.info["sources"]["sha256"]:
        return []
    return [json.loads(line) for line in data.splitlines()]


@contextmanager
def locked(name: str, on_event: OnEvent) -> Iterator[None]:
    """Two preparations of one name: the second waits, and then finds what the first has made."""
    with ExitStack() as stack:
        try:
            stack.enter_context(preparation_lock(name, wait=0))
        except Busy as error:
            on_event(Note(f"{error.message}: waiting"))
            stack.enter_context(preparation_lock(name))
        yield


def _versions(root: Path, name: str) -> list[Path]:
    """The folders of NAME, NAME-2, NAME-3 ... that are there, in this order."""
    numbers = {name: 1}
    if root.is_dir():
        pattern = re.compile(re.escape(name) + r"-([1-9][0-9]{0,8})")
        numbers |= {path.name: int(match[1]) for path in root.iterdir() if (match := pattern.fullmatch(path.name))}
    return [root / entry for entry in sorted(numbers, key=numbers.__getitem__) if (root / entry).exists()]


def _next_version(root: Path, name: str) -> Path:
    number = 1
    while (root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return root / (name if number == 1 else f"{name}-{number}")
