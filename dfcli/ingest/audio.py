"""Recordings as blocks of mono float32 samples at any rate, in memory that does not grow with their length.

Messages of errors and notes are reasons without the file's name: callers put it in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dfcli.ingest.metering import Meter, Report
from dfcli.ingest.resampling import Resampler
from dfcli.ingest.soundfiles import Opened, opened

NORMALIZE = ("none", "peak", "minmax")
BLOCK = 1 << 18  # samples read or made at once


class Recording:
    """One audio file of 1 to 64 channels and 1 Hz to 1 MHz. Opening reads its headers only.

    `source` is a path, or a function that opens the file's bytes anew. `rate` in Hz, `channels`, and `frames` per
    channel as the headers have them (None where they do not say). `report` is None until a stream of it has ended;
    `gain` and `shift` are what the latest stream's samples were multiplied by and raised by.

    Raises DfError with the reason if the file is not a regular, readable file of a known format with something in it.
    """

    def __init__(self, source: Path | Callable[[], IO[bytes]]) -> None:
        self._source = source
        self.report: Report | None = None
        self.gain, self.shift = 1.0, 0.0
        with self._opened() as file:
            self.rate, self.channels, self.frames = file.rate, file.channels, file.frames

    def stream(self, rate: int | None = None, normalize: str = "none") -> Iterator[np.ndarray]:
        """Yields float32 blocks [n] of the mono mix, resampled to `rate` Hz (None: as it is).

        `normalize`: "none"; "peak", the largest magnitude becomes 1 (silent recordings stay as they are); "minmax",
        the lowest sample becomes -1 and the highest 1, as the audio experiments of Goel et al. 2022 have it. The last
        two read the file twice.

        A file that is cut off or damaged is read as far as it can be decoded, and `report.notes` says so. Raises
        DfError if nothing can be decoded, or what is no sound (NaN, infinity, magnitudes beyond 1e6). What was yielded
        until then is to be discarded.
        """
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {NORMALIZE}, not {normalize!r}")
        self.gain, self.shift = 1.0, 0.0
        if normalize != "none":
            low, high = math.inf, -math.inf
            for block in self._resampled(rate):
                low, high = min(low, float(block.min())), max(high, float(block.max()))
            if normalize == "minmax":
                self.gain = 2 / (high - low + 1e-6)
                self.shift = -1 - low * self.gain
            elif self.report and not self.report.silent:
                self.gain = 1 / max(high, -low)
        for block in self._resampled(rate):
            yield block if normalize == "none" else block * np.float32(self.gain) + np.float32(self.shift)

    def _opened(self) -> Opened:
        return opened(self._source)

    def _resampled(self, rate: int | None) -> Iterator[np.ndarray]:
        self.report = None
        meter = Meter()
        delivered = 0
        with self._opened() as file:
            rate = rate or file.rate
            resampler = Resampler(file.rate, rate)
            frames = max(1, min(BLOCK, BLOCK * file.rate // rate) // file.channels)
            for block in file.blocks(frames):
                samples = resampler.feed(meter.add(block, file.full_scale))
                delivered += len(samples)
                if len(samples):
                    yield samples
            samples = resampler.finish()
            if len(samples):
                yield samples
            self.report = meter.report(delivered + len(samples), tuple(file.notes))
