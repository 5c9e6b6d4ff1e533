"""What a caller of `train` or `plan` asks for, and what can be refused of it at once.

Nothing here imports PyTorch, which takes seconds: a typing error is told before that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfcli.errors import UsageError
from dfcli.ingest.download import corpus_path
from dfcli.ingest.prepare import check_sources
from dfcli.runs.huggingface import start
from dfcli.runs.run import refuse_taken
from dfcli.system.files import check_name
from dfcli.training.presets import PRESETS, preset

SPEECH_COMMANDS = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"

CONDITIONS = ("labels", "mel", "none")

ABROAD = {  # corpora that `df data get` does not fetch: what they are, and what to do
    "sc09": (
        "SC09, the ten spoken digits of Speech Commands v0.02",
        f"unpack the folders zero to nine of {SPEECH_COMMANDS} (2.4 GB) into a folder, and give it: "
        "`--data FOLDER`; other recordings will do too",
    ),
}


@dataclass(frozen=True)
class Request:
    """What was asked for; None where nothing was said."""

    kind: str
    data: tuple[str, ...] = ()
    preset: str | None = None
    name: str | None = None
    steps: int | None = None
    minutes: float | None = None
    device: str = "auto"
    batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    init: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    condition: str | None = None  # one of CONDITIONS; None: labels where the data has them
    label: str | None = None  # how paths say labels, as `prepare` takes it

    def check(self, *, show: bool = False, resume: bool = False) -> None:
        """Raise UsageError for what makes no sense, and for names of nothing: of a preset, a source, a run.

        With `show` no run's name is taken, and a preset needs no data; with `resume` the run has its data and its name.
        """
        self._check_values()
        self._check_conditions()
        entry = preset(self.kind, self.preset) if self.preset else {}
        if self.init:
            start(self.init)
        if resume:
            return
        check_sources(self.data)
        if not show:
            if self.name is not None:
                refuse_taken(self.name)
            if not self.data and "corpus" in entry:
                corpus_file(self.preset, entry["corpus"])

    def _check_conditions(self) -> None:
        if self.condition is not None and self.condition not in CONDITIONS:
            raise UsageError(f"there is no condition `{self.condition}`", f"there are {', '.join(CONDITIONS)}")
        if self.kind != "wavenet" and (self.condition not in (None, "none") or self.label is not None):
            raise UsageError("--condition and --label are for WaveNets of sound", "leave them out")
        if self.label is not None and self.condition not in (None, "labels"):
            raise UsageError(f"--label and --condition {self.condition} exclude each other", "leave one of them out")
        for name in ("labels", "series", "condition"):
            if name in self.overrides:
                raise UsageError(f"`--set {name}` follows from the data", "give --condition, or --label")

    def _check_values(self) -> None:
        if self.kind not in PRESETS:
            raise UsageError(f"there is no kind of model `{self.kind}`", f"there are {', '.join(PRESETS)}")
        if self.steps is not None and self.minutes is not None:
            raise UsageError("--steps and --minutes exclude each other", "give one of them")
        if self.steps is not None and not 1 <= self.steps <= 10**9:
            raise UsageError(f"--steps must be from 1 to 1,000,000,000, not {self.steps}")
        if self.minutes is not None and not 0 < self.minutes <= 10**6:  # false for NaN too
            raise UsageError(f"--minutes must be above 0 and at most 1,000,000, not {self.minutes:g}")
        if self.batch_size is not None and not 1 <= self.batch_size <= 10**6:
            raise UsageError(f"--batch-size must be from 1 to 1,000,000, not {self.batch_size}")
        if self.lr is not None and not 0 < self.lr <= 1000:
            raise UsageError(f"--lr must be above 0 and at most 1,000, not {self.lr:g}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be from 0 to 2^63 - 1, not {self.seed}")
        weights = preset(self.kind, self.preset).get("start") if self.preset else None
        if self.init is not None and self.preset is not None and not weights:
            raise UsageError("--init takes the model of another run, --preset a published one", "give one of them")
        if weights and self.init is None:
            raise UsageError(
                f"preset `{self.preset}` starts from {weights}",
                "give the Hugging Face folder (config.json, model.safetensors, tokenizer.json) with `--init FOLDER`",
            )
        if self.name is not None:
            check_name(self.name, "run")
        for option, value in self.options().items():
            if option in self.overrides:
                raise UsageError(f"{option} is given twice: by its option ({value}) and by --set", "give it once")

    def options(self) -> dict[str, Any]:
        """The recipe's values that were given by options of their own."""
        values = {"steps": self.steps, "minutes": self.minutes, "batch_size": self.batch_size, "lr": self.lr}
        return {key: value for key, value in values.items() if value is not None}


def corpus_file(preset: str | None, corpus: str) -> Path:
    """The corpus that a preset was published on, as fetched: not a dataset that happens to have its name. UsageError,
    saying how to get it, where it is not here."""
    if (path := corpus_path(corpus)) is not None:
        return path
    what, how = about_corpus(corpus)
    raise UsageError(f"preset `{preset}` was published on {what}, which is not here", how)


def about_corpus(corpus: str) -> tuple[str, str]:
    """What a preset's corpus is, and what to do where it is not here."""
    fetched = f"the corpus `{corpus}`", f"fetch it with `df data get {corpus}`, or give other data with `--data`"
    return ABROAD.get(corpus, fetched)
