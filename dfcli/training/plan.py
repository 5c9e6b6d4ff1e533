"""What would be trained: every value with its reason, before anything is allocated or left behind.

A plan comes from a preset, from another run (`--init`), or from the default recipes. Each way refuses what the options
alone make wrong before it prepares data.
"""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dfcli import cores
from dfcli.codecs.tokenizer_json import check_exportable
from dfcli.data.conditions import Conditioning, conditioning
from dfcli.data.dataset import Dataset, reopen
from dfcli.errors import UsageError
from dfcli.ingest.builtin import builtin_sources
from dfcli.ingest.reopen import origin, prepare_for
from dfcli.runs.export import architecture
from dfcli.runs.huggingface import Folder, start
from dfcli.runs.run import Run, runs_home
from dfcli.system import processes
from dfcli.system.device import Device, resolve
from dfcli.system.events import Choice, OnEvent, ignore
from dfcli.system.files import same_name
from dfcli.system.words import counted
from dfcli.training import memory, recipes
from dfcli.training.backend import in_precision
from dfcli.training.presets import preset
from dfcli.training.request import Request, corpus_file
from dfcli.training.settings import Given, Recipe, change, config_of, given_by

DEFAULT_MINUTES = 5.0
EMBEDDING = 16  # channels of the labels' embeddings
DROPOUTS = ("dropout", "ngram_dropout")  # of a core's config: what another training may change


@dataclass(frozen=True)
class Plan:
    """What would be trained, and why. Nothing of it is allocated."""

    kind: str
    name: str | None  # of the run; None where only a look was asked for
    preset: str | None
    core: str
    config: cores.CoreConfig
    recipe: Recipe
    seed: int
    device: Device
    data: tuple[str, ...]  # sources, as `prepare` takes them
    protocol: dict[str, Any]  # how they are prepared: arguments of `prepare`
    codec_name: str
    dataset: Dataset | None  # None where a look at the preset needs no data
    init: str | None
    choices: tuple[Choice, ...]
    conditioning: Conditioning | None = None  # the conditions of a WaveNet
    stem: str | None = None  # of a name that nobody asked for
    shards: int = 1  # parts of the weights, in as many processes; 1: each process has them whole

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", in_precision(self.device, self.config, self.recipe))

    @property
    def entry(self) -> dict[str, Any]:
        """The preset's entry; empty without a preset."""
        return preset(self.kind, self.preset) if self.preset else {}

    @property
    def dataset_name(self) -> str | None:
        return self.dataset.name if self.dataset else None

    @property
    def parameters(self) -> int:
        return self.config.parameters()

    @property
    def sample_rate(self) -> int:
        """Of sound, Hz; 0 for text."""
        return self.dataset.codec.sample_rate if self.dataset else self.protocol.get("sample_rate", 0)

    @property
    def flops_per_token(self) -> int:
        """Of a forward pass; training takes about three times as many."""
        return self.config.flops_per_token()

    @property
    def memory(self) -> int:
        """About how many bytes training takes in each process."""
        return memory.estimate(self.core, self.config, self.recipe, self.device, self.shards)

    @property
    def export(self) -> tuple[str | None, str]:
        """The architecture that `df runs export` would write, or None, and a sentence about it."""
        try:
            form = architecture(self.core, self.config)
            if self.dataset:
                check_exportable(self.dataset.codec)
        except UsageError as error:
            return None, f"no: {error.message}" + (f"; {error.hint}" if error.hint else "")
        return form, f"as {form} of transformers: `df runs export`"

    def to_json(self) -> dict[str, Any]:
        """What `df train --show --json` prints."""
        return {
            "run": self.name,
            "kind": self.kind,
            "preset": self.preset,
            "source": self.entry.get("source"),
            "published": self.entry.get("published"),
            "corpus": self.entry.get("corpus"),
            "steps": self.recipe.steps or None,
            "minutes": self.recipe.minutes or None,
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "context": self.config.context,
            "memory_bytes": self.memory,
            "exportable": self.export[0],
            "device": self.device.name,
            "precision": self.device.precision,
            "seed": self.seed,
            "data": list(self.data),
            "dataset": self.dataset_name,
            "codec": self.codec_name,
            "core": {"name": self.core, "config": asdict(self.config)},
            "recipe": asdict(self.recipe),
            "choices": [asdict(choice) for choice in self.choices],
        }


def make(request: Request, on_event: OnEvent = ignore) -> Plan:
    """The plan for a request. Raises UsageError for what is asked wrongly, DfError for data that cannot be prepared."""
    if request.preset:
        return from_preset(request, on_event)
    if request.init:
        return from_run(request, start(request.init), on_event)
    return from_defaults(request, on_event)


def from_preset(request: Request, on_event: OnEvent) -> Plan:
    """The plan of a published model, changed where the request says so. A look (`request.show`) needs no data."""
    device, choices = _device(request)
    entry = preset(request.kind, str(request.preset))
    core, protocol = entry["core"], entry.get("data", {}) | request.preparation
    values = {"vocab_size": entry["vocab_size"]} | entry["config"]
    given = given_by(core, request.overrides, request.recipe)
    parent = start(request.init) if request.init else None
    if parent:
        _check_model(request, parent, given)
        values = parent.info["core"]["config"]
    published = config_of(core, values), Recipe(**entry["recipe"])
    config, recipe = config_of(core, values | given.config), change(published[1], given.recipe)
    of_model, of_recipe = _changed(published[0], config), _changed(published[1], recipe)
    recipe = _windowed(core, config, recipe)
    data, dataset, codec_name = request.data, None, protocol.get("codec", "")
    if request.data or not request.show:
        data = request.data or _published_data(request, entry, choices)
        dataset = _trainable(
            prepare_for(data, protocol, parent.codec if parent else None, on_event, request.kind, not request.show)
        )
        codec_name = dataset.codec.name
    conditions = _conditioning(request, entry, core, parent, dataset, choices)
    if dataset:
        row = _row(conditions, parent, asdict(config))
        config = config_of(core, asdict(config) | {"vocab_size": dataset.codec.vocab_size} | row)
    notes = [*entry.get("notes", ())]
    if of_model or of_recipe:
        what = "model" if of_model else "recipe"
        notes.append(f"with {', '.join(of_model + of_recipe)}: not the published {what}")
    choices += [Choice("note", str(request.preset), note) for note in notes]
    name, stem = _name(request, data)
    shards, parts = memory.shards(core, config, recipe, device)
    return Plan(
        kind=request.kind, name=name, preset=request.preset, core=core, config=config, recipe=recipe,
        seed=request.seed if request.seed is not None else entry.get("seed", 0), device=device, data=data,
        protocol=protocol, codec_name=codec_name, dataset=dataset, init=_reference(parent) if parent else None,
        choices=(*choices, *parts), conditioning=conditions, stem=stem, shards=shards,
    )  # fmt: skip


def from_run(request: Request, parent: Run | Folder, on_event: OnEvent) -> Plan:
    """The plan that goes on from other weights: in their ids, on their data unless others are given."""
    device, choices = _device(request)
    info = parent.info
    core = info["core"]["name"]
    given = _with_budget(given_by(core, request.overrides, request.recipe), choices)
    _check_model(request, parent, given)
    # Dropout follows from the new data.
    values = {name: value for name, value in info["core"]["config"].items() if name not in DROPOUTS} | given.config
    config = config_of(core, values)
    _windowed(core, config, change(Recipe(), given.recipe))  # refused before data is prepared
    data, protocol = request.data, parent.dataset.get("protocol", {})
    if not data:
        data, protocol = _data_of(parent, choices)
    protocol = protocol | request.preparation
    dataset = _trainable(prepare_for(data, protocol, parent.codec, on_event, request.kind, not request.show))
    conditions = _conditioning(request, {}, core, parent, dataset, choices)
    given = Given(values, given.recipe)
    draft = recipes.going_on(core, config, recipes.corpus_of(dataset), device, given, info["recipe"])
    return _of_draft(request, draft, data, protocol, dataset, choices, conditions, _reference(parent))


def _check_model(request: Request, parent: Run | Folder, given: Given) -> None:
    """Raise UsageError where the weights of `parent` do not fit what is asked for."""
    if parent.kind != request.kind:
        hint = f"type `df train {parent.kind} --init {shlex.quote(str(request.init))}`"
        raise UsageError(f"run `{parent.name}` is a {parent.kind}, not a {request.kind}", hint)
    for key, value in given.config.items():
        if key not in DROPOUTS and value != parent.info["core"]["config"].get(key):
            raise UsageError(f"--init takes the model of run `{parent.name}` as it is: {key} cannot be changed")
    parent.resolve("best")


def _reference(parent: Run | Folder) -> str:
    """What finds the weights again: a name in the data home, else a path."""
    return parent.name if parent.path == runs_home() / parent.name else str(parent.path)


def from_defaults(request: Request, on_event: OnEvent) -> Plan:
    """The plan of a default recipe, chosen for the data, the device and the budget."""
    device, choices = _device(request)
    core = request.kind
    given = _with_budget(given_by(core, request.overrides, request.recipe), choices)
    recipes.check(core, given)  # refused before data is prepared
    data = request.data or _builtin_data("audio" if core == "wavenet" else "text", "no --data was given", choices)
    protocol = request.preparation
    dataset = _trainable(prepare_for(data, protocol, None, on_event, request.kind, not request.show))
    conditions = _conditioning(request, {}, core, None, dataset, choices)
    if core == "gpt" and dataset.kind == "audio":
        reason = "each token is a sample of the sound; `df train wavenet` is made for it"
        choices.append(Choice("note", "a GPT on sound", reason))
    given = Given(given.config | _row(conditions, None, given.config), given.recipe)
    draft = recipes.default(core, recipes.corpus_of(dataset), device, given)
    return _of_draft(request, draft, data, protocol, dataset, choices, conditions, None)


def _conditioning(
    request: Request,
    entry: dict[str, Any],
    core: str,
    parent: Run | Folder | None,
    dataset: Dataset | None,
    choices: list[Choice],
) -> Conditioning | None:
    """The conditions of the model: those of the run it starts from, or what is asked for and the data has."""
    if isinstance(parent, Run):
        if request.condition not in (None, parent.conditioning.kind if parent.conditioning else "none"):
            raise UsageError(f"run {parent.name} has other conditions", "leave out --condition")
        return parent.conditioning
    if dataset is None or core != "wavenet":
        return None
    kind = request.condition or entry.get("condition") or ("labels" if dataset.labels else "none")
    if kind == "labels" and not dataset.labels:
        raise UsageError(f"dataset {dataset.name} has no labels", "give `--label folder`, or `--label PATTERN`")
    if kind == "mel" and dataset.kind != "audio":
        raise UsageError("--condition mel is for recordings", "leave it out")
    conditions = conditioning(dataset, kind)
    if conditions is not None and conditions.names:
        what = ", ".join(f"{label} ({counted(len(names), 'name')})" for label, names in conditions.names.items())
        ends = "; a clip ends by itself, since the recordings are short" if conditions.progress else ""
        choices.append(Choice("condition", "labels", f"{what}{ends}"))
    elif conditions is not None and (mel := conditions.mel) is not None:
        choices.append(Choice("condition", "mel", f"{mel.mels} channels, a frame every {mel.hop} samples"))
    return conditions


def _row(conditions: Conditioning | None, parent: Run | Folder | None, base: dict[str, Any]) -> dict[str, Any]:
    """The fields of the core's config that conditions fix."""
    if conditions is None or parent is not None:  # a parent's config has them
        return {}
    return {
        "labels": conditions.counts,
        "condition": (base.get("condition") or EMBEDDING) if conditions.counts else 0,
        "series": conditions.series,
    }


def _of_draft(
    request: Request, draft: recipes.Draft, data: tuple[str, ...], protocol: dict[str, Any], dataset: Dataset,
    choices: list[Choice], conditions: Conditioning | None, init: str | None,
) -> Plan:  # fmt: skip
    """The plan of a chosen recipe, with its batch in parts where the free memory asks for it."""
    recipe = _windowed(draft.core, draft.config, draft.recipe)
    shards, parts = memory.shards(draft.core, draft.config, recipe, draft.device)
    if not {"batch_size", "accumulate"} & draft.given.recipe.keys():
        recipe, smaller = memory.fitted(draft.core, draft.config, recipe, draft.device, shards)
        parts += smaller
    name, stem = _name(request, data)
    return Plan(
        kind=request.kind, name=name, preset=None, core=draft.core, config=draft.config, recipe=recipe,
        seed=request.seed or 0, device=draft.device, data=data, protocol=protocol, codec_name=dataset.codec.name,
        dataset=dataset, init=init, choices=(*choices, *draft.choices, *parts), conditioning=conditions, stem=stem,
        shards=shards,
    )  # fmt: skip


def _device(request: Request) -> tuple[Device, list[Choice]]:
    device = resolve(request.device)
    choices = [Choice("device", device.name, device.reason)]
    if processes.count() > 1:
        choices.append(Choice("processes", str(processes.count()), "each computes its share of a step's sequences"))
    return device, choices


def _with_budget(given: Given, choices: list[Choice]) -> Given:
    """What is given, with the default budget where no budget is."""
    if {"steps", "minutes"} & given.recipe.keys():
        return given
    choices.append(Choice("minutes", f"{DEFAULT_MINUTES:g}", "neither --steps nor --minutes was given"))
    return Given(given.config, {"minutes": DEFAULT_MINUTES} | given.recipe)


def _windowed(core: str, config: cores.CoreConfig, recipe: Recipe) -> Recipe:
    """The recipe with its window: the core's context, if nothing else is said."""
    recipe = change(recipe, {"window": recipe.window or config.context})
    if core == "gpt" and recipe.window > config.context:
        raise UsageError(f"window ({recipe.window}) must not be above the context ({config.context})")
    return recipe


def _trainable(dataset: Dataset) -> Dataset:
    if "train" not in dataset.splits:
        dataset.close()
        raise UsageError(f"dataset {dataset.name} has no training split")
    return dataset


def _published_data(request: Request, entry: dict[str, Any], choices: list[Choice]) -> tuple[str, ...]:
    """The corpus that a preset was published on, or built-in data where it names none."""
    if corpus := entry.get("corpus"):
        choices.append(Choice("data", corpus, "the preset was published on it"))
        return (str(corpus_file(request.preset, corpus)),)
    kind = "audio" if entry.get("data", {}).get("codec") == "mulaw" else "text"
    return _builtin_data(kind, "no --data was given, and the preset names no corpus", choices)


def _data_of(parent: Run | Folder, choices: list[Choice]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The dataset of another run, or its sources where that is gone, and how they are prepared. UsageError where the
    data are not known."""
    record = parent.dataset
    if not record["name"]:
        raise UsageError(f"`{parent.name}` was trained elsewhere, on data that are not here", "give text with `--data`")
    if (own := reopen(record)) is not None:
        own.close()
        data, protocol, reason = (own.name,), record.get("protocol", {}), f"the data of run `{parent.name}`"
    else:
        sources, protocol = origin(record)
        if not sources:
            raise UsageError(
                f"the dataset {record['name']} of run `{parent.name}` is gone", "give other data with `--data`"
            )
        data, reason = (
            tuple(sources),
            f"the sources of run `{parent.name}` as they are now, because its dataset is gone",
        )
    choices.append(Choice("data", ", ".join(data), reason))
    return data, protocol


def _builtin_data(kind: Literal["text", "audio"], reason: str, choices: list[Choice]) -> tuple[str, ...]:
    what = "the Python standard library's sources" if kind == "text" else "melodies made by this project"
    choices.append(Choice("data", what, reason))
    return tuple(str(path) for path in builtin_sources(kind))


def _changed(published: Any, here: Any) -> list[str]:
    """`name=value` of the fields that differ; where the budget is a time, steps=0 says nothing."""
    before = asdict(published)
    fields = asdict(here).items()
    return [f"{name}={value}" for name, value in fields if value != before[name] and (name, value) != ("steps", 0)]


def _name(request: Request, data: tuple[str, ...]) -> tuple[str | None, str | None]:
    """The run's name, and the stem that it is made from where nobody asked for a name. Neither for a look."""
    if request.show or request.name:
        return None if request.show else request.name, None
    what = request.preset or (Path(data[0]).stem if request.data else request.init or "builtin")
    what = re.sub(r"[^A-Za-z0-9._-]+", "-", what)[:60].strip("-.") or "data"
    stem = f"{request.kind}-{what}"
    return free_name(stem), stem


def check_shared(plan: Plan) -> None:
    """Raise UsageError where several processes cannot share the batches."""
    count, rows = processes.count(), plan.recipe.batch_size
    if count > 1 and plan.device.kind == "mps":
        raise UsageError("PyTorch cannot connect processes on an Apple GPU", "train without torchrun, or on the CPU")
    if count > 1 and plan.core == "charwavenet":
        raise UsageError(
            "the lecture's WaveNet normalises over all rows of a batch, so one process must have them",
            "train it without torchrun",
        )
    if rows % count:
        raise UsageError(
            f"{count} processes cannot share {counted(rows, 'sequence')} equally",
            f"give `--batch-size {-(-rows // count) * count}`, or start another number of processes",
        )


def free_name(stem: str) -> str:
    """The first of stem-1, stem-2, ... that no run has."""
    return next(name for n in itertools.count(1) if not same_name(runs_home(), name := f"{stem}-{n}"))
