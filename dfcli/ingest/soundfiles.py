"""Sound files: what they are by their first bytes, never by their name, and their samples in blocks.

libsndfile sees only what its robust decoders are for: FLAC, Ogg (Vorbis, Opus, FLAC) and MP3, from the first byte of
the stream on, and the bare samples of files whose headers are read in `containers.py`. So the decoders that are known
to crash (ADPCM, GSM, ...; libsndfile runs some of them while it opens a file) cannot be reached.

One rule for all formats: what is there is read to its true end, and compared with what headers and file size promise.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from dfcli.errors import DfError
from dfcli.ingest.containers import CONVERT, MAX_CHANNELS, RATES, Part, identify
from dfcli.system.files import data_home

MAX_EXPANSION = 200  # frames per byte: far above speech at 6 kbit/s (64), far below what a bomb needs
ALWAYS_ALLOWED = 12 * 3600  # seconds that any file may expand to, at up to 48 kHz: digital silence takes no space
UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's word for it
ENCODINGS = {"PCM_S8", "PCM_16", "PCM_24", "VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III"}
DECODER_WORDS = (b"[src/libmpg123", b"Note: ", b"Warning: ", b"Illegal ")  # that begin lines of libmpg123
# The highest level of each encoding that is not 16 bits or more; mu-law's and A-law's end at 32,124 and 32,256
FULL_SCALE = {"PCM_U8": 127 / 128, "PCM_S8": 127 / 128, "ULAW": 0.98, "ALAW": 0.98}


class Opened:
    """An open sound file: `rate` in Hz, `channels`, `frames` per channel as the headers say (None where they do not),
    and `notes` of what is missing or left over, complete when `blocks` has ended. To be used as a context manager."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        found = identify(file, self._size)
        self._parts, self.notes = found.parts, list(found.notes)
        self._decoder = _Decoder(file, self._parts[0])
        self.rate, self.channels = self._decoder.rate, self._decoder.channels
        self.full_scale = self._decoder.full_scale
        self._most = max(MAX_EXPANSION * self._size, ALWAYS_ALLOWED * min(self.rate, 48_000))
        self.frames = None
        if len(self._parts) == 1 and self._decoder.frames is not None:
            self.frames = min(self._decoder.frames, self._most)
        if not RATES[0] <= self.rate <= RATES[1]:
            raise DfError(f"its sample rate of {self.rate:,} Hz is not between {RATES[0]} and {RATES[1]:,} Hz")
        if self.channels > MAX_CHANNELS:
            raise DfError(f"it has {self.channels:,} channels, more than {MAX_CHANNELS}")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._decoder.close()
        self._file.close()

    def blocks(self, frames: int) -> Iterator[np.ndarray]:
        """Yields float32 [n, channels] with 0 < n <= frames; the next one overwrites it."""
        buffer = np.empty((frames, self.channels), np.float32)
        total = 0
        for k, part in enumerate(self._parts):
            if k:
                self._decoder.close()
                self._decoder = _Decoder(self._file, part)
                if (self._decoder.rate, self._decoder.channels) != (self.rate, self.channels):
                    self.notes.append(
                        f"part {k + 1} of {len(self._parts)} has another rate or other channels: left out"
                    )
                    break
            for count in self._decoder.read(buffer):
                total += count
                if total > self._most:
                    hours = self._most / self.rate / 3600
                    raise DfError(f"its {self._size:,} bytes unfold to more than {hours:,.1f} hours of sound", CONVERT)
                yield buffer[:count]
            self.notes += self._decoder.notes()


class _Decoder:
    """One part of a file, decoded by libsndfile."""

    def __init__(self, file: IO[bytes], part: Part) -> None:
        import soundfile

        self._part, self._window = part, _Window(file, part)
        try:
            with _quiet():
                self._file = soundfile.SoundFile(cast(Any, self._window), **part.arguments)
        except soundfile.SoundFileError as error:
            raise _failure(self._window.error or error) from None
        if not part.arguments and self._file.subtype not in ENCODINGS:
            self._file.close()
            raise DfError(f"its encoding ({self._file.subtype}) is not supported", CONVERT)
        self.rate, self.channels = int(self._file.samplerate), int(self._file.channels)
        self.frames = int(self._file.frames) if 0 < self._file.frames < UNKNOWN_LENGTH else None
        self.full_scale = FULL_SCALE.get(self._file.subtype, 32767 / 32768)
        self._read, self._failed = 0, ""

    def close(self) -> None:
        self._file.close()

    def read(self, buffer: np.ndarray) -> Iterator[int]:
        """Fill `buffer` from its start again and again; yields how many frames of it count."""
        import soundfile

        while not self._failed:
            try:
                with _quiet():
                    count = len(self._file.read(out=buffer))
            except soundfile.SoundFileError as error:
                count = self._file.tell() - self._read  # what was decoded before the damage is in the buffer
                self._failed = str(getattr(error, "error_string", error)).rstrip(". ") or "the decoder failed"
                if self._window.error or (not self._read and count <= 0):
                    raise _failure(self._window.error or error) from None
            if self._window.error:
                raise _failure(self._window.error)
            if count <= 0:
                break
            if self._part.low_24:  # 24 bits in the lower bytes of 32, with or without their sign above them
                block = buffer[:count]
                block *= 256
                block -= 2 * (block >= 1)
            self._read += count
            yield count

    def notes(self) -> list[str]:
        """What is missing of the frames that the header promises, when all is read."""
        if self.frames is not None and self._read < self.frames and (self._part.exact or self._failed):
            seconds = f"{self._read / self.rate:,.1f} of {self.frames / self.rate:,.1f} seconds"
            return [f"it is cut off or damaged: {seconds} could be read"]
        if self._failed and self.frames == self._read:
            return ["what stands behind its sound is no sound and was left out"]
        return [f"it is damaged after {self._read / self.rate:,.1f} seconds"] if self._failed else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the MP3 decoder writes to the process's standard error away from it; all else goes there afterwards."""
    try:
        data_home().mkdir(parents=True, exist_ok=True)
        caught = tempfile.TemporaryFile(dir=data_home())  # noqa: SIM115 - closed below
        kept = os.dup(2)  # last, because nothing closes it where the file cannot be made
    except OSError:  # there is no standard error, or no room
        yield
        return
    try:
        os.dup2(caught.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        with caught:
            if caught.seek(0, os.SEEK_END):
                caught.seek(0)
                lines = [line for line in caught if not line.lstrip().startswith(DECODER_WORDS)]
                os.write(2, b"".join(lines))


class _Window:
    """A part of a file as libsndfile sees it. Read errors end it early and are kept in `error`."""

    def __init__(self, file: IO[bytes], part: Part) -> None:
        self._file, self._prefix, self._spans = file, part.prefix, part.spans
        self._size = len(part.prefix) + sum(size for _, size in part.spans)
        self._place = 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        data = self._prefix[self._place : self._place + size]
        before = len(self._prefix)
        for start, length in self._spans:
            inside = self._place + len(data) - before
            if len(data) >= size or inside < 0:
                break
            if inside < length:
                try:
                    self._file.seek(start + inside)
                    data += self._file.read(min(size - len(data), length - inside))
                except OSError as error:
                    self.error = error
                    return b""
            before += length
        self._place += len(data)
        return data


def opened(source: Path | Callable[[], IO[bytes]]) -> Opened:
    """Open a sound file. Raises DfError with the reason where it is none that can be read."""
    try:
        if isinstance(source, Path):
            if not stat.S_ISREG(os.stat(source).st_mode):  # asked first: opening a pipe would wait for its writer
                raise DfError("it is not a regular file")
            file = source.open("rb")
        else:
            file = source()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _failure(error) from None
    try:
        return Opened(file)
    except OSError as error:
        file.close()
        raise _failure(error) from None
    except BaseException:
        file.close()
        raise


def _failure(error: Exception) -> DfError:
    if isinstance(error, (OSError, ValueError)):
        return DfError(f"it cannot be read: {getattr(error, 'strerror', None) or error}")
    return DfError(f"it cannot be decoded: {str(getattr(error, 'error_string', error)).rstrip('. ')}", CONVERT)
