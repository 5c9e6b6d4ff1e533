"""What each clip is told beside its ids, and how long it becomes: labels that are asked for or drawn, a recording's mel
spectrogram, and a course that ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dfcli.codecs import MuLaw
from dfcli.cores import Condition
from dfcli.data.conditions import Conditioning, Rows
from dfcli.generation.audio import Prime
from dfcli.generation.checks import SHOWN
from dfcli.generation.request import SoundRequest
from dfcli.runs.run import Run
from dfcli.system.events import Note, OnEvent
from dfcli.system.words import counted

SECONDS = 4.0  # of a clip that does not end by itself, where the caller does not say

# The condition of the positions from one number up to another, for the clips of a batch.
At = Callable[[int, int], Condition]


@dataclass(frozen=True)
class Plan:
    """How long each clip becomes, in samples; `at(clips, ids of the opening)`: what they are told, None for a model
    without conditions; the name of each label, for each clip."""

    samples: list[int]
    at: Callable[[range, int], At] | None = None
    labels: list[dict[str, str]] | None = None


def planned(run: Run, codec: MuLaw, request: SoundRequest, prime: Prime | None, on_event: OnEvent) -> Plan:
    """The clips of a run as they are requested (see `checks.check_sound`), to continue `prime`. Tells which labels were
    drawn."""
    conditions, limit = run.conditioning, request.limit(codec.sample_rate)
    fixed = limit or round(SECONDS * codec.sample_rate)
    if conditions is None:
        return Plan([fixed] * request.num)
    if conditions.mel is None:
        return _labelled(conditions, request, 0 if prime is None else prime.samples, fixed, on_event)
    assert request.mel is not None
    clip = Prime(request.mel, codec, run.dataset["normalize"], None, "the recording of --mel")
    if clip.rate != codec.sample_rate:
        on_event(Note(f"{request.mel.name} was resampled from {clip.rate:,} to {codec.sample_rate:,} Hz"))
    return _copies(conditions, codec, clip, request.num, limit)


def _copies(conditions: Conditioning, codec: MuLaw, clip: Prime, num: int, limit: int | None) -> Plan:
    """All clips are told the mel spectrogram of one recording, and are as long."""
    rows = conditions.of_sound(codec, clip.newest)
    samples = min(clip.samples, limit or clip.samples)

    def at(clips: range, opening: int) -> At:
        return _positions([rows] * len(clips), conditions.hop, 1 - opening)

    return Plan([samples] * num, at)


def _labelled(conditions: Conditioning, request: SoundRequest, after: int, fixed: int, on_event: OnEvent) -> Plan:
    """Clips with labels. Those of short recordings end by themselves, at a length drawn from the training documents
    with their labels; but not behind a prime of `after` samples. What is drawn depends on (seed, clip) alone."""
    names = conditions.names
    places, lengths = [], []
    for clip in range(request.num):
        *chances, chance = _chances(request.seed, clip, len(names) + 1)
        row = [known.index(request.labels[label]) if label in request.labels else int(drawn * len(known))
               for (label, known), drawn in zip(names.items(), chances, strict=True)]  # fmt: skip
        places.append(row)
        lengths.append(
            after + fixed if after or conditions.progress is None else conditions.progress.length(row, chance)
        )
    chosen = [{label: known[place] for (label, known), place in zip(names.items(), row, strict=True)} for row in places]
    _say_drawn(names, chosen, request.labels, on_event)

    def at(clips: range, opening: int) -> At:
        rows = [conditions.of_labels(places[clip], lengths[clip]) for clip in clips]
        return _positions(rows, conditions.hop, after - opening + 1)

    ends = [length - after for length in lengths]
    limit = fixed if request.seconds is not None else None
    return Plan([min(end, limit or end) for end in ends], at, chosen)


def _positions(rows: list[Rows], hop: int, offset: int) -> At:
    """For clips with these rows, of which position p predicts sample p + offset. What lies before the first row or
    behind the last uses that one."""
    last = np.array([_count(each) - 1 for each in rows])[:, None]

    def at(begin: int, end: int) -> Condition:
        samples = np.maximum(np.arange(begin, end) + offset, 0)
        frames = np.minimum(samples // hop if hop else 0 * samples, last)  # [B, T]
        first, width = frames[:, :1], int((frames[:, -1] - frames[:, 0]).max()) + 1
        taken = torch.from_numpy(np.minimum(first + np.arange(width), last))  # [B, width]
        index = torch.from_numpy(frames - first + width * np.arange(len(rows))[:, None])
        return Condition(_rows([r.labels for r in rows], taken), _rows([r.series for r in rows], taken), index)

    return at


def _count(rows: Rows) -> int:
    return max(len(part) for part in rows if part is not None)


def _rows(parts: list[torch.Tensor | None], taken: torch.Tensor) -> torch.Tensor | None:
    """The rows `taken` [B, width] of each clip, one clip after the other."""
    found = [part[row] for part, row in zip(parts, taken, strict=True) if part is not None]
    return torch.cat(found) if found else None


def _chances(seed: int, clip: int, count: int) -> list[float]:
    """Numbers in [0, 1), from a part of the clip's Philox stream that `sampling.Dice` never reaches."""
    counter = np.array([0, 0, 0, 1], np.uint64)
    philox = np.random.Philox(key=np.array([seed, clip], np.uint64), counter=counter)
    return np.random.Generator(philox).random(count).tolist()


def _say_drawn(
    names: dict[str, list[str]], chosen: list[dict[str, str]], wanted: Mapping[str, str], on_event: OnEvent
) -> None:
    for label, known in names.items():
        if label not in wanted:
            drawn = ", ".join(row[label] for row in chosen[:SHOWN]) + (", ..." if len(chosen) > SHOWN else "")
            of = counted(len(known), "name")
            on_event(Note(f"{label}: {drawn}, drawn from {of}; `--label {label}={known[0]}` chooses one"))
