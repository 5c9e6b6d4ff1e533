from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from dfcli.errors import DfError
from dfcli.ingest import audio, soundfiles
from dfcli.ingest.audio import Recording
from dfcli.ingest.metering import Report
from dfcli.ingest.resampling import Resampler

RNG = np.random.default_rng(0)


def tone(seconds: float = 0.5, rate: int = 8000, channels: int = 1, level: float = 0.5) -> np.ndarray:
    """float32 [n, channels]: a tone with some noise, a little different in each channel."""
    t = np.arange(round(seconds * rate)) / rate
    sound = level * np.sin(2 * np.pi * 440 * t)[:, None] * np.linspace(1, 0.5, channels)
    return (sound + 0.01 * np.random.default_rng(1).standard_normal(sound.shape)).astype(np.float32)


def read(path: Path, rate: int | None = None, normalize: str = "none") -> np.ndarray:
    return np.concatenate([block.copy() for block in Recording(path).stream(rate, normalize)])


def wav(
    data: bytes = b"\0\0" * 100,
    *,
    code: int = 1,
    channels: int = 1,
    rate: int = 8000,
    bits: int = 16,
    frame: int | None = None,
    size: int | None = None,
    before: bytes = b"",
    extra: bytes = b"",
    riff: bytes = b"RIFF",
) -> bytes:
    """A wav file, byte by byte, whose fields may lie."""
    order = ">" if riff == b"RIFX" else "<"
    frame = channels * bits // 8 if frame is None else frame
    layout = struct.pack(order + "HHIIHH", code, channels, rate, rate * frame % 2**32, frame % 2**16, bits) + extra
    head = b"WAVE" + before + b"fmt " + struct.pack(order + "I", len(layout)) + layout
    body = b"data" + struct.pack(order + "I", len(data) if size is None else size) + data
    return riff + struct.pack(order + "I", len(head + body) % 2**32) + head + body


def write(folder: Path, content: bytes, name: str = "a.wav") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize(
    ("container", "subtype", "rate"),
    [
        *[("WAV", s, r) for s, r in [("PCM_U8", 8000), ("PCM_16", 44_100), ("PCM_24", 96_000), ("PCM_32", 11_025)]],
        *[("WAV", s, 22_050) for s in ("FLOAT", "DOUBLE", "ULAW", "ALAW")],
        *[("WAVEX", "PCM_24", 48_000), ("RF64", "PCM_16", 16_000), ("W64", "PCM_24", 44_100), ("CAF", "FLOAT", 8000)],
        *[("AIFF", s, 44_100) for s in ("PCM_S8", "PCM_U8", "PCM_24", "FLOAT", "ULAW")],
        *[("AU", s, 8000) for s in ("PCM_16", "ALAW", "DOUBLE")],
        *[("FLAC", s, 16_000) for s in ("PCM_S8", "PCM_16", "PCM_24")],
        *[("OGG", "VORBIS", 22_050), ("OGG", "OPUS", 48_000), ("MP3", "MPEG_LAYER_III", 32_000)],
    ],
)
def test_every_format_is_read_as_soundfile_reads_it(
    container: str, subtype: str, rate: int, channels: int, tmp_path: Path
) -> None:
    if container == "MP3" and channels > 2:
        pytest.skip("MP3 has two channels")
    path = tmp_path / "sound"  # no extension: what a file is, it says itself
    soundfile.write(path, tone(0.7, rate, channels), rate, subtype=subtype, format=container)
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    recording = Recording(path)
    assert (recording.rate, recording.channels, recording.frames) == (rate, channels, len(expected))
    assert recording.report is None
    samples = np.concatenate(list(recording.stream()))
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, expected.mean(axis=1), atol=1e-6)
    assert recording.report is not None
    assert recording.report.frames == len(expected)
    assert recording.report.peak == pytest.approx(np.abs(expected).max())
    assert recording.report.offset == pytest.approx(expected.mean(), abs=1e-6)
    assert not recording.report.silent


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_blocks_do_not_change_what_is_read(container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sound"
    soundfile.write(path, tone(1.5, 16_000, 2), 16_000, format=container)
    whole, report = read(path, 11_025), None
    monkeypatch.setattr(audio, "BLOCK", 1000)
    recording = Recording(path)
    blocks = [block.copy() for block in recording.stream(11_025)]
    report = recording.report
    assert report is not None
    assert len(blocks) > 20
    assert max(map(len, blocks)) <= 2000
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-5)
    assert report.frames == len(whole) == round(24_000 * 11_025 / 16_000)


def test_a_big_endian_wav(tmp_path: Path) -> None:
    samples = (tone() * 32767).astype(">i2")
    path = write(tmp_path, wav(samples.tobytes(), riff=b"RIFX"))
    np.testing.assert_array_equal(read(path), samples[:, 0].astype(np.float32) / 32768)


def test_other_chunks_are_passed_over(tmp_path: Path) -> None:
    before = b"LIST" + struct.pack("<I", 5) + b"INFOx\0" + b"junk" + struct.pack("<I", 0)
    path = write(tmp_path, wav(b"\1\0" * 50, before=before) + b"cue \0\0")
    assert len(read(path)) == 50


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_written_to_a_pipe_goes_on_to_the_end(size: int, tmp_path: Path) -> None:
    assert len(read(write(tmp_path, wav(b"\1\0" * 50, size=size)))) == 50


@pytest.mark.parametrize("container", ["FLAC", "MP3"])
def test_tags_before_the_stream_are_passed_over(container: str, tmp_path: Path) -> None:
    path = tmp_path / "sound"
    soundfile.write(path, tone(), 8000, format=container)
    plain = read(path)
    tag = b"ID3\4\0\x10\0\0\2\1" + b"x" * (2 * 128 + 1) + b"3DI" + b"f" * 7
    path.write_bytes(tag * 2 + path.read_bytes())
    np.testing.assert_array_equal(read(path), plain)


# Levels ---------------------------------------------------------------------------------------------------------------


def report_of(samples: np.ndarray, tmp_path: Path, subtype: str = "FLOAT") -> Report:
    path = tmp_path / "levels.wav"
    soundfile.write(path, samples, 8000, subtype=subtype)
    recording = Recording(path)
    assert sum(map(len, recording.stream())) == len(samples)
    assert recording.report is not None
    return recording.report


def test_levels(tmp_path: Path) -> None:
    assert report_of(np.zeros(100), tmp_path).silent
    assert report_of(np.full(100, 0.25), tmp_path).silent  # nothing moves
    assert report_of(np.full(100, 0.25), tmp_path).offset == 0.25
    loud = np.concatenate([np.full(25, 1.0), np.full(25, -1.0), np.zeros(50)])
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "ULAW", "ALAW", "FLOAT"):
        assert report_of(loud, tmp_path, subtype).clipped == 0.5, subtype
        assert report_of(loud * 0.9, tmp_path, subtype).clipped == 0, subtype
    beyond = report_of(loud * 3, tmp_path)
    assert (beyond.peak, beyond.clipped) == (3, 0.5)
    assert not beyond.silent
    stereo = np.stack([loud, -loud], axis=1)
    assert report_of(stereo, tmp_path).silent  # the mono mix of opposites
    assert report_of(stereo, tmp_path).peak == 1


@pytest.mark.parametrize("rate", [8000, 5000])
def test_normalize(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(level=0.2) + 0.1, 8000, subtype="FLOAT")
    plain = read(path, rate)
    np.testing.assert_allclose(read(path, rate, "peak"), plain / np.abs(plain).max(), atol=1e-6)
    scaled = (plain - plain.min()) / (plain.max() - plain.min() + 1e-6) * 2 - 1
    np.testing.assert_allclose(read(path, rate, "minmax"), scaled, atol=1e-5)
    with pytest.raises(ValueError, match="normalize must be"):
        read(path, rate, "loud")


def test_normalizing_silence_makes_no_noise(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(100, 1e-5), 8000, subtype="FLOAT")
    assert np.abs(read(path, None, "peak")).max() < 1e-4
    assert np.isfinite(read(path, None, "minmax")).all()


# Resampling -----------------------------------------------------------------------------------------------------------


def resample(samples: np.ndarray, source: int, target: int, cuts: list[int]) -> np.ndarray:
    resampler = Resampler(source, target)
    parts = [resampler.feed(part) for part in np.split(samples, cuts)]
    return np.concatenate([*parts, resampler.finish()])


RATES = [(44_100, 16_000), (8000, 16_000), (22_050, 8000), (3, 7), (44_099, 16_000), (100, 1_000_000), (1_000_000, 100)]


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampling_is_the_same_wherever_it_is_cut(source: int, target: int) -> None:
    """And takes little memory for rates without a common divisor, where a dense kernel would take gigabytes."""
    length = max(3, min(100_000, 300_000 * source // target))
    samples = RNG.uniform(-1, 1, length).astype(np.float32)
    whole = resample(samples, source, target, [])
    assert whole.dtype == np.float32
    assert abs(len(whole) - length * target / source) <= 0.5
    cut = resample(samples, source, target, sorted(RNG.integers(0, length, 9).tolist()))
    np.testing.assert_array_equal(cut, whole)


def test_a_rate_that_would_need_an_endless_filter_is_refused() -> None:
    with pytest.raises(DfError, match="it has 1 Hz and cannot be brought to 1,000,000 Hz"):
        Resampler(1, 1_000_000)


def test_a_tone_stays_a_tone_and_what_cannot_be_kept_is_removed() -> None:
    t = np.arange(44_100) / 44_100
    low, high = np.sin(2 * np.pi * 1000 * t), np.sin(2 * np.pi * 12_000 * t)
    made = resample((low + high).astype(np.float32), 44_100, 16_000, [])
    expected = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert np.abs(made - expected)[200:-200].max() < 1e-4


def test_extreme_rates() -> None:
    assert len(resample(np.ones(50, np.float32), 100, 384_000, [])) == 50 * 3840
    assert len(resample(np.ones(38_400, np.float32), 384_000, 100, [])) == 10
    assert len(resample(np.zeros(0, np.float32), 8000, 16_000, [])) == 0


def test_memory_is_flat_however_long_the_recording(tmp_path: Path) -> None:
    def peak(seconds: int) -> int:
        path = tmp_path / "long.wav"
        with soundfile.SoundFile(path, "w", 44_100, 2, "PCM_16") as file:
            for _ in range(seconds):
                file.write(tone(1, 44_100, 2))
        tracemalloc.start()
        for _ in Recording(path).stream(16_000):
            pass
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached

    short = peak(10)
    assert peak(60) < 1.05 * short < 32 << 20


# Hostile files --------------------------------------------------------------------------------------------------------

PIECE = b"\1\0" * 100
FLOATS = np.zeros(100, "<f4").tobytes()
HOSTILE = {
    "nothing": (b"", "it is empty"),
    "text": (b"To be, or not to be\n", "it is text, not sound"),
    "zeros": (bytes(5000), "it is not wav, FLAC, Ogg or MP3"),
    "html": (b"<!doctype html><html>", "it is text, not sound"),
    "tag only": (b"ID3\4\0\0\0\0\0\0", "it is not wav"),
    "endless tags": (b"ID3\4\0\0\0\0\0\0" * 1000, "it is not wav"),
    "wav: 8 bytes": (b"RIFFxxxx", "begins like a wav, and its header is cut off"),
    "wav: 12 bytes": (wav()[:12], "it holds no sound"),
    "wav: half a header": (wav()[:30], "incomplete|no sound"),
    "wav: header only": (wav(b""), "it holds no sound"),
    "wav: less than a frame": (wav(b"\0"), "it holds no sound"),
    "wav: no format": (wav().replace(b"fmt ", b"fmtx"), "does not say how"),
    "wav: MS ADPCM": (wav(PIECE, code=2, bits=4, frame=256), "Microsoft ADPCM.*not supported"),
    "wav: IMA ADPCM": (wav(PIECE, code=0x11, bits=4, frame=256), "IMA ADPCM.*not supported"),
    "wav: GSM": (wav(PIECE, code=0x31, bits=0, frame=65), "GSM 6.10.*not supported"),
    "wav: MP3": (wav(PIECE, code=0x55, bits=0, frame=1), "MP3.*not supported"),
    "wav: unknown code": (wav(PIECE, code=0x1234), "0x1234.*not supported"),
    "wav: extensible ADPCM": (
        wav(PIECE, code=0xFFFE, extra=struct.pack("<HHIH", 22, 16, 1, 2) + bytes(14)),
        "Microsoft ADPCM",
    ),
    "wav: 64-bit integers": (wav(PIECE, bits=64), "not supported"),
    "wav: 0 bits": (wav(PIECE, bits=0), "not supported"),
    "wav: 16-bit floats": (wav(PIECE, code=3), "not supported"),
    "wav: 0 channels": (wav(PIECE, channels=0), "contradicts itself"),
    "wav: wrong frame": (wav(PIECE, frame=1), "contradicts itself"),
    "wav: 65535 channels": (wav(PIECE * 999, channels=65535, bits=8), "65,535 channels"),
    "wav: 65 channels": (wav(PIECE * 99, channels=65), "65 channels"),
    "wav: 0 Hz": (wav(PIECE, rate=0), "contradicts itself"),
    "wav: 2 MHz": (wav(PIECE, rate=2 * 10**6), "2,000,000 Hz"),
    "wav: 4 GHz": (wav(PIECE, rate=2**32 - 1), "4,294,967,295 Hz"),
    "wav: NaN": (wav(FLOATS[:-4] + struct.pack("<f", np.nan), code=3, bits=32), "not a number"),
    "wav: infinity": (wav(FLOATS[:-4] + struct.pack("<f", -np.inf), code=3, bits=32), "magnitude inf"),
    "wav: 1e30": (wav(FLOATS[:-4] + struct.pack("<f", 1e30), code=3, bits=32), "magnitude 1e\\+30"),
    "wav: double 1e300": (wav(struct.pack("<d", 1e300) * 9, code=3, bits=64), "magnitude inf"),
    "flac: magic only": (b"fLaC", "cannot be decoded|no sound"),
    "flac: magic and zeros": (b"fLaC" + bytes(5000), "cannot be decoded|no sound"),
    "ogg: magic only": (b"OggS", "neither Vorbis, Opus nor FLAC"),
    "ogg: Speex": (b"OggS" + bytes(22) + b"\1\x50" + b"Speex   " + bytes(72), "neither Vorbis|cannot be decoded"),
    "mp3: noise behind a header": (
        b"\xff\xfb\x90\x64" + bytes(range(256)) * 9,
        "cannot be decoded|no sound|is not wav",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[case]
    path = write(tmp_path, content)
    with pytest.raises(DfError, match=reason) as caught:
        read(path)
    assert caught.value.message.startswith("it")
    assert str(tmp_path) not in caught.value.message  # callers name the file
    assert caught.value.message.isprintable()


def test_adpcm_is_refused_before_libsndfile_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 8000, subtype="IMA_ADPCM")

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("libsndfile was asked")

    monkeypatch.setattr(soundfile, "SoundFile", opened)
    with pytest.raises(DfError, match="IMA ADPCM"):
        Recording(path)


def sound(container: str, subtype: str | None = None) -> bytes:
    """Six seconds of the tone at 16 kHz as a file of this format."""
    file = io.BytesIO()
    soundfile.write(file, tone(6, 16_000), 16_000, format=container, subtype=subtype)
    return file.getvalue()


def noted(folder: Path, content: bytes) -> tuple[int, str]:
    """How many samples of a file are read, and what is said of it."""
    recording = Recording(write(folder, content, "a"))
    samples = sum(map(len, recording.stream()))
    assert recording.report is not None
    return samples, "; ".join(recording.report.notes)


FORMATS = [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AIFF", None),
           ("CAF", None), ("AU", None), ("W64", None)]  # fmt: skip


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_a_recording_that_is_cut_off_is_read_to_the_cut(container: str, subtype: str | None, tmp_path: Path) -> None:
    content = sound(container, subtype)
    assert noted(tmp_path, content) == (96_000, "")
    for part in (0.5, 0.9):
        samples, note = noted(tmp_path, content[: int(len(content) * part)])
        assert 96_000 * (part - 0.25) < samples < 96_000 * (part + 0.05)
        assert "cut off" in note


@pytest.mark.parametrize(("container", "subtype"), [*FORMATS[:5]])
def test_joined_recordings_are_read_to_their_true_end(container: str, subtype: str | None, tmp_path: Path) -> None:
    content = sound(container, subtype)
    samples, note = noted(tmp_path, content * 2)
    assert abs(samples - 192_000) <= 2 * 1152  # a tag in the midst of an mp3 is a frame of silence
    assert note == ""
    samples, note = noted(tmp_path, content + b"\x80rest" * 100)
    assert samples == 96_000
    assert "left out" in note


def test_an_mp3_is_read_whatever_its_first_frame_says(tmp_path: Path) -> None:
    content = sound("MP3")
    first = content.index(b"\xff\xf3", 4)
    assert b"Xing" in content[:first]
    samples, note = noted(tmp_path, content[first:])  # without its tag: libsndfile guesses from the first frame
    assert (96_000 <= samples < 98_500, note) == (True, "")
    assert noted(tmp_path, bytes(100_000) + content) == (96_000, "")
    assert noted(tmp_path, content + b"TAG" + b"x" * 125) == (96_000, "")
    samples, note = noted(tmp_path, content[: len(content) // 2] + b"junk" * 100 + content[len(content) // 2 :])
    assert samples == 96_000
    assert "400 bytes between its frames are no sound" in note


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_damaged_pages_of_ogg_are_counted(subtype: str, tmp_path: Path) -> None:
    content = bytearray(sound("OGG", subtype))
    content[content.index(b"OggS", len(content) // 3) + 200] ^= 1
    assert f"1 of {content.count(b'OggS')} Ogg pages is damaged" in noted(tmp_path, bytes(content))[1]


def test_decoders_say_nothing_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = sound("MP3")
    for k in range(20):
        damaged = bytearray(content[: len(content) - 37 * k])
        damaged[len(damaged) // 2 :: 97 + k] = bytes(len(damaged[len(damaged) // 2 :: 97 + k]))
        noted(tmp_path, bytes(damaged))
    assert capfd.readouterr() == ("", "")


def test_a_wav_whose_recorder_stopped_is_read(tmp_path: Path) -> None:
    assert noted(tmp_path, wav(b"\1\0" * 50, size=0))[0] == 50
    assert noted(tmp_path, wav(PIECE)[:-50]) == (75, "it is cut off: 0.0 of 0.0 seconds are there")
    empty = wav(b"") + b"LIST" + struct.pack("<I", 4) + b"INFO"
    with pytest.raises(DfError, match="it holds no sound"):
        noted(tmp_path, empty)


@pytest.mark.parametrize("form", ["low", "low without sign", "high"])
def test_24_bits_in_4_bytes(form: str, tmp_path: Path) -> None:
    values = np.round(tone()[:, 0] * 8388607).astype("<i4")
    stored = {"low": values, "low without sign": values & 0xFFFFFF, "high": values << 8}[form].astype("<i4")
    path = write(tmp_path, wav(stored.tobytes(), bits=24, frame=4))
    np.testing.assert_allclose(read(path), values / 8388608, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.txt", "a", "new\nline\x1b[2J.wav", "ü.wav"])
def test_the_name_does_not_matter(name: str, tmp_path: Path) -> None:
    assert len(read(write(tmp_path, wav(PIECE), name))) == 100


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.wav"))
    path.write_bytes(wav(PIECE))
    assert len(read(path)) == 100


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DfError, match="not a regular file"):
        Recording(tmp_path)
    with pytest.raises(DfError, match="cannot be read: No such file"):
        Recording(tmp_path / "missing")
    with pytest.raises(DfError, match="cannot be read"):
        Recording(tmp_path / "nul\0")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DfError, match="not a regular file"):
            Recording(tmp_path / "pipe")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, wav(PIECE))
    recording = Recording(path)

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DfError, match="cannot be read: Permission denied"):
        list(recording.stream())


def test_a_disk_error_in_the_midst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, RNG.uniform(-1, 1, 200_000), 8000)
    recording = Recording(path)

    class Failing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 100_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda path, mode: Failing(path))
    with pytest.raises(DfError, match="cannot be read: Input/output error"):
        list(recording.stream())


def test_a_bomb_is_refused_and_silence_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", 44_100, 1, "PCM_16", compression_level=1.0) as file:
        for _ in range(300):
            file.write(np.zeros(44_100, np.int16))
    assert path.stat().st_size < 50_000
    assert len(read(path)) == 300 * 44_100
    monkeypatch.setattr(soundfiles, "ALWAYS_ALLOWED", 60)
    with pytest.raises(DfError, match=r"its [\d,]+ bytes unfold to more than 0.1 hours of sound"):
        read(path)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from dfcli.ingest.audio import Recording
from dfcli.errors import DfError

rng = np.random.default_rng(int(sys.argv[1]))
folder, rounds = Path(sys.argv[2]), int(sys.argv[3])
seeds = [path.read_bytes() for path in sorted(folder.glob("seed-*"))]
path = folder / "mutant"
outcomes = [0, 0]
for _ in range(rounds):
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.integers(1, 9)):
        start = int(rng.integers(len(data)) if rng.random() < 0.4 else rng.integers(min(120, len(data))))
        kind = rng.integers(4)
        if kind == 0:
            data[start] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[start:start + 4] = rng.choice([b"\\xff" * 4, b"\\0" * 4, b"\\x7f\\xff\\xff\\xff", b"data", b"fmt "])
        elif kind == 2:
            del data[start:start + int(rng.integers(1, 200))]
        else:
            data[start:start] = rng.bytes(int(rng.integers(1, 50)))
        data = data or bytearray(b"x")
    path.write_bytes(data)
    try:
        for block in Recording(path).stream(int(rng.choice([8000, 11025, 16000])), str(rng.choice(["none", "minmax"]))):
            assert block.dtype == np.float32 and np.isfinite(block).all() and len(block)
        outcomes[0] += 1
    except DfError as error:
        assert error.message.startswith("it"), error.message
        outcomes[1] += 1
if sys.platform == "linux":
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])  # KiB; of this program alone, unlike ru_maxrss
    assert peak < 200_000, f"memory is not bounded: {peak} KiB"
print(*outcomes)
"""


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(), 8000)
    script = (
        "import sys; from pathlib import Path; from dfcli.ingest.audio import Recording\n"
        "assert 'soundfile' not in sys.modules\n"
        "print(sum(map(len, Recording(Path(sys.argv[1])).stream(16_000))))\n"
        "assert not {'torch', 'torchaudio'} & set(sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", script, str(path)], text=True) == "8000\n"


def test_mutated_files_never_crash_the_decoder(tmp_path: Path) -> None:
    for index, (container, subtype) in enumerate(
        [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
    ):
        soundfile.write(tmp_path / f"seed-{index}", tone(0.3, 8000, 2), 8000, format=container, subtype=subtype)
    rounds = int(os.environ.get("DFCLI_FUZZ_ROUNDS", "300"))
    process = subprocess.run(
        [sys.executable, "-c", FUZZ, os.environ.get("DFCLI_FUZZ_SEED", "0"), str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        timeout=60 + rounds / 10,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    read_anyway, refused = map(int, process.stdout.split())
    assert read_anyway + refused == rounds
    assert min(read_anyway, refused) > rounds / 10  # both paths were taken
