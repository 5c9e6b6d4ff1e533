from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dfcli.codecs import MuLaw, codec_from_json
from dfcli.codecs.mulaw import LEVELS, QUANTIZERS
from dfcli.errors import DfError

SAMPLES = arrays(np.float32, st.integers(0, 200), elements=st.floats(-1, 1, width=32))
quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS)


@quantizers
@pytest.mark.parametrize("levels", LEVELS)
def test_every_id_survives_decoding_and_encoding(quantizer: str, levels: int) -> None:
    codec = MuLaw(16_000, quantizer, levels)
    ids = np.arange(levels).astype(codec.dtype)
    samples = codec.decode(ids)
    assert samples.dtype == np.float32
    assert (np.diff(samples) > 0).all()
    assert np.abs(samples).max() <= 1
    assert (codec.encode(samples) == ids).all()


@quantizers
@settings(max_examples=50, deadline=None)
@given(samples=SAMPLES)
def test_decoding_is_close_to_what_was_encoded(quantizer: str, samples: np.ndarray) -> None:
    codec = MuLaw(8000, quantizer)
    ids = codec.encode(samples)
    assert ids.dtype == np.uint8
    # half a step of f times the slope of its inverse, ln(256) (1 + 255 |x|) / 255 / 255, and a little more
    assert (np.abs(codec.decode(ids) - samples) <= 2.4e-2 * (np.abs(samples) + 1 / 255) + 1e-6).all()


@settings(max_examples=50, deadline=None)
@given(samples=SAMPLES)
def test_equal_to_torchaudio(samples: np.ndarray) -> None:
    import torch
    from torchaudio.functional import mu_law_decoding, mu_law_encoding

    codec = MuLaw(8000)
    theirs = mu_law_encoding(torch.from_numpy(samples), 256)
    assert np.abs(codec.encode(samples).astype(int) - theirs.numpy()).max(initial=0) <= 1  # one rounding apart
    ids = torch.arange(256)
    np.testing.assert_allclose(codec.decode(ids.numpy()), mu_law_decoding(ids, 256).numpy(), atol=1e-6)


def test_equal_to_torchaudio_on_a_grid() -> None:
    import torch
    from torchaudio.functional import mu_law_encoding

    grid = np.linspace(-1, 1, 200_001, dtype=np.float32)
    ours = MuLaw(8000).encode(grid)
    theirs = mu_law_encoding(torch.from_numpy(grid), 256).numpy()
    assert (ours != theirs).mean() < 1e-4  # only where a level begins


def test_s4_quantizer_follows_its_formula() -> None:
    # state-spaces/s4, src/dataloaders/audio.py: mu_law_encode without its min-max scaling, in float64
    grid = np.linspace(-1, 1, 20_001)
    y = np.sign(grid) * np.log1p(255 * np.abs(grid + 1e-8)) / np.log1p(255)
    theirs = ((y + 1) / 2 * (256 - 0.01) + 0.005).astype(np.int64)
    assert (MuLaw(16_000, "s4").encode(grid) != theirs).mean() < 1e-3
    assert (theirs.min(), theirs.max()) == (0, 255)


@quantizers
def test_silence_is_the_zero_level(quantizer: str) -> None:
    codec = MuLaw(8000, quantizer)
    assert codec.encode(np.zeros(3, np.float32)).tolist() == [128] * 3
    assert codec.zero_level == 128
    assert abs(codec.decode(np.array([128]))[0]) < 1e-4


@quantizers
def test_samples_out_of_range_are_clamped(quantizer: str) -> None:
    codec = MuLaw(8000, quantizer)
    assert codec.encode(np.array([-7, -1, 1, 3e38], np.float32)).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(DfError, match="sample 2 of the audio"):
        MuLaw(8000).encode(np.array([0, 1, bad, bad], np.float32))


@pytest.mark.parametrize("rate", [-1, 0, 1, 10**6])
def test_absurd_rates_are_refused(rate: int) -> None:
    with pytest.raises(DfError, match="no usable sample rate"):
        MuLaw(rate)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="ids must"):
        MuLaw(8000).decode(np.array([256]))


def test_json_rebuilds_the_codec(tmp_path: Path) -> None:
    codec = MuLaw(22_050, "s4")
    again = codec_from_json(codec.to_json(), tmp_path)
    assert isinstance(again, MuLaw)
    assert again.to_json() == codec.to_json() == {"name": "mulaw", "sample_rate": 22_050, "quantizer": "s4"}
    assert (again.kind, again.vocab_size, again.dtype) == ("audio", 256, np.uint8)


def test_levels_count_the_values_of_16_bits_they_stand_for(tmp_path: Path) -> None:
    codec = codec_from_json(MuLaw(8000, levels=1024).to_json(), tmp_path)
    assert isinstance(codec, MuLaw)
    assert (codec.levels, codec.zero_level, codec.dtype) == (1024, 512, np.dtype("<u2"))
    assert codec.values_of_16_bits.sum() == 1 << 16
    assert codec.values_of_16_bits.min() == 1
    # ln(256) (1 + 255 |x|) / 255 is the slope of f's inverse: here at x = 0.5, for steps of 2 / 1023
    width = np.log(256) * (1 + 255 * 0.5) / 255 * 2 / 1023 * (1 << 15)
    assert codec.values_of_16_bits[codec.encode(np.array([0.5]))[0]] == pytest.approx(width, rel=0.01)
