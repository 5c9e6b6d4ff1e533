"""What a vocoder is worth: its sound made again from the mel spectrograms of recordings, beside the floors."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfcli.codecs import MuLaw
from dfcli.cores.protocols import Picking
from dfcli.cores.wavenet import Condition
from dfcli.data.conditions import Conditioning
from dfcli.data.dataset import Dataset
from dfcli.errors import DfError, UsageError
from dfcli.evaluation.measures import Distances, distances, floors, mean
from dfcli.generation.engines import choose
from dfcli.generation.sampling import Dice
from dfcli.runs.run import Run
from dfcli.system.device import Device
from dfcli.system.events import OnEvent, Progress, ignore

CLIPS = 8  # spread evenly over the split
SECONDS = 2.0  # of each, from its start


def measured(
    run: Run, core: Any, dataset: Dataset, split: str, device: Device, on_event: OnEvent = ignore
) -> dict[str, Distances]:
    """Distances of resynthesised recordings of a split from the recordings as the codec keeps them, and the floors, by
    name; the model's at temperature 1. Raises UsageError for a run that is no vocoder."""
    codec, conditions = run.codec, run.conditioning
    if conditions is None or conditions.mel is None or not isinstance(codec, MuLaw):
        raise UsageError(
            f"run {run.name} makes no sound from mel spectrograms", "`--measures` is for runs of `--condition mel`"
        )
    part = dataset.splits[split]
    count = min(CLIPS, part.documents)
    longest = round(SECONDS * codec.sample_rate)
    clips = [part.document(i * part.documents // count)[1 : longest + 1] for i in range(count)]
    engine, _ = choose(run.info["core"]["name"], core, 1, device, "auto", on_event)
    made = []
    for i, ids in enumerate(clips):
        on_event(Progress("resynthesis", i, len(clips), "clips"))
        made.append((codec.decode(ids), codec.decode(_resynthesised(engine, run, conditions, codec, ids))))
    on_event(Progress("resynthesis", len(clips), len(clips), "clips"))
    return {"model": mean(distances(*pair) for pair in made), **floors(conditions.mel, codec, clips)}


def _resynthesised(engine: Any, run: Run, conditions: Conditioning, codec: MuLaw, ids: np.ndarray) -> np.ndarray:
    """Ids [n] made from the mel spectrogram of ids [n]."""
    import torch

    lead = np.full((1, run.dataset["lead"]), run.dataset["boundary"], np.int64)
    series = conditions.of_sound(codec, ids).series
    assert series is not None
    # The last boundary predicts sample 0, and id j predicts sample j + 1.
    rows = np.minimum(np.arange(1, len(ids) + 1) // conditions.hop, len(series) - 1)
    engine.start(1)
    engine.prefill(lead, Condition(None, series, torch.zeros(lead.shape, dtype=torch.int64)))
    made = engine.generate(
        Dice(0, [0]).draw(len(ids)), Picking(), Condition(None, series, torch.from_numpy(rows[None]))
    )
    if not engine.finite():
        raise DfError(f"the output of run {run.name} is not finite", "try an earlier `--checkpoint`")
    return made[0]
