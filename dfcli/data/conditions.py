"""What a model is told beside the ids: labels, where in its recording a sample is, or a mel spectrogram.

`Conditioning` says what that is and how it is made. It is written into run.json, so that a run samples and evaluates
without its dataset. Conditions come as rows: one row a document for labels alone, else one row for each `hop` samples.
The row of a position is about the sample that the position predicts: sample s of a document has row s // hop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfcli.codecs import MuLaw
from dfcli.cores.wavenet import Condition
from dfcli.data import mel
from dfcli.data.dataset import Dataset, Split, checked_labels
from dfcli.data.mel import Mel
from dfcli.errors import DfError
from dfcli.system.words import closest

PROGRESS_RATE = 100  # rows a second
PROGRESS_SECONDS = 10.0  # a longer document says too much for its progress to help
LENGTHS = 20  # kept of each combination of labels
COMBINATIONS = 1000  # more are not told apart by length


class Rows(NamedTuple):
    """A document's rows: `labels` int64 [F, labels] or None, `series` float32 [F, channels] or None."""

    labels: Tensor | None
    series: Tensor | None


@dataclass(frozen=True)
class Progress:
    """Where in its document a sample is, as a smooth series. `lengths`: the training documents' lengths in samples, at
    most LENGTHS evenly spaced ones for each combination of labels ("3,0"), and for all together ("")."""

    hop: int
    rate: int
    lengths: dict[str, list[int]]

    WAVES = 8
    CHANNELS = WAVES + 3

    def series(self, frames: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Rows `frames` [F] of documents of `samples` [F]: float32 [F, CHANNELS]. A cosine series of the share that is
        over, how near the start and the end are, and the length."""
        seconds = samples / self.rate
        past = np.minimum((frames + 0.5) * self.hop / self.rate, seconds)
        waves = np.cos(np.pi * (past / seconds)[:, None] * np.arange(1, self.WAVES + 1))
        ends = np.exp(-np.stack([past, seconds - past], axis=1) / 0.03)
        return np.concatenate([waves, ends, np.log2(seconds)[:, None]], axis=1).astype(np.float32)

    def length(self, labels: Sequence[int], chance: float) -> int:
        """The length in samples of a document with these labels, drawn by `chance` from [0, 1)."""
        found = self.lengths.get(_key(labels)) or self.lengths[""]
        return found[int(chance * len(found))]


@dataclass(frozen=True)
class Conditioning:
    """What a run's model is told. `names`: the sorted names of each label, empty without labels; `rule`: how a path
    says them (`ingest.labels`)."""

    names: dict[str, list[str]]
    rule: str | None = None
    progress: Progress | None = None
    mel: Mel | None = None

    @property
    def kind(self) -> str:
        return "mel" if self.mel else "labels" if self.names else "none"

    @property
    def counts(self) -> tuple[int, ...]:
        """How many names each label has: `WaveNetConfig.labels`."""
        return tuple(len(names) for names in self.names.values())

    @property
    def series(self) -> int:
        """Channels of the series: `WaveNetConfig.series`."""
        return self.mel.mels if self.mel else Progress.CHANNELS if self.progress else 0

    @property
    def hop(self) -> int:
        """Samples a row; 0 where a document has one row."""
        return self.mel.hop if self.mel else self.progress.hop if self.progress else 0

    def of_labels(self, labels: Sequence[int], samples: int) -> Rows:
        """The rows of a clip of `samples` with these labels (places among the names)."""
        count = -(-samples // self.hop) if self.hop else 1
        rows = torch.tensor([list(labels)] * count)
        if self.progress is None:
            return Rows(rows, None)
        series = self.progress.series(np.arange(count), np.full(count, samples))
        return Rows(rows, torch.from_numpy(series))

    def of_sound(self, codec: MuLaw, ids: np.ndarray) -> Rows:
        """The rows of a clip that shall sound like the one with these ids [n]: of its mel spectrogram."""
        assert self.mel is not None
        return Rows(None, self.mel.of(codec.decode(ids)))

    def to_json(self) -> dict[str, Any]:
        progress = self.progress and {"hop": self.progress.hop, "lengths": self.progress.lengths}
        return {"labels": self.names, "rule": self.rule, "progress": progress, "mel": self.mel and self.mel.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any], rate: int) -> Conditioning:
        """What `to_json` gave. Raises ValueError, TypeError or KeyError where that is damaged."""
        progress = None
        if values["progress"] is not None:
            hop, lengths = values["progress"]["hop"], values["progress"]["lengths"]
            sound = type(hop) is int and hop > 0 and "" in lengths
            if not sound or not all(type(n) is int and n > 0 for some in lengths.values() for n in some):
                raise ValueError("the documents' lengths cannot be")
            progress = Progress(hop, rate, lengths)
        rule = values["rule"]
        if not isinstance(rule, str | None):
            raise ValueError("the rule of labels is no text")
        return cls(checked_labels(values["labels"]), rule, progress, Mel(**values["mel"]) if values["mel"] else None)


class Conditions:
    """The conditions of a split's documents, made when they are asked for: memory does not grow with the split."""

    def __init__(self, conditioning: Conditioning, dataset: Dataset, split: str) -> None:
        """Raises DfError where the split has labels that the model was not trained on, or lacks some."""
        self._conditioning, self._split = conditioning, dataset.splits[split]
        self._codec = dataset.codec
        self._labels = torch.from_numpy(_numbered(conditioning, dataset, split)) if conditioning.names else None

    def at(self, documents: np.ndarray, samples: np.ndarray) -> Condition:
        """The condition of positions int64 [B, T] that predict these samples of these documents."""
        frames = np.maximum(samples, 0) // self._conditioning.hop if self._conditioning.hop else np.zeros_like(samples)
        documents, frames = np.broadcast_arrays(documents, frames)
        k, f = documents.ravel(), frames.ravel()
        begins = np.ones(len(k), bool)
        begins[1:] = (np.diff(k) != 0) | (np.diff(f) != 0)
        index = (np.cumsum(begins) - 1).reshape(frames.shape)
        k, f = k[begins], f[begins]
        return Condition(
            None if self._labels is None else self._labels[torch.from_numpy(k)],
            self._series(k, f),
            torch.from_numpy(index),
        )

    def _series(self, documents: np.ndarray, frames: np.ndarray) -> Tensor | None:
        c = self._conditioning
        if c.mel is not None:
            return c.mel.frames(segments(self._split, self._codec, c.mel, documents, frames))
        if c.progress is not None:
            offsets = self._split.offsets
            return torch.from_numpy(c.progress.series(frames, offsets[documents + 1] - offsets[documents] - 1))
        return None


def conditioning(dataset: Dataset, kind: str) -> Conditioning | None:
    """What a model that is trained on a dataset is told; `kind` is "none", "labels" or "mel". None for "none".
    Reads the training split for its statistics."""
    if kind == "mel":
        return Conditioning({}, mel=measured(dataset))
    if kind == "labels":
        return Conditioning(dataset.labels, dataset.info["options"]["label"], _progress(dataset))
    return None


def _numbered(conditioning: Conditioning, dataset: Dataset, split: str) -> np.ndarray:
    """The split's labels as places among the model's names, int64 [documents, labels]."""
    rows = dataset.splits[split].labels
    columns = []
    for label, names in conditioning.names.items():
        if label not in dataset.labels:
            raise DfError(
                f"the data have no label `{label}`, which the model needs", "give recordings that are named as its own"
            )
        numbers, own = {name: number for number, name in enumerate(names)}, dataset.labels[label]
        column = rows[:, list(dataset.labels).index(label)]
        unknown = [own[k] for k in np.unique(column) if own[k] not in numbers]
        if unknown:
            raise DfError(f"the model was not trained on the {label} {unknown[0]!r}", closest(unknown[0], names))
        columns.append(np.array([numbers.get(name, -1) for name in own])[column])
    return np.stack(columns, axis=1).astype(np.int64)


def segments(split: Split, codec: Any, settings: Mel, documents: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """What the windows of these frames [F] of these documents [F] see: float32 [F, fft]."""
    first = split.offsets[documents][:, None] + 1  # behind the boundary
    behind = split.offsets[documents + 1][:, None]
    stored = first + settings.places(frames)
    inside = (stored >= first) & (stored < behind)
    ids = split.take(np.clip(stored, first, behind - 1))
    return np.where(inside, codec.decode(ids.ravel()).reshape(ids.shape), np.float32(0))


def measured(dataset: Dataset) -> Mel:
    """The spectrogram for a dataset's rate, with the statistics of its training split: of all frames, or of
    STATISTICS_FRAMES spread evenly."""
    codec, split = dataset.codec, dataset.splits["train"]
    assert isinstance(codec, MuLaw)
    found = mel.settings(codec.sample_rate)
    counts = -(-(np.diff(split.offsets) - 1) // found.hop)
    ends = np.cumsum(counts)
    total = int(ends[-1])
    wanted = min(total, mel.STATISTICS_FRAMES)
    chosen = np.arange(wanted) * total // wanted
    sums = np.zeros((2, found.mels))
    for start in range(0, len(chosen), mel.FRAMES_AT_ONCE):
        numbers = chosen[start : start + mel.FRAMES_AT_ONCE]
        documents = np.searchsorted(ends, numbers, side="right")
        frames = numbers - (ends - counts)[documents]
        values = found.frames(segments(split, codec, found, documents, frames)).double().numpy()
        sums += values.sum(0), np.square(values).sum(0)
    mean, square = sums / len(chosen)
    deviation = np.sqrt(np.maximum(square - mean**2, 1e-4))  # a channel that never moves is not blown up
    return replace(found, mean=tuple(mean.round(6).tolist()), deviation=tuple(deviation.round(6).tolist()))


def _progress(dataset: Dataset) -> Progress | None:
    """For datasets of short documents: else there is none."""
    codec, split = dataset.codec, dataset.splits["train"]
    assert isinstance(codec, MuLaw)
    if split.longest > PROGRESS_SECONDS * codec.sample_rate or split.documents < 2:
        return None
    samples = np.diff(split.offsets) - 1
    combinations, groups = np.unique(split.labels, axis=0, return_inverse=True)
    lengths = {"": _spread(samples)}
    if len(combinations) <= COMBINATIONS:
        for k, labels in enumerate(combinations.tolist()):
            lengths[_key(labels)] = _spread(samples[groups.ravel() == k])
    return Progress(max(1, codec.sample_rate // PROGRESS_RATE), codec.sample_rate, lengths)


def _spread(lengths: np.ndarray) -> list[int]:
    """At most LENGTHS of these, evenly spaced in their order."""
    ordered = np.sort(lengths)
    count = min(LENGTHS, len(ordered))
    return [int(ordered[(2 * i + 1) * len(ordered) // (2 * count)]) for i in range(count)]


def _key(labels: Sequence[int]) -> str:
    return ",".join(map(str, labels))
