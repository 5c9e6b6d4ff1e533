"""Spectral distances, by sounds whose distance is known, and their floors."""

from __future__ import annotations

import numpy as np
import pytest

from dfcli.codecs import MuLaw
from dfcli.data import mel
from dfcli.evaluation.measures import distances, floors, griffin_lim

NOISE = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)


def test_a_gain_is_its_decibels_away() -> None:
    found = distances(NOISE, NOISE / 2)
    assert found.log_spectral == pytest.approx(20 * np.log10(2), abs=1e-3)
    # A spectral convergence of a half, and a distance of ln 2 between the logarithms
    assert found.multi_resolution == pytest.approx(0.5 + np.log(2), abs=1e-3)
    assert distances(NOISE, NOISE) == (0, 0)


def test_floors_are_in_order() -> None:
    time = np.arange(8000) / 8000
    tones = [
        (0.3 * np.sin(2 * np.pi * f * (1 + 0.2 * time) * time) * np.exp(-3 * time)).astype(np.float32)
        for f in (220, 330, 440)
    ]
    codec = MuLaw(8000)
    found = floors(mel.settings(8000), codec, [codec.encode(tone) for tone in tones])
    order = ["mu-law round trip", "Griffin-Lim", "another recording"]
    assert list(found) == order
    levels = [found[name].multi_resolution for name in order]
    assert levels == sorted(levels)


def test_griffin_lim_makes_the_same_mel_spectrogram_in_place() -> None:
    settings = mel.settings(8000)
    burst = NOISE * (np.abs(np.arange(8000) - 3000) < 800)
    made = griffin_lim(settings, burst.astype(np.float32))
    assert len(made) == len(burst)
    apart = (settings.of(made.astype(np.float32)) - settings.of(burst.astype(np.float32))).abs()
    assert apart[25:35].mean() < 0.1  # log10, in the midst of the burst
    later = (settings.of(np.roll(made, 200).astype(np.float32)) - settings.of(burst.astype(np.float32))).abs()
    assert later.mean() > apart.mean()


def test_dithered_samples_are_those_of_their_levels() -> None:
    codec = MuLaw(8000, levels=512)
    ids = codec.encode(NOISE)
    made = codec.dithered(ids, np.random.default_rng(1))
    assert (codec.encode(made) == ids).mean() > 0.999  # rounding of float32 at a level's edge
    assert np.unique(made).size > 2 * np.unique(ids).size
