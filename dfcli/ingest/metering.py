"""Levels of a recording, gathered block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dfcli.errors import DfError

MAX_SAMPLE = 1e6  # beyond it a float file holds no sound, and sums of it could overflow
SILENCE = 2 / (1 << 15)  # a recording that moves less than this is silent: one step of 16 bits up or down


@dataclass(frozen=True)
class Report:
    """What a recording sounded like, known when its stream has ended. Levels are those of the file, full scale 1."""

    frames: int
    """Samples delivered, at the wanted rate."""
    peak: float
    """Largest magnitude in any channel."""
    clipped: float
    """Fraction of the file's samples that are at full scale or beyond."""
    offset: float
    """Mean of the mono mix; 0 for a recording that is centred."""
    silent: bool
    """Whether the mono mix moves by less than one step of 16 bits up or down."""
    notes: tuple[str, ...] = ()
    """What of the file is missing or left over, as its headers have it."""


class Meter:
    """Gathers the levels of one recording."""

    def __init__(self) -> None:
        self.frames = self.samples = self.clipped = 0
        self.peak = self.sum = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, block: np.ndarray, full_scale: float) -> np.ndarray:
        """Takes float32 [n, channels] into account and returns its mono mix [n]. DfError for what is no sound."""
        magnitude = np.abs(block)
        peak = float(magnitude.max())
        if not peak <= MAX_SAMPLE:  # also for NaN
            what = "a sample that is not a number" if math.isnan(peak) else f"a sample of magnitude {peak:.3g}"
            raise DfError(f"it holds {what}", "samples lie between -1 and 1; export the recording again")
        channels = block.shape[1]  # a product is ten times as fast as numpy's mean over so short an axis
        mono = block[:, 0].copy() if channels == 1 else block @ np.full(channels, 1 / channels, np.float32)
        self.peak = max(self.peak, peak)
        self.clipped += int(np.count_nonzero(magnitude >= full_scale))
        self.samples += block.size
        self.frames += len(block)
        self.sum += float(mono.sum(dtype=np.float64))
        self.low, self.high = min(self.low, float(mono.min())), max(self.high, float(mono.max()))
        return mono

    def report(self, delivered: int, notes: tuple[str, ...] = ()) -> Report:
        """The levels of all blocks. Raises DfError where there were none."""
        if not self.frames:
            raise DfError("it holds no sound: its header is followed by nothing")
        return Report(
            frames=delivered,
            peak=self.peak,
            clipped=self.clipped / self.samples,
            offset=self.sum / self.frames,
            silent=self.high - self.low < SILENCE,
            notes=notes,
        )
