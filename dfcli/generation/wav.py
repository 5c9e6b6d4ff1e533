"""Wav output that grows while it is generated: 16 bit, mono. A file is a valid wav after every `append`; a stream
needs no seeking."""

from __future__ import annotations

import os
import struct
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from dfcli.system.files import os_errors, write_atomic

try:
    import fcntl
except ImportError:  # Windows, which does not tell whether a file is appended to
    fcntl = None

HEADER = 44  # bytes before the samples
UNKNOWN = 2**32 - 1  # a size that readers understand as "up to the end"
MOST_SAMPLES = (2**32 - 1 - HEADER) // 2  # the sizes in the header are 32 bits


class Wav(Protocol):
    """An output that samples are appended to."""

    samples: int  # written

    def append(self, pcm: NDArray[np.int16]) -> None:
        """Writes samples [n]. Raises DfError if they cannot be written."""
        ...

    def close(self) -> None: ...


class WavFile:
    """A new wav file at `path`, which appears with the first samples and replaces what is there.

    Later samples are written behind its end first and counted in its header then, in one write: whenever the process
    dies, the header counts samples that are there.
    """

    def __init__(self, path: Path, sample_rate: int) -> None:
        self.samples = 0
        self._path, self._rate = path, sample_rate
        self._file: FileIO | None = None

    def append(self, pcm: NDArray[np.int16]) -> None:
        data = pcm.astype("<i2").tobytes()
        with os_errors("write", self._path):
            if self._file is None:
                whole = header(self._rate, len(pcm)) + data
                if not self._path.exists():
                    write_atomic(self._path, whole)  # it is never seen empty
                self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115
                self._write(self._file, 0, whole)
                self._file.truncate()
                self.samples = len(pcm)
            else:
                self._write(self._file, HEADER + 2 * self.samples, data)
                self.samples += len(pcm)
                self._write(self._file, 0, header(self._rate, self.samples))

    def close(self) -> None:
        """Ends the file behind the samples that count: an `append` that was broken off may have left more. Can be
        called twice."""
        if self._file is None or self._file.closed:
            return
        with os_errors("write", self._path):
            try:
                self._write(self._file, 0, header(self._rate, self.samples))
                self._file.truncate(HEADER + 2 * self.samples)
            finally:
                self._file.close()

    @staticmethod
    def _write(file: FileIO, place: int, data: bytes) -> None:
        file.seek(place)
        while data:  # a disk that fills takes a part
            data = data[file.write(data) :]


class WavStream:
    """A wav written to an open binary stream, such as a pipe to a player. The stream is not closed.

    The sizes in its header are unknown, so that it is whole wherever it ends; where the stream is a file, they are
    written at the end. OSErrors of the stream pass through.
    """

    def __init__(self, stream: BinaryIO, sample_rate: int) -> None:
        self.samples = 0
        self._stream, self._rate = stream, sample_rate
        self._start = _place(stream)
        self._stream.write(header(sample_rate))

    def append(self, pcm: NDArray[np.int16]) -> None:
        self._stream.write(pcm.astype("<i2").tobytes())
        self._stream.flush()
        self.samples += len(pcm)

    def close(self) -> None:
        self._stream.flush()
        if self._start is not None:
            end = self._stream.tell()
            self._stream.seek(self._start)
            self._stream.write(header(self._rate, self.samples))
            self._stream.seek(end)


def _place(stream: BinaryIO) -> int | None:
    """Where in a file the stream writes next; None where it cannot go back: a pipe, or a file that is appended to."""
    if fcntl is None or not stream.seekable():
        return None
    try:
        appends = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_APPEND
    except OSError:  # it is no file
        return None
    return None if appends else stream.tell()


def header(sample_rate: int, samples: int | None = None) -> bytes:
    """The first HEADER bytes of a wav of so many samples, 16 bit, mono; None where that is not known yet."""
    whole, data = (UNKNOWN, UNKNOWN) if samples is None else (HEADER - 8 + 2 * samples, 2 * samples)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", whole, b"WAVE"),
        *(b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16),
        *(b"data", data),
    )


def pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in [-1, 1] as 16-bit integers; what lies outside is clipped."""
    return np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
