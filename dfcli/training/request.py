"""The options of a training. Each is written once, as a field of `Request`: its type, default, help and bounds.

The command line makes its options from these fields, and the Python API takes them as keyword arguments.
Nothing here imports PyTorch, which takes seconds, so that a mistake is reported before that.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dfcli.errors import DfError, UsageError
from dfcli.ingest.request import Request as Preparation
from dfcli.system import processes
from dfcli.system.options import check_device, device_option, flag, option, same_option
from dfcli.system.words import closest
from dfcli.training.presets import PRESETS, preset

SPEECH_COMMANDS = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"

CONDITIONS = ("labels", "mel", "none")

NOT_FETCHED = {  # corpora that `df data get` cannot fetch: their description, and how to get them
    "sc09": (
        "SC09, the ten spoken digits of Speech Commands v0.02",
        f"unpack the folders zero to nine of {SPEECH_COMMANDS} (2.4 GB) into a folder and give that folder: "
        "`--data FOLDER`; other recordings will do too",
    ),
}


@dataclass(frozen=True)
class Request:
    """The options of a training; None where nothing was said. They are checked when it is made: values are in bounds,
    and the preset, the runs and the sources that it names exist, else UsageError.

    With `show`, no run's name is taken, and a preset needs no data. With `resume`, the run has its data and its name.
    """

    kind: str
    data: tuple[str, ...] = option((), "What to learn from; may be repeated. Built-in data by default.", "NAME|PATH")
    codec: str | None = same_option(Preparation, "codec", data=True)
    lines: bool = same_option(Preparation, "lines", data=True)
    separator: str | None = same_option(Preparation, "separator", data=True)
    field: str | None = same_option(Preparation, "field", data=True)
    levels: int | None = same_option(Preparation, "levels", data=True)
    label: str | None = same_option(Preparation, "label", data=True)
    preset: str | None = option(None, "A published model and its protocol. An unknown name lists them.", "NAME")
    name: str | None = option(None, "What to call the run.", "NAME")
    steps: int | None = option(None, "Train for this many steps.", "N", bounds=(1, 10**9), recipe=True)
    minutes: float | None = option(
        None,
        "Train for this long, besides data preparation and the final validation. Default: 5, or the preset's steps.",
        "M", bounds=(0.0, 1e6), recipe=True,
    )  # fmt: skip
    device: str = device_option()
    batch_size: int | None = option(
        None, "Sequences of one micro-batch, over all processes. `--set accumulate=K` makes a step of K micro-batches.",
        "N", bounds=(1, 10**6), recipe=True,
    )  # fmt: skip
    lr: float | None = option(None, "Peak learning rate.", "X", bounds=(0.0, 1e3), recipe=True)
    seed: int | None = option(None, "The same seed gives the same run.", "N", bounds=(0, 2**63 - 1))
    resume: bool = option(False, "Continue the run of --name, or the newest of this KIND. Start one if there is none.")
    init: str | None = option(None, "Start from the weights of another run or a Hugging Face folder.", "RUN|FOLDER")
    condition: str | None = option(
        None, "Extra input of a WaveNet. Default: labels if the data has them.", "labels|mel|none"
    )
    overrides: Mapping[str, str] = option(
        dict, "Change a field of the model or the recipe.", "KEY=VALUE", flags=("--set",)
    )
    log: str | None = option(None, "Also log to TensorBoard or Weights & Biases.", "tensorboard|wandb")
    show: bool = option(False, "Show what would be trained, with reasons, and train nothing.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data or ()))
        object.__setattr__(self, "overrides", dict(self.overrides or {}))
        if processes.rank() == 0:  # of several processes the first one checks, and reports
            self._check_values()
            self._check_conditions()
            self._check_names()

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's fields that options of their own set."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("recipe")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def preparation(self) -> dict[str, Any]:
        """The arguments of `ingest.prepare.prepare` that were given."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("data")}
        return {name: value for name, value in values.items() if value not in (None, False)}

    def _check_values(self) -> None:
        if self.kind not in PRESETS:
            raise UsageError(f"there is no kind of model `{self.kind}`", closest(self.kind, PRESETS))
        check_device(self.device)
        if self.log is not None:
            from dfcli.training.logs import check_log

            check_log(self.log)
        for f in fields(self):
            value, bounds = getattr(self, f.name), f.metadata.get("bounds")
            if value is None or bounds is None:
                continue
            low, high = bounds
            above = isinstance(high, float)
            if not (low < value <= high if above else low <= value <= high):  # NaN compares false
                wanted = f"above {low:g} and at most {high:,.0f}" if above else f"from {low:,} to {high:,}"
                raise UsageError(f"{flag(f)} must be {wanted}, not {value}")
            if f.name in self.overrides:
                raise UsageError(f"{f.name} is given twice: by {flag(f)} {value} and by --set", "give it once")
        weights = preset(self.kind, self.preset).get("start") if self.preset else None
        if weights and self.init is None:
            raise UsageError(
                f"preset `{self.preset}` starts from {weights}",
                "give the Hugging Face folder (config.json, model.safetensors, tokenizer.json) with `--init FOLDER`",
            )
        if self.init and self.codec:
            raise UsageError("`--init` keeps the codec of the weights it starts from", "leave out `--codec`")
        if self.init and self.preset and not weights:
            raise UsageError("--init takes the model of another run, --preset a published one", "give one of them")
        for one, other, why in (
            ("steps", "minutes", "each is a budget"),
            ("show", "resume", "the first trains nothing"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise UsageError(f"`--{one}` and `--{other}` exclude each other: {why}", "give one of them")

    def _check_conditions(self) -> None:
        if self.condition is not None and self.condition not in CONDITIONS:
            raise UsageError(f"there is no condition `{self.condition}`", closest(self.condition, CONDITIONS))
        if self.kind != "wavenet" and (self.condition not in (None, "none") or self.label is not None):
            raise UsageError("--condition and --label are for WaveNets of sound", "leave them out")
        if self.label is not None and self.condition not in (None, "labels"):
            raise UsageError(f"--label and --condition {self.condition} exclude each other", "leave one of them out")
        for name in ("labels", "series", "condition"):
            if name in self.overrides:
                raise UsageError(f"`--set {name}` follows from the data", "give --condition, or --label")

    def _check_names(self) -> None:
        from dfcli.ingest.prepare import check_sources
        from dfcli.runs.huggingface import start
        from dfcli.runs.run import refuse_taken
        from dfcli.system.files import check_name

        if self.name is not None:
            check_name(self.name, "run")
        entry = preset(self.kind, self.preset) if self.preset else {}
        if self.init:
            start(self.init)
        if self.resume:
            return
        check_sources(self.data)
        if not self.show:
            if self.name is not None:
                refuse_taken(self.name, "continue it with `--resume`, or choose another `--name`")
            if not self.data and "corpus" in entry:
                corpus_file(self.preset, entry["corpus"])


def corpus_file(preset: str | None, corpus: str) -> Path:
    """The fetched corpus that a preset was published on, not a dataset that happens to have its name. UsageError that
    says how to get it where it is missing."""
    from dfcli.ingest.download import corpus_path

    if (path := corpus_path(corpus)) is not None:
        return path
    what, how = about_corpus(corpus)
    raise UsageError(f"preset `{preset}` was published on {what}, which is not here", how)


def about_corpus(corpus: str) -> tuple[str, str]:
    """The description of a preset's corpus, and how to get it."""
    other = "give other data with `--data`"
    if source := _source_of(corpus):
        other = f"give the text of your dataset: `--data {shlex.quote(source)}`"
    fetched = f"the corpus `{corpus}`", f"fetch it with `df data get {corpus}`, or {other}"
    return NOT_FETCHED.get(corpus, fetched)


def _source_of(name: str) -> str:
    """The only source of the dataset of that name, where there is one and it is still there; else ""."""
    from dfcli.data.dataset import Dataset, find_dataset

    if find_dataset(name) is None:
        return ""
    with suppress(DfError), Dataset.open(name) as dataset:
        given = [path for group in dataset.info["sources"].get("given", []) for path in group]
        if len(given) == 1 and os.path.exists(given[0]):
            return given[0]
    return ""
