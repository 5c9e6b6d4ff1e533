"""Wavs that grow: whole after every append, to the bit what was appended, and clear when they cannot be written."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import wave
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


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DfError, match=r"could not write .*: No such file or directory"):
        WavFile(tmp_path / "missing" / "out.wav", 8000)
    with pytest.raises(DfError, match=r"could not write .*: Is a directory"):
        WavFile(tmp_path, 8000)


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
    assert len(samples) >= 1000
    assert (samples == 1).all()


def test_pcm() -> None:
    samples = np.array([0, 1, -1, 0.5, 2, -2, 1e-9], np.float32)
    assert pcm(samples).tolist() == [0, 32767, -32767, 16384, 32767, -32767, 0]
    assert pcm(samples).dtype == np.int16
