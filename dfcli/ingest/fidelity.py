"""What a codec costs before any model learns: its noise, and what FLAC needs for the same recordings."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dfcli.codecs import MuLaw

FLAC = {"channels": 1, "format": "FLAC", "subtype": "PCM_16"}


class Fidelity(NamedTuple):
    """Sums over the samples of a recording, at the codec's rate."""

    samples: int
    signal: float  # sum of squares
    noise: float  # sum of squares of decoded minus original
    flac: int  # bytes of its FLAC frames at 16 bits: without the file's header


class FidelityMeter:
    """Measures one recording block by block. Memory does not grow with its length."""

    def __init__(self, codec: MuLaw) -> None:
        import soundfile

        self._codec, self._sink = codec, _Sink()
        self._samples, self._signal, self._noise = 0, 0.0, 0.0
        self._file = soundfile.SoundFile(self._sink, "w", samplerate=codec.sample_rate, **FLAC)  # pyright: ignore[reportArgumentType]

    def add(self, block: np.ndarray, ids: np.ndarray) -> None:
        """Take float32 samples [n] and their ids [n] into account."""
        clipped = np.clip(block, -1, 1)
        self._samples += len(block)
        self._signal += float(np.square(clipped, dtype=np.float64).sum())
        self._noise += float(np.square(self._codec.decode(ids) - clipped, dtype=np.float64).sum())
        self._file.write(clipped)

    def close(self) -> Fidelity:
        """End the recording. Can be called where it is given up."""
        self._file.close()
        return Fidelity(self._samples, self._signal, self._noise, max(0, self._sink.size - _header_bytes()))


def summary(found: Iterable[Fidelity]) -> dict[str, Any]:
    """`snr` in dB (None without signal or noise) and `flac_bits_per_sample` of recordings together."""
    samples, signal, noise, flac = (sum(values) for values in zip(*found, strict=True))
    snr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    return {"snr": snr, "flac_bits_per_sample": 8 * flac / max(1, samples)}


class _Sink:
    """A file that keeps its length alone."""

    def __init__(self) -> None:
        self.size = self._place = 0

    def write(self, data: bytes) -> int:
        self._place += len(data)
        self.size = max(self.size, self._place)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        return b""


@cache
def _header_bytes() -> int:
    """How long the header of a FLAC file is here: it holds the encoder's name."""
    import soundfile

    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", samplerate=8000, **FLAC) as sound:
        sound.write(np.zeros(1, np.float32))
    data, place, last = file.getvalue(), 4, False  # "fLaC", then blocks: a flag with the type, 3 bytes of length
    while not last:
        last = bool(data[place] & 0x80)
        place += 4 + int.from_bytes(data[place + 1 : place + 4], "big")
    return place
