"""Wav output that grows while it is made: 16 bit, mono. A file is a valid wav after every `append`; a stream
needs no seeking."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray

from dfcli.errors import DfError
from dfcli.system.files import os_errors

HEADER = 44  # bytes before the samples, in what soundfile writes
MOST_SAMPLES = (2**32 - 1 - HEADER) // 2  # the sizes in the header are 32 bits


class Wav(Protocol):
    """What samples are appended to."""

    def append(self, pcm: NDArray[np.int16]) -> None:
        """Writes samples [n]. Raises DfError if they cannot be written."""
        ...

    def close(self) -> None: ...


class WavFile:
    """A new wav file at `path`, replacing what is there. Raises DfError if it cannot be written."""

    def __init__(self, path: Path, sample_rate: int) -> None:
        self._path = path
        with self._errors():
            # Opened first by Python, whose errors say what is wrong. The handle then keeps the sizes in the
            # header up to date: soundfile writes them only when it closes the file.
            self._header = open(path, "wb", buffering=0)  # noqa: SIM115
            try:
                self._sound = soundfile.SoundFile(path, "w", sample_rate, 1, "PCM_16", format="WAV")
            except BaseException:
                self._header.close()
                raise
            self._samples = 0

    def append(self, pcm: NDArray[np.int16]) -> None:
        with self._errors():
            self._sound.write(pcm)
            self._samples += len(pcm)
            for place, size in ((4, HEADER - 8 + 2 * self._samples), (HEADER - 4, 2 * self._samples)):
                self._header.seek(place)
                self._header.write(struct.pack("<I", size))

    def close(self) -> None:
        with self._errors():
            try:
                self._sound.close()
            finally:
                self._header.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with os_errors("write", self._path):
                yield
        except soundfile.LibsndfileError as error:
            raise DfError(f"could not write {self._path}: {error.error_string}") from None


class WavStream:
    """A wav written to an open binary stream, such as a pipe to a player. The stream is not closed.

    The sizes in its header are 2**32 - 1, which readers take as "up to the end": so it is whole wherever it
    ends.
    """

    def __init__(self, stream: BinaryIO, sample_rate: int) -> None:
        self._stream = stream
        unknown = 2**32 - 1
        self._stream.write(struct.pack("<4sI4s", b"RIFF", unknown, b"WAVE"))
        self._stream.write(struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16))
        self._stream.write(struct.pack("<4sI", b"data", unknown))

    def append(self, pcm: NDArray[np.int16]) -> None:
        self._stream.write(pcm.astype("<i2").tobytes())
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


def pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in [-1, 1] as 16-bit integers; what lies outside is clipped."""
    return np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
