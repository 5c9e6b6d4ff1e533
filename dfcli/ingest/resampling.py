"""Resampling of a mono signal that comes in blocks, by soxr (the SoX resampler library)."""

from __future__ import annotations

import numpy as np

from dfcli.errors import DfError

MOST = 20_000  # times that a rate is changed at most: memory and time grow with it, to 66 MB and 0.5 s at 10,000


class Resampler:
    """Resamples float32 samples from `source` to `target` Hz, with memory that does not grow with their number.

    n samples become round(n * target / source), the same ones wherever the blocks are cut. Raises DfError for rates
    that differ more than `MOST` times.
    """

    def __init__(self, source: int, target: int) -> None:
        import soxr

        if max(source, target) > MOST * min(source, target):
            raise DfError(
                f"it has {source:,} Hz and cannot be brought to {target:,} Hz: they differ over {MOST:,} times"
            )
        self._stream = None if source == target else soxr.ResampleStream(source, target, 1, dtype="float32")

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n] -> the outputs [m] that are now certain; m may be 0."""
        return samples if self._stream is None else self._stream.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        """The outputs [m] that were held back; what lies behind the end counts as silence."""
        nothing = np.zeros(0, np.float32)
        return nothing if self._stream is None else self._stream.resample_chunk(nothing, last=True)
