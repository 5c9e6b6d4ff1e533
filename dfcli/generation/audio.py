"""The sound of a clip while it is generated, the files it is written to, and the recording that it continues."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dfcli.codecs import MuLaw
from dfcli.errors import DfError, UsageError
from dfcli.generation.outputs import FORMATS, Held, check_format, is_folder, open_output
from dfcli.generation.wav import MOST_SAMPLES, Wav, pcm
from dfcli.ingest.audio import Recording
from dfcli.ingest.containers import unusable
from dfcli.system.files import free_bytes, os_errors

SILENCE = 0.01  # the amplitude (-40 dB) that a clip must exceed to count as begun


class AudioClip:
    """Ids in, samples out to `wav`, which is closed after `total` of them; before them it holds `kept` of a prime.

    `gain` and `shift` are those by which the prime was normalised; they are undone, so that both parts of the file have
    the level of the recording."""

    def __init__(
        self, wav: Wav, codec: MuLaw, total: int, kept: int = 0, gain: float = 1.0, shift: float = 0.0
    ) -> None:
        self._wav, self._codec, self._gain, self._shift = wav, codec, gain, shift
        self._total, self._kept = total, kept
        self._begun = False
        self.ids: list[NDArray[np.integer[Any]]] = []  # made, where they are kept to be scored
        self.silent = 0  # samples before the first sound

    @property
    def samples(self) -> int:
        """Made and written."""
        return max(0, self._wav.samples - self._kept)

    @property
    def done(self) -> bool:
        return self.samples == self._total

    def feed(self, ids: NDArray[np.integer[Any]]) -> None:
        """Takes further ids [n], as far as the clip goes."""
        if self.done:
            return
        samples = self._codec.decode(ids[: self._total - self.samples])
        if not self._begun:
            loud = np.abs(samples) > SILENCE
            self._begun = bool(loud.any())
            self.silent += int(loud.argmax()) if self._begun else len(samples)
        self._wav.append(pcm((samples - np.float32(self._shift)) / np.float32(self._gain)))
        if self.done:
            self.close()

    def close(self) -> None:
        """Ends the clip where it is. Can be called twice."""
        self._wav.close()


class Prime:
    """A recording as the model hears it: mono, at its rate, through its codec.

    It is read as a stream, once here for its length (`samples`) and its `newest` ids (as many as the model
    sees, or all where `context` is None), and again by each call of `blocks`. `rate`: its own, in Hz. Raises DfError,
    which calls it `name`, if it cannot be read.
    """

    def __init__(self, path: Path, codec: MuLaw, normalize: str, context: int | None, name: str = "the prime") -> None:
        self._path, self._codec, self._normalize, self._name = path, codec, normalize, name
        self.samples = self.rate = 0
        self.gain, self.shift = 1.0, 0.0  # by which the recording was normalised
        kept = [np.empty(0, codec.dtype)]
        for ids in self.blocks():
            self.samples += len(ids)
            kept.append(ids)
            if context is not None:
                kept = [np.concatenate(kept)[-context:]]
        self.newest = np.concatenate(kept)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Its ids, in blocks [n]."""
        try:
            recording = Recording(self._path)
            self.rate = recording.rate
            for samples in recording.stream(self._codec.sample_rate, self._normalize):
                self.gain, self.shift = recording.gain, recording.shift
                yield self._codec.encode(samples)
        except DfError as error:
            raise unusable(f"{self._name} {self._path}", str(self._path), error) from None

    def copy(self, wav: Wav) -> None:
        """Writes it, as the model hears it but at its own level, to `wav`."""
        for ids in self.blocks():
            wav.append(pcm((self._codec.decode(ids) - np.float32(self.shift)) / np.float32(self.gain)))


class Output:
    """Where clips are written: `paths`, or one binary stream (then `paths` is None).

    `out` is the path of one clip; of several, out-01.wav, out-02.wav, ...; or a folder, whose files `name` names.
    `kept` is a file that is still to be read while they are written. With `best` (so many of the clips are chosen) or
    `peak` (each is brought to a usual level), clips are held in memory until `finish`. Raises UsageError where no file
    can be written, DfError where the system says so.
    """

    def __init__(
        self, out: str | Path | BinaryIO, num: int, kept: Path | None, best: int | None = None, peak: bool = False
    ) -> None:
        if best is not None and not 1 <= best <= num:
            raise UsageError(f"--best must be from 1 to the number of clips, {num}, not {best}", "such as `--num 8`")
        self.paths: list[Path] | None = None
        self._count, self._kept, self._peak = num if best is None else best, kept, peak
        self._held: dict[int, Held] | None = {} if best is not None or peak else None
        self._folder: Path | None = None
        if isinstance(out, str | Path):
            if is_folder(Path(out), str(out)):
                self._folder = Path(out)
            else:
                self.paths = out_paths(Path(out), self._count, kept)
        elif self._count != 1:
            raise UsageError("only one clip can be streamed", "give a file to write with `-o out.wav`")
        else:
            self._stream = out

    def name(self, run: str, seed: int) -> None:
        """Name the files of a folder by run and seed, and make the folder."""
        if self._folder is not None:
            with os_errors("write", self._folder):
                self._folder.mkdir(exist_ok=True)
            self.paths = out_paths(self._folder / f"{run}-{seed}.wav", self._count, self._kept)

    def check_room(self, samples: list[int], kept: int, rate: int) -> None:
        """Raises UsageError or DfError where clips of so many `samples`, each behind `kept` others, do not fit."""
        if self.paths is None:
            return
        check_format(self.paths[0], rate)
        if max(samples) + kept > MOST_SAMPLES:
            raise UsageError(f"a wav file holds at most {MOST_SAMPLES // rate:,} seconds at {rate:,} Hz")
        if free_bytes(self.paths[0].parent) < 2 * (sum(samples) + kept * len(samples)):
            raise DfError(f"there is no room for {sum(samples) / rate:,.0f} s of sound in {self.paths[0].parent}")

    def open(self, clip: int, rate: int) -> Wav:
        if self._held is not None:
            self._held[clip] = Held()
            return self._held[clip]
        return self._target(clip, rate)

    def finish(self, order: list[int], rate: int) -> None:
        """Write the clips that are held, if any: as many as there are files, in this order."""
        for place, clip in enumerate(order[: self._count] if self._held is not None else ()):
            assert self._held is not None
            self._held[clip].write(self._target(place, rate), self._peak)

    def _target(self, place: int, rate: int) -> Wav:
        return open_output(self._stream if self.paths is None else self.paths[place], rate)


def out_paths(out: Path, num: int, kept: Path | None) -> list[Path]:
    """`out` for one clip; out-01.wav, out-02.wav, ... for several. `kept` is a file that is still to be
    read while they are written. Raises UsageError where no wav can be written, DfError where the system says so."""
    if out.suffix.lower() not in (".wav", "", *FORMATS):
        raise UsageError(f"{out} ends in no format of sound", f"known: .wav, {', '.join(FORMATS)}")
    width = max(2, len(str(num)))
    paths = [out] if num == 1 else [out.with_stem(f"{out.stem}-{i:0{width}}") for i in range(1, num + 1)]
    with os_errors("write", out):  # such as a name that is too long
        if not out.parent.is_dir():
            raise UsageError(f"there is no folder {out.parent}", "make it first")
        for path in paths:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is not a file", "name a file; `-o -` writes a wav to a pipe")
            if kept is not None and path.exists() and kept.exists() and path.samefile(kept):
                raise UsageError(f"{path} cannot be both the prime and the output", "write to another file")
    return paths
