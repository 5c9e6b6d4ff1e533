"""Mu-law: 256 levels or more, closer together near silence, as in WaveNet (van den Oord et al. 2016, 2.2).

f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu) with mu = 255, then equal steps of [-1, 1]: as many as there are levels. More
levels keep mu, because a larger mu makes levels near silence that are finer than 16 bits.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dfcli.codecs.base import Codec, checked_ids, field
from dfcli.errors import CorruptError, DfError

MU = 255.0
QUANTIZERS = ("torchaudio", "s4")
LEVELS = (256, 512, 1024, 2048, 4096)
DEFAULT_LEVELS = 1024  # after 5 minutes 8.51 bits per 16-bit sample of speech, where 256 levels gave 8.81
RATES = (100, 384_000)  # Hz; below there is nothing to hear, above no recorder works


class MuLaw(Codec):
    """Mono samples in [-1, 1] at `sample_rate` Hz to ids 0 ... `levels` - 1 and back.

    `quantizer` says how f(x) is rounded: "torchaudio" as torchaudio.functional.mu_law_encoding (the nearest
    of `levels` points from -1 to 1), "s4" as the audio experiments of Goel et al. 2022 (SaShiMi; state-spaces/s4,
    src/dataloaders/audio.py), whose published bits per sample it makes comparable.
    """

    name = "mulaw"
    kind = "audio"
    unit = "sample"

    def __init__(self, sample_rate: int, quantizer: str = "torchaudio", levels: int = 256) -> None:
        """Raises ValueError for an unknown quantizer, DfError for another number of levels or a rate outside
        100 Hz ... 384 kHz."""
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {QUANTIZERS}, not {quantizer!r}")
        if levels not in LEVELS:
            raise DfError(f"mu-law has no {levels} levels here", f"choose one of {', '.join(map(str, LEVELS))}")
        if not RATES[0] <= sample_rate <= RATES[1]:
            raise DfError(
                f"{sample_rate} Hz is no usable sample rate", f"choose one from {RATES[0]} to {RATES[1]:,} Hz"
            )
        self.sample_rate = sample_rate
        self.quantizer = quantizer
        self.vocab_size = self.levels = levels
        self.zero_level = levels // 2
        """The id of silence, with either quantizer."""
        self._values = self._expanded(np.arange(levels, dtype=np.float64))  # float32 [levels]

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n] -> ids [n] of `dtype`. Clamps samples beyond [-1, 1]; raises DfError for NaN and infinity."""
        x = np.asarray(samples, np.float32)
        if not np.isfinite(x).all():
            place = int(np.argmin(np.isfinite(x)))
            raise DfError(f"sample {place} of the audio is {x[place]}, not a number in [-1, 1]")
        x = np.clip(x, -1, 1)
        if self.quantizer == "s4":
            y = np.sign(x) * (np.log1p(MU * np.abs(x + np.float32(1e-8))) / np.log1p(np.float32(MU)))
            y = (y + 1) / 2 * np.float32(self.levels - 0.01) + np.float32(0.01 / 2)
        else:
            y = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(np.float32(MU))
            y = (y + 1) / 2 * np.float32(self.levels - 1) + np.float32(0.5)
        return y.astype(self.dtype)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """ids [n] -> float32 [n] in [-1, 1], which encode to the same ids. Raises ValueError beyond the levels."""
        return self._values[checked_ids(ids, self.levels)]

    @cached_property
    def values_of_16_bits(self) -> np.ndarray:
        """int64 [levels]: how many of the 65,536 values of 16-bit sound each id stands for. Some of 2,048 levels and
        more near silence stand for none."""
        every = np.arange(-(1 << 15), 1 << 15).astype(np.float32) / (1 << 15)
        return np.bincount(self.encode(every), minlength=self.levels)

    def dithered(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """ids [n] -> float32 [n]: for each a sample drawn from those that it stands for, evenly over its step of f."""
        return self._expanded(checked_ids(ids, self.levels) + random.uniform(-0.5, 0.5, len(ids)))

    def _expanded(self, ids: np.ndarray) -> np.ndarray:
        """float64 [n], of which whole numbers are ids -> float32 [n] in [-1, 1]."""
        # s4 cuts [-1, 1] into equal steps: the middle of each is what its id stands for
        if self.quantizer == "s4":
            y = (ids + 0.5 - 0.005) / (self.levels - 0.01) * 2 - 1
        else:
            y = ids / (self.levels - 1) * 2 - 1
        y = np.clip(y, -1, 1)
        return (np.sign(y) * np.expm1(np.abs(y) * np.log1p(MU)) / MU).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        # 256 levels are left out, so that datasets of version 0.1 keep their fingerprints.
        levels = {} if self.levels == 256 else {"levels": self.levels}
        return {"name": self.name, "sample_rate": self.sample_rate, "quantizer": self.quantizer, **levels}

    @classmethod
    def from_json(cls, description: dict[str, Any], folder: Path) -> MuLaw:
        quantizer = field(description, "quantizer", str)
        if quantizer not in QUANTIZERS:
            raise CorruptError(f"the mu-law quantizer {quantizer!a} is unknown", "use a newer dfcli")
        rate = field(description, "sample_rate", int)
        if not RATES[0] <= rate <= RATES[1]:
            raise CorruptError(f"the codec's sample rate of {rate} Hz is out of bounds", "prepare the data again")
        levels = field({"levels": 256} | description, "levels", int)
        if levels not in LEVELS:
            raise CorruptError(f"the codec's {levels} mu-law levels are unknown", "use a newer dfcli")
        return cls(rate, quantizer, levels)
