"""Going on with a run: which run is meant, and whether the options are those that it was started with."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

from dfcli import cores
from dfcli.data.dataset import Dataset, find_dataset
from dfcli.errors import CorruptError, UsageError
from dfcli.ingest.download import corpus_path
from dfcli.runs import run as runs
from dfcli.runs.run import Run
from dfcli.system.device import Device, resolve
from dfcli.system.events import Choice, Note, OnEvent
from dfcli.system.files import same_name
from dfcli.system.options import flag
from dfcli.system.words import close
from dfcli.training import memory
from dfcli.training.plan import Plan
from dfcli.training.request import Request
from dfcli.training.settings import Recipe, given_by


def existing(request: Request, on_event: OnEvent) -> Run | None:
    """The run that --resume means: the one of that name, else the newest of the kind. None, with a Note, where there is
    none."""
    return _named(request, on_event) if request.name is not None else _newest(request, on_event)


def _named(request: Request, on_event: OnEvent) -> Run | None:
    assert request.name is not None
    if found := same_name(runs.runs_home(), request.name):
        return Run.open(runs.runs_home() / found)
    meant = close(request.name, [run.name for run in runs.list_runs()])
    other = f" (but a run `{meant}`)" if meant else ""
    on_event(Note(f"there is no run `{request.name}` to resume{other}: it is started"))
    return None


def _newest(request: Request, on_event: OnEvent) -> Run | None:
    there = [run for run in runs.list_runs() if run.kind == request.kind]
    if not there:
        on_event(Note(f"there is no {request.kind} run to resume: one is started"))
        return None
    newest = max(there, key=lambda run: run.order)
    on_event(Choice("run", newest.name, f"the newest {request.kind} run; --name says which one to resume"))
    return newest


def plan_of(run: Run, request: Request) -> Plan:
    """The plan that a run was started with, on the device asked for now. UsageError where another option would change
    its result, CorruptError where run.json describes no training."""
    if request.kind != run.kind:
        hint = f"type `df train {run.kind} --name {run.name} --resume`"
        raise UsageError(f"run `{run.name}` is a {run.kind}, not a {request.kind}", hint)
    if "imported" in run.info:
        hint = f"start a new run from its weights with `--init {run.name}`"
        raise UsageError(f"run `{run.name}` was imported: there is no training to resume", hint)
    plan = _started(run, request.device)
    if option := changed_option(run, plan, request):
        raise UsageError(
            f"run `{run.name}` was started with another {option}, which would change its result",
            f"leave {option} out, or start a new run from its weights with `--init {run.name}`",
        )
    return plan


def _started(run: Run, device: str) -> Plan:
    info, data = run.info, run.dataset
    try:
        names, sources = (info["init"], info["preset"]), data["sources"]
        sound = isinstance(info["seed"], int) and isinstance(data["protocol"], dict)
        if not sound or not all(isinstance(name, str) for name in (*filter(None, names), *sources)):
            raise ValueError("its seed, init, preset, sources or protocol are of another kind")
        plan = Plan(
            kind=run.kind, name=run.name, preset=info["preset"], core=info["core"]["name"],
            config=cores.config(info["core"]["name"], info["core"]["config"]),
            recipe=Recipe.from_json(info["recipe"]), seed=info["seed"], device=_in_its_precision(run, resolve(device)),
            data=tuple(data["sources"]), protocol=data["protocol"], codec_name=info["codec"]["name"],
            dataset=None, init=info["init"], choices=(), conditioning=run.conditioning,
        )  # fmt: skip
        shards, parts = memory.shards(plan.core, plan.config, plan.recipe, plan.device)
        return replace(plan, shards=shards, choices=tuple(parts))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{run.path / runs.RUN} does not describe a training: {error}") from None


def _in_its_precision(run: Run, device: Device) -> Device:
    """A CPU that can do more goes on in float32 with what was begun in it."""
    exact = device.kind == "cpu" and run.info.get("precision") == "float32"
    return replace(device, precision="float32") if exact else device


def changed_option(run: Run, plan: Plan, request: Request) -> str:
    """The option of `request` that differs from what the run was started with, or "" where there is none."""
    for f in fields(Request):
        wanted, holder = getattr(request, f.name), plan.recipe if f.metadata.get("recipe") else plan
        if f.name == "init" and wanted is not None and wanted != plan.init:
            wanted = os.path.abspath(wanted)  # as a folder is recorded
        is_fixed = f.metadata.get("recipe") or f.name in ("preset", "seed", "init")
        if is_fixed and wanted is not None and wanted != getattr(holder, f.name):
            return flag(f)
    if request.condition not in (None, run.conditioning.kind if run.conditioning else "none"):
        return "--condition"
    for name, wanted in request.preparation.items():
        if wanted != plan.protocol.get(name):
            return f"--{name}"
    given = given_by(plan.core, request.overrides, {})
    for holder, values in ((plan.config, given.config), (plan.recipe, given.recipe)):
        for name, wanted in values.items():
            if wanted != getattr(holder, name):
                return f"--set {name}"
    return "--data" if request.data and not _same_data(request.data, run.dataset) else ""


def _same_data(sources: tuple[str, ...], record: dict[str, Any]) -> bool:
    """Whether `sources` are what a run's dataset was prepared from, or a dataset of the same contents."""
    if identities(sources) == identities(record["sources"]):
        return True
    if len(sources) != 1 or (folder := find_dataset(sources[0])) is None:
        return False
    with Dataset.open(folder) as dataset:
        return dataset.fingerprint == record["fingerprint"]


def identities(sources: tuple[str, ...] | list[str]) -> list[str]:
    """Sources as they stay the same in every folder: names of datasets and corpora as they are, else absolute paths
    without links."""
    named = [source == "-" or find_dataset(source) is not None or corpus_path(source) is not None for source in sources]
    return [source if is_name else os.path.realpath(source) for source, is_name in zip(sources, named, strict=True)]
