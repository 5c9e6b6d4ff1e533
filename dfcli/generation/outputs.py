"""Where the sound of a clip goes: a wav that grows, a file in another format, or memory until the clip is whole."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dfcli.errors import UsageError
from dfcli.generation.wav import Wav, WavFile, WavStream
from dfcli.system.files import os_errors, writing

FORMATS = {".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", "MPEG_LAYER_III")}
PEAK = 0.89  # -1 dB of full scale: the level to which a clip is brought on request
BLOCK = 1 << 16  # samples written at a time


class EncodedFile:
    """A FLAC, Ogg Vorbis or MP3 file by libsndfile, 16 bit or its lossy equal, mono. It appears when it is closed."""

    def __init__(self, path: Path, sample_rate: int) -> None:
        import soundfile

        self.samples = 0
        self._path, self._stack = path, ExitStack()
        kind, subtype = FORMATS[path.suffix.lower()]
        temporary = self._stack.enter_context(writing(path))
        with os_errors("write", path):
            self._file: Any = soundfile.SoundFile(
                temporary, "w", sample_rate, 1, subtype=subtype, format=kind, closefd=True
            )

    def append(self, pcm: NDArray[np.int16]) -> None:
        with os_errors("write", self._path):
            for start in range(0, len(pcm), BLOCK):  # libsndfile's Vorbis encoder overflows its stack with long ones
                self._file.write(pcm[start : start + BLOCK])
        self.samples += len(pcm)

    def close(self) -> None:
        if not self._file.closed:
            with self._stack:
                self._file.close()


class Held:
    """Samples kept in memory, 2 bytes each, until it is known where and how loud they are written."""

    def __init__(self) -> None:
        self.samples = 0
        self._parts: list[NDArray[np.int16]] = []

    def append(self, pcm: NDArray[np.int16]) -> None:
        self._parts.append(pcm)
        self.samples += len(pcm)

    def close(self) -> None:
        pass

    def write(self, out: Wav, peak: bool) -> None:
        """Write all samples to `out` and close it; with `peak`, so loud that the largest is PEAK of full scale."""
        largest = max((int(np.abs(part.astype(np.int32)).max()) for part in self._parts if len(part)), default=0)
        gain = PEAK * 32767 / largest if peak and largest else 1.0
        for part in self._parts:
            out.append(np.rint(part * gain).astype(np.int16) if gain != 1.0 else part)
        out.close()


def open_output(target: Path | BinaryIO, sample_rate: int) -> Wav:
    """A file of the format that its name ends in, or a stream that becomes a wav."""
    if not isinstance(target, Path):
        return WavStream(target, sample_rate)
    return (EncodedFile if target.suffix.lower() in FORMATS else WavFile)(target, sample_rate)


def check_format(path: Path, sample_rate: int) -> None:
    """Raise UsageError where the format of `path` cannot hold sound of this rate, in Hz."""
    if path.suffix.lower() not in FORMATS:
        return
    import soundfile

    kind, subtype = FORMATS[path.suffix.lower()]
    try:
        with soundfile.SoundFile(io.BytesIO(), "w", sample_rate, 1, subtype=subtype, format=kind) as file:
            file.write(np.zeros(16, np.int16))
    except soundfile.LibsndfileError:
        raise UsageError(f"{kind} cannot hold sound of {sample_rate:,} Hz", "`-o out.wav` holds every rate") from None


def is_folder(out: Path, given: str) -> bool:
    """Whether `out`, as it was given, means a folder to put files into."""
    return given.endswith(("/", "\\")) or (os.path.isdir(out) and out.suffix.lower() not in (".wav", *FORMATS))
