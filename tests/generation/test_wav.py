"""Wavs that grow: whole after every append, to the bit what was appended, and clear when they cannot be written."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dfcli.errors import DfError
from dfcli.generation.wav import HEADER, WavFile, WavStream, pcm


def parts() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(-(2**15), 2**15, n).astype(np.int16) for n in (1, 2000, 3, 500)]


def test_a_file_is_whole_after_every_append(tmp_path: Path) -> None:
    path = tmp_path / "ä out.wav"
    path.write_bytes(b"something longer " * 1000)
    wav, written = WavFile(path, 16_000), np.empty(0, np.int16)
    for part in parts():
        wav.append(part)
        written = np.concatenate([written, part])
        copy = shutil.copy(path, tmp_path / "copy.wav")
        assert Path(copy).stat().st_size == HEADER + 2 * len(written)
        with wave.open(str(copy)) as strict:  # a reader that believes the header
            assert strict.getparams()[:4] == (1, 2, 16_000, len(written))
            assert strict.readframes(len(written)) == written.astype("<i2").tobytes()
        samples, rate = soundfile.read(copy, dtype="int16")
        assert rate == 16_000
        assert np.array_equal(samples, written)
    before = path.read_bytes()
    wav.close()
    wav.close()
    assert path.read_bytes() == before


def length(path: Path) -> int:
    """Samples of a wav; every reader there is must say the same of it, and nothing against it."""
    with wave.open(str(path)) as strict:
        claimed = strict.getnframes()
        found = {len(strict.readframes(claimed)) // 2, len(soundfile.read(path)[0]), claimed}
    if shutil.which("soxi"):
        found.add(int(said_by("soxi", "-s", path)))
    if shutil.which("ffprobe") and claimed:
        found.add(
            int(said_by("ffprobe", "-v", "warning", "-show_entries", "stream=duration_ts", "-of", "csv=p=0", path))
        )
    assert len(found) == 1
    return claimed


def said_by(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


AtEachWrite = Callable[[Callable[[int], None]], None]


@pytest.fixture
def at_each_write(monkeypatch: pytest.MonkeyPatch) -> AtEachWrite:
    """`at_each_write(action)`: from now on a WavFile does `action(n)` before its n-th write and, if that is of samples
    behind its end, in its middle."""
    write = WavFile._write

    def install(action: Callable[[int], None]) -> None:
        done: list[int] = []

        def counted(file: io.FileIO, place: int, data: bytes) -> None:
            action(len(done))
            if place:
                half = len(data) // 2 - 1
                write(file, place, data[:half])
                action(len(done))
                write(file, place + half, data[half:])
            else:
                write(file, place, data)
            done.append(1)

        monkeypatch.setattr(WavFile, "_write", staticmethod(counted))

    return install


@pytest.mark.parametrize("before", [None, b"", b"something longer " * 1000])
def test_a_file_is_whole_at_every_moment(before: bytes | None, tmp_path: Path, at_each_write: AtEachWrite) -> None:
    """As a process that is killed leaves it."""
    path, lengths = tmp_path / "out.wav", []
    if before is not None:
        path.write_bytes(before)
    at_each_write(lambda n: lengths.append(length(path)) if n or before is None else None)
    wav = WavFile(path, 16_000)
    for part in parts()[:3]:
        wav.append(part)
    wav.close()
    assert set(lengths) == {1, 2001, 2004}
    assert lengths == sorted(lengths)


def test_what_is_broken_off_does_not_count(tmp_path: Path, at_each_write: AtEachWrite) -> None:
    path, lengths = tmp_path / "out.wav", []
    for moment in range(1, 7):

        def interrupt(n: int, moment: int = moment) -> None:
            if n == moment:
                raise KeyboardInterrupt

        wav = WavFile(path, 8000)
        at_each_write(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            for part in parts():
                wav.append(part)
        at_each_write(lambda n: None)
        wav.close()
        assert path.stat().st_size == HEADER + 2 * wav.samples
        assert length(path) == wav.samples
        lengths.append(wav.samples)
    # broken off in the samples it does not count, between them and the header it does
    assert lengths == [1, 2001, 2001, 2004, 2004, 2504]


def test_a_stream_needs_no_seeking_and_is_whole_where_it_ends() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    wav, written = WavStream(pipe, 8000), np.empty(0, np.int16)  # type: ignore[arg-type]
    for part in parts():
        wav.append(part)
        written = np.concatenate([written, part])
        samples, rate = soundfile.read(io.BytesIO(pipe.data), dtype="int16")
        assert rate == 8000
        assert np.array_equal(samples, written)
    wav.close()
    assert not pipe.closed
    with wave.open(io.BytesIO(pipe.data)) as strict:
        assert strict.getparams()[:3] == (1, 2, 8000)
        assert strict.readframes(10**9) == written.astype("<i2").tobytes()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell whether a file is appended to")
def test_a_stream_into_a_file_has_its_sizes_at_the_end(tmp_path: Path) -> None:
    for mode, known in (("wb", True), ("ab", False)):
        path = tmp_path / f"{mode}.wav"
        with path.open(mode) as file:
            wav = WavStream(file, 8000)
            wav.append(np.arange(1000, dtype=np.int16))
            wav.append(np.arange(500, dtype=np.int16))
            wav.close()
            wav.close()
        with wave.open(str(path), "rb") as found:
            assert (found.getnframes() == 1500) == known
        assert path.stat().st_size == HEADER + 2 * 1500
        assert soundfile.read(path, dtype="int16")[0][-1] == 499


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DfError, match=r"could not write .*: File name too long"):
        WavFile(tmp_path / ("a" * 300), 8000).append(parts()[0])
    with pytest.raises(DfError, match=r"could not write .*: Is a directory"):
        WavFile(tmp_path, 8000).append(parts()[0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files ends writing as a full disk does; what was written stays a wav."""
    program = """
import resource, signal, sys, numpy
from dfcli.errors import DfError
from dfcli.generation.wav import WavFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
wav = WavFile(__import__("pathlib").Path(sys.argv[1]), 8000)
wav.append(numpy.ones(1000, numpy.int16))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    wav.append(numpy.ones(100_000, numpy.int16))
except DfError as error:
    print(error.message)
wav.close()
"""
    out = tmp_path / "out.wav"
    done = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=True)
    assert "could not write" in done.stdout
    samples, _ = soundfile.read(out, dtype="int16")
    assert samples.tolist() == [1] * 1000  # what was not written whole does not count


def test_pcm() -> None:
    samples = np.array([0, 1, -1, 0.5, 2, -2, 1e-9], np.float32)
    assert pcm(samples).tolist() == [0, 32767, -32767, 16384, 32767, -32767, 0]
    assert pcm(samples).dtype == np.int16
