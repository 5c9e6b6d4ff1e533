"""What would be trained: every value resolved, each with its reason, before anything is allocated or left behind.

The order matters: whatever can be refused from the options alone (device, preset, name, values) is refused before data
is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfcli import cores
from dfcli.codecs import Codec, MuLaw
from dfcli.data.conditions import Conditioning, conditioning
from dfcli.data.dataset import Dataset, reopen
from dfcli.errors import DfError, UsageError
from dfcli.ingest.builtin import builtin_sources
from dfcli.ingest.prepare import prepare
from dfcli.runs.export import architecture
from dfcli.runs.huggingface import Folder, start
from dfcli.runs.run import Run, runs_home
from dfcli.system import processes
from dfcli.system.device import Device, resolve
from dfcli.system.events import Choice, OnEvent, ignore
from dfcli.system.files import free_bytes, same_name
from dfcli.system.words import counted, size
from dfcli.training import recipes
from dfcli.training.presets import preset
from dfcli.training.request import Request, corpus_file
from dfcli.training.settings import Recipe, change, override

DROPOUTS = ("dropout", "ngram_dropout")  # of a core's config: what another training may change
EMBEDDING = 16  # channels of the labels' embeddings
SHARE = 0.8  # of the memory that is free: what a training is planned to take


@dataclass(frozen=True)
class Plan:
    """What would be trained, and why. Nothing of it is allocated."""

    kind: str
    name: str | None  # of the run; None where only a look was asked for
    preset: str | None
    source: str  # where a preset's values are from; empty without a preset
    published: str  # the figure to compare with
    corpus: str  # the data it is of; empty where none is named
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
    told: Conditioning | None = None  # the conditions of a WaveNet

    @property
    def dataset_name(self) -> str | None:
        return self.dataset.name if self.dataset else None

    @property
    def parameters(self) -> int:
        return self.config.parameters()

    @property
    def flops_per_token(self) -> int:
        """Of a forward pass; training takes about three times as many."""
        return self.config.flops_per_token()

    @property
    def memory(self) -> int:
        """About how many bytes training takes."""
        return recipes.memory_bytes(self.core, self.config, self.recipe, self.device)

    @property
    def export(self) -> tuple[str | None, str]:
        """The architecture that `df runs export` would write, or None, and what a reader should know of it."""
        try:
            form = architecture(self.core, self.config)
        except UsageError as error:
            return None, f"no: {error.message}" + (f"; {error.hint}" if error.hint else "")
        return form, f"as {form} of transformers: `df runs export`"

    def to_json(self) -> dict[str, Any]:
        """What `df train --show --json` prints."""
        return {
            "run": self.name,
            "kind": self.kind,
            "preset": self.preset,
            "source": self.source or None,
            "published": self.published or None,
            "corpus": self.corpus or None,
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


def make(request: Request, *, show: bool = False, on_event: OnEvent = ignore) -> Plan:
    """Resolve a request. Raises UsageError for what is asked wrongly, DfError for data that cannot be prepared.

    With `show` no data is prepared where the preset fixes the vocabulary, and no name is taken.
    """
    request.check(show=show)
    device = resolve(request.device)
    entry = preset(request.kind, request.preset) if request.preset else {}
    parent = start(request.init) if request.init else None
    core = parent.info["core"]["name"] if parent else entry.get("core", request.kind)
    config_values, recipe_values = override(core, request.overrides)
    recipe_values |= request.options()
    if parent:
        _check_init(request, parent, config_values)
        values = parent.info["core"]["config"]
        if request.preset:
            entry = entry | {"config": values, "vocab_size": values["vocab_size"]}
        else:  # dropout follows from the new data
            values = {name: value for name, value in values.items() if name not in DROPOUTS}
            entry = {"config": values, "recipe": {}, "data": _protocol_of(parent)}
    base = entry.get("config", {}) | config_values
    # Bad values are refused before the data is looked at; what is not known yet stands in for itself.
    _config(core, {"vocab_size": entry.get("vocab_size", 256)} | recipes.completed(core, base, base))
    base_recipe = change(change(Recipe(), entry.get("recipe", {})), recipe_values)

    choices = [Choice("device", device.name, device.reason)]
    if processes.count() > 1:
        choices.append(Choice("processes", str(processes.count()), "each computes its share of a step's sequences"))
    if "steps" not in recipe_values and "minutes" not in recipe_values and not base_recipe.steps:
        recipe_values["minutes"] = recipes.DEFAULT_MINUTES
        choices.append(Choice("minutes", f"{recipes.DEFAULT_MINUTES:g}", "neither --steps nor --minutes was given"))

    protocol = entry.get("data", {}) | ({} if request.label is None else {"label": request.label})
    needed = not (show and not request.data and "vocab_size" in entry)
    data = _sources(request, entry, parent, choices) if needed else ()
    dataset = (
        prepare_for(data, protocol, parent.codec if parent else None, on_event, request.kind, not show)
        if needed
        else None
    )
    vocab_size = dataset.codec.vocab_size if dataset else entry["vocab_size"]
    codec_name = dataset.codec.name if dataset else protocol["codec"]
    told = _told(request, entry, core, parent, dataset, choices)
    base |= _row(told, parent, base)

    if request.preset:
        values = {"vocab_size": vocab_size} | base
        recipe = change(change(Recipe(), entry["recipe"]), recipe_values)
        choices += [Choice("note", request.preset, note) for note in entry.get("notes", ())]
        published = _config(core, {"vocab_size": entry["vocab_size"]} | entry["config"])
        changed = _changed(published, _config(core, values)), _changed(change(Recipe(), entry["recipe"]), recipe)
        if any(changed):
            what = "model" if changed[0] else "recipe"
            choices.append(
                Choice("note", request.preset, f"with {', '.join(changed[0] + changed[1])}: not the published {what}")
            )
    else:
        assert dataset is not None
        pinned = base | recipe_values
        budget = change(Recipe(), recipe_values)
        try:
            draft = recipes.default(
                core, _corpus(dataset), device, budget.steps, budget.minutes, pinned,
                earlier=parent.info["recipe"] if parent else None,
            )  # fmt: skip
        except ValueError as error:  # what is given does not go together
            raise UsageError(str(error)) from None
        values, recipe = draft.config | base | {"vocab_size": vocab_size}, change(Recipe(), draft.recipe)
        choices += draft.choices
    config = _config(core, values)
    recipe = _windowed(core, config, recipe)
    if not request.preset and not {"batch_size", "accumulate"} & recipe_values.keys():
        recipe = _fitted(core, config, recipe, device, choices)
    seed = request.seed if request.seed is not None else entry.get("seed", 0)
    if dataset is not None and "train" not in dataset.splits:
        raise UsageError(f"dataset {dataset.name} has no training split")
    name = None if show else request.name or _free_name(request, data)
    return Plan(
        kind=request.kind, name=name, preset=request.preset, source=entry.get("source", ""),
        published=entry.get("published", ""), corpus=entry.get("corpus", ""), core=core, config=config, recipe=recipe,
        seed=seed, device=device, data=data, protocol=protocol, codec_name=codec_name, dataset=dataset,
        init=_reference(parent) if parent else None, choices=tuple(choices), told=told,
    )  # fmt: skip


def _told(
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
    if kind == "mel" and not isinstance(dataset.codec, MuLaw):
        raise UsageError("--condition mel is for recordings", "leave it out")
    told = conditioning(dataset, kind)
    if told is not None and told.names:
        what = ", ".join(f"{label} ({counted(len(names), 'name')})" for label, names in told.names.items())
        ends = "; a clip ends by itself, since the recordings are short" if told.progress else ""
        choices.append(Choice("condition", "labels", f"{what}{ends}"))
    elif told is not None and told.mel is not None:
        choices.append(Choice("condition", "mel", f"{told.mel.mels} channels, a frame every {told.mel.hop} samples"))
    return told


def _row(told: Conditioning | None, parent: Run | Folder | None, base: dict[str, Any]) -> dict[str, Any]:
    """The fields of the core's config that conditions fix."""
    if told is None or parent is not None:  # a parent's config has them
        return {}
    return {
        "labels": told.counts,
        "condition": (base.get("condition") or EMBEDDING) if told.counts else 0,
        "series": told.series,
    }


def check_fits(plan: Plan) -> None:
    """Raise DfError where training cannot fit into the memory, or its checkpoints onto the disk."""
    _, total = plan.device.memory_bytes()
    if plan.memory > total:
        raise DfError(
            f"training would take about {size(plan.memory)} of memory, and there are {size(total)}", fitting(plan)
        )
    tensors = {"sgd": 1 + bool(plan.recipe.momentum), "adamw": 3, "muon": 3}[plan.recipe.optimizer]
    wanted = 4 * 4 * plan.parameters * tensors  # the best, the last two, and the one being written
    home = runs_home()
    while not home.exists():
        home = home.parent
    if free_bytes(home) < wanted:
        raise DfError(
            f"the checkpoints would take about {size(wanted)}, and {home} has {size(free_bytes(home))} free",
            "free some space, or put DFCLI_HOME on another disk",
        )


def check_shared(plan: Plan) -> None:
    """Raise UsageError where several processes cannot share the batches."""
    count, rows = processes.count(), plan.recipe.batch_size
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


def fitting(plan: Plan) -> str:
    """What to lower so that training fits into the memory that is free now."""
    recipe = plan.recipe
    while recipe.batch_size > 1:
        recipe = _halved(recipe)
        memory = recipes.memory_bytes(plan.core, plan.config, recipe, plan.device)
        if memory < SHARE * plan.device.memory_bytes()[0]:
            rows, parts = recipe.batch_size, recipe.accumulate
            about = "" if rows * parts == plan.recipe.batch_size * plan.recipe.accumulate else "about "
            return f"`--batch-size {rows} --set accumulate={parts}` learns {about}the same in about {size(memory)}"
    return {
        "gpt": "choose a smaller model: lower `--set layers=...` or `--set channels=...`, or `--set context=...`",
        "wavenet": "lower `--set window=...`, or choose a smaller model: `--set residual=...`, `--set skip=...`",
        "charwavenet": "choose a smaller model: lower `--set hidden=...`",
    }[plan.core]


def _fitted(core: str, config: cores.CoreConfig, recipe: Recipe, device: Device, choices: list[Choice]) -> Recipe:
    """The recipe with its batch in 2, 4, ... parts, if the memory that is free now asks for it."""
    whole, free = recipe, device.memory_bytes()[0]
    while recipe.batch_size > 1 and recipes.memory_bytes(core, config, recipe, device) > SHARE * free:
        recipe = _halved(recipe)
    if recipes.memory_bytes(core, config, recipe, device) > SHARE * free:
        return whole  # no batch is small enough
    if recipe is not whole:
        reason = f"parts of a step, {recipe.batch_size} sequences each, as {size(free)} of memory are free"
        choices.append(Choice("accumulate", str(recipe.accumulate), reason))
    return recipe


def _halved(recipe: Recipe) -> Recipe:
    return change(recipe, {"batch_size": -(-recipe.batch_size // 2), "accumulate": 2 * recipe.accumulate})


def _config(core: str, values: dict[str, Any]) -> cores.CoreConfig:
    try:
        return cores.config(core, values)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _changed(published: Any, here: Any) -> list[str]:
    """`name=value` of the fields that differ; where the budget is a time, steps=0 says nothing."""
    before = asdict(published)
    fields = asdict(here).items()
    return [f"{name}={value}" for name, value in fields if value != before[name] and (name, value) != ("steps", 0)]


def _windowed(core: str, config: cores.CoreConfig, recipe: Recipe) -> Recipe:
    """The recipe with its window: the core's context, if nothing else is said."""
    recipe = change(recipe, {"window": recipe.window or config.context})
    if core == "gpt" and recipe.window > config.context:
        raise UsageError(f"window ({recipe.window}) must not be above the context ({config.context})")
    return recipe


def _reference(parent: Run | Folder) -> str:
    """What finds it again: a name in the data home, else a path."""
    return parent.name if parent.path == runs_home() / parent.name else str(parent.path)


def _check_init(request: Request, parent: Run | Folder, config_values: dict[str, Any]) -> None:
    if parent.kind != request.kind:
        raise UsageError(f"run `{parent.name}` is a {parent.kind}, not a {request.kind}")
    for key, value in config_values.items():
        if key not in DROPOUTS and value != parent.info["core"]["config"].get(key):
            raise UsageError(f"--init takes the model of run `{parent.name}` as it is: {key} cannot be changed")
    parent.resolve("best")


def _protocol_of(run: Run | Folder) -> dict[str, Any]:
    return run.dataset.get("protocol", {})


def _sources(
    request: Request, entry: dict[str, Any], parent: Run | Folder | None, choices: list[Choice]
) -> tuple[str, ...]:
    """What is trained on: what was asked for, the preset's corpus, the other run's data, or the built-in corpus."""
    if request.data:
        return request.data
    if parent and (record := parent.dataset)["name"]:
        if (own := reopen(record)) is not None:
            own.close()
            sources, reason = (own.name,), f"the data of run `{parent.name}`"
        else:
            sources = tuple(record["sources"])
            reason = f"the sources of run `{parent.name}` as they are now, because its dataset is gone"
        choices.append(Choice("data", ", ".join(sources), reason))
        return sources
    if corpus := entry.get("corpus"):
        choices.append(Choice("data", corpus, "what the preset was published on"))
        return (str(corpus_file(request.preset, corpus)),)
    if parent:
        raise UsageError(f"`{parent.name}` was trained elsewhere, on data that are not here", "give text with `--data`")
    usual = "mulaw" if request.kind == "wavenet" else "chars"
    kind = "audio" if entry.get("data", {}).get("codec", usual) == "mulaw" else "text"
    what = "the Python standard library's sources" if kind == "text" else "melodies made by this project"
    either = ", and the preset names no corpus" if request.preset else ""
    choices.append(Choice("data", what, f"no --data was given{either}"))
    return tuple(str(path) for path in builtin_sources(kind))


def prepare_for(
    data: Sequence[str],
    protocol: dict[str, Any],
    codec: Codec | None,
    on_event: OnEvent,
    kind: str = "",
    keep: bool = True,
) -> Dataset:
    """The data of a preset's protocol, or in the ids of an earlier run's codec. With `keep` False it does not stay."""
    options: dict[str, Any] = dict(protocol)
    if codec is not None:  # it says these itself
        options = {key: value for key, value in protocol.items() if key not in ("sample_rate", "quantizer")}
        options["codec"] = codec
    sound = "audio" if kind == "wavenet" else None
    return prepare(list(data), **options, kind=sound, keep=keep, on_event=on_event)


def _corpus(dataset: Dataset) -> recipes.Corpus:
    train = dataset.splits.get("train")
    if train is None:
        raise UsageError(f"dataset {dataset.name} has no training split")
    codec = dataset.codec
    unit = "sample" if codec.name == "mulaw" else "id"
    val = dataset.splits["val"].tokens_count if "val" in dataset.splits else 0
    return recipes.Corpus(
        train.tokens_count, train.documents, train.longest, codec.vocab_size, dataset.lines, val, unit
    )


def _free_name(request: Request, data: Sequence[str]) -> str:
    """<kind>-<preset or data>-<number>: the first that is free."""
    stem = request.preset or (Path(data[0]).stem if request.data else request.init or "builtin")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:60].strip("-.") or "data"
    number = 1
    while same_name(runs_home(), f"{request.kind}-{stem}-{number}"):
        number += 1
    return f"{request.kind}-{stem}-{number}"
