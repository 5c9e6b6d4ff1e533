"""Conditions: the row of each position is that of the sample it predicts, in every packing and in the sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dfcli.codecs import MuLaw
from dfcli.data import mel
from dfcli.data.batches import IGNORED, Batches
from dfcli.data.conditions import Conditioning, Conditions, Progress, Rows, conditioning
from dfcli.data.dataset import Dataset
from dfcli.errors import DfError
from dfcli.ingest.prepare import prepare

RULE = r"(?P<digit>\d)_(?P<speaker>[a-z]+)"
WIDTH = 16  # ids that say which document they are of, and where


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Dataset]:
    """Recordings of 30 to 330 ms, no two alike."""
    random = np.random.default_rng(0)
    data = tmp_path / "digits"
    data.mkdir()
    for digit in range(3):
        for speaker in ("al", "zoe"):
            for k in range(3):
                samples = 0.3 * random.standard_normal(round(8000 * random.uniform(0.03, 0.33)))
                soundfile.write(data / f"{digit}_{speaker}_{k}.wav", samples, 8000)
    with prepare([str(data)], label=RULE, levels=512) as made:
        yield made


def rows_of(dataset: Dataset, told: Conditioning, ids: np.ndarray, labels: np.ndarray) -> Rows:
    """A document's rows as generation has them."""
    assert isinstance(dataset.codec, MuLaw)
    return told.of_sound(dataset.codec, ids) if told.mel else told.of_labels(labels.tolist(), len(ids))


def places(ids: np.ndarray) -> dict[bytes, int]:
    """Where the last of WIDTH ids stands that stand nowhere else."""
    found: dict[bytes, int] = {}
    for i, window in enumerate(np.lib.stride_tricks.sliding_window_view(ids, WIDTH)):
        found[window.tobytes()] = -1 if window.tobytes() in found else i + WIDTH - 1
    return {window: place for window, place in found.items() if place >= 0}


@pytest.mark.parametrize("kind", ["labels", "mel"])
@pytest.mark.parametrize(("packing", "window"), [("packed", 100), ("packed", 2000), ("documents", 400), ("last", 50)])
@pytest.mark.parametrize("lead", [1, 30])
def test_each_position_is_told_of_the_sample_it_predicts(
    dataset: Dataset, kind: str, packing: str, window: int, lead: int
) -> None:
    told = conditioning(dataset, kind)
    assert told is not None
    part = dataset.splits["train"]
    batches = Batches(
        part, batch_size=4, window=window, seed=3, packing=packing, boundary=dataset.boundary, lead=lead,
        conditions=Conditions(told, dataset, "train"),
    )  # fmt: skip
    documents = [rows_of(dataset, told, part.document(k)[1:], part.labels[k]) for k in range(part.documents)]
    place_of = places(part.read(0, part.tokens_count).astype(np.int64))
    checked = 0
    for step in range(3):
        batch, again = batches.at(step), batches.at(step)
        assert batch.condition is not None
        assert again.condition is not None
        labels, series, index = batch.condition
        assert index.shape == batch.ids.shape
        assert series is not None
        assert torch.equal(series, again.condition[1])  # type: ignore[arg-type]
        for row, column in zip(*np.nonzero(batch.targets.numpy() != IGNORED), strict=True):
            place = place_of.get(batch.ids[row, max(0, column - WIDTH + 1) : column + 1].numpy().tobytes())
            if place is None:
                continue
            k = int(np.searchsorted(part.offsets, place, side="right")) - 1
            of_row = index[row, column]
            rows = documents[k]
            assert rows.series is not None
            sample = place - int(part.offsets[k])
            torch.testing.assert_close(series[of_row], rows.series[sample // told.hop], atol=1e-5, rtol=1e-4)
            assert labels is None or labels[of_row].tolist() == part.labels[k].tolist()
            checked += 1
            if checked % 100 == 0:
                break
    assert checked > 5


def test_a_spectrogram_is_torchaudios(dataset: Dataset) -> None:
    from torchaudio.transforms import MelSpectrogram

    settings = mel.settings(8000)
    samples = (0.1 * np.random.default_rng(1).standard_normal(1234)).astype(np.float32)
    theirs = MelSpectrogram(
        8000, n_fft=512, win_length=400, hop_length=100, f_min=60, f_max=3800, n_mels=40, power=1.0, center=False,
        norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    padded = np.pad(samples, (256 - 50, 512))  # frame 0 is centred on sample 50
    expected = theirs(torch.from_numpy(padded))[:, : settings.of(samples).shape[0]].T.clamp_min(1e-5).log10()
    assert settings.of(samples).shape == (13, 40)
    torch.testing.assert_close(settings.of(samples), expected, atol=1e-4, rtol=1e-4)
    told = conditioning(dataset, "mel")
    assert told is not None
    assert told.mel is not None
    codec, part = dataset.codec, dataset.splits["train"]
    assert isinstance(codec, MuLaw)
    every = torch.cat([told.mel.of(codec.decode(part.document(k)[1:])) for k in range(part.documents)])
    torch.testing.assert_close(every.mean(0), torch.zeros(40), atol=1e-3, rtol=0)
    torch.testing.assert_close(every.std(0, correction=0), torch.ones(40), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [100, 4000, 8000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 384_000])
def test_every_rate_has_a_spectrogram(rate: int) -> None:
    settings = mel.settings(rate)
    frames = settings.of(np.zeros(3 * settings.hop - settings.hop // 2, np.float32))
    assert frames.shape == (3, settings.mels)
    assert bool((frames == -5).all())
    if rate >= 4000:
        assert settings.hop / rate == pytest.approx(0.0125, rel=0.08)


@pytest.mark.parametrize("kind", ["labels", "mel"])
def test_json_rebuilds_what_a_model_is_told(dataset: Dataset, kind: str) -> None:
    told = conditioning(dataset, kind)
    assert told is not None
    values = json.loads(json.dumps(told.to_json()))
    assert Conditioning.from_json(values, 8000) == told
    part = "mel" if kind == "mel" else "progress"
    values[part] = {"hop": 0, "lengths": {}}
    with pytest.raises((ValueError, TypeError)):
        Conditioning.from_json(values, 8000)


def test_lengths_are_those_of_the_same_labels() -> None:
    progress = Progress(80, 8000, {"": [50, 60], "3,0": [10, 20, 30, 40]})
    assert [progress.length((3, 0), chance) for chance in (0.0, 0.26, 0.99)] == [10, 20, 40]
    assert progress.length((1, 1), 0.5) == 60
    series = progress.series(np.arange(10), np.full(10, 800))
    assert series.shape == (10, Progress.CHANNELS)
    assert (np.diff(series[:, 0]) < 0).all()  # the first cosine falls from the start to the end
    assert series[0, 8] > 0.8  # near the start
    assert series[-1, 9] > 0.8  # near the end


def test_clips_of_labels_alone_have_one_row() -> None:
    told = Conditioning({"folder": ["cat", "dog"]}, "folder")
    rows = told.of_labels([1], 12_345)
    assert rows.labels is not None
    assert (rows.labels.tolist(), rows.series, told.hop, told.counts, told.kind) == ([[1]], None, 0, (2,), "labels")


def test_names_are_matched_with_those_of_the_model(dataset: Dataset) -> None:
    told = conditioning(dataset, "labels")
    assert told is not None
    every = np.arange(dataset.splits["train"].documents)[:, None]
    more = replace(told, names={"speaker": ["abe", *told.names["speaker"]]}, progress=None)
    found = Conditions(more, dataset, "train").at(every, every * 0)
    assert found.labels is not None
    assert found.labels[:, 0].tolist() == (dataset.splits["train"].labels[:, 1] + 1).tolist()
    with pytest.raises(DfError, match="not trained on the speaker 'zoe'"):
        Conditions(replace(told, names={"speaker": ["al", "bo"]}), dataset, "train")
    with pytest.raises(DfError, match="the data have no label `mood`"):
        Conditions(replace(told, names={"mood": ["gay"]}), dataset, "train")
