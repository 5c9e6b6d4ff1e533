from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dfcli.errors import DfError
from dfcli.ingest import builtin
from dfcli.ingest.audio import Recording
from dfcli.ingest.builtin import builtin_sources, library_text, melody, pluck

LIBRARY = Path(sysconfig.get_path("stdlib"))


def test_text_is_a_few_mb_of_ascii_python(home: Path) -> None:
    (path,) = builtin_sources("text")
    assert path.is_relative_to(home)
    text = path.read_bytes().decode("ascii")
    assert 1 << 20 < len(text) <= builtin.LIBRARY_BYTES
    assert "\r" not in text
    assert text.count("\ndef ") > 500
    assert path.read_bytes() == library_text(LIBRARY)


def test_text_is_written_once(home: Path) -> None:
    (path,) = builtin_sources("text")
    before = path.stat()
    assert builtin_sources("text") == [path]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_modules_are_chosen_by_name_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "LIBRARY_BYTES", 2000)
    monkeypatch.setattr(builtin, "LARGEST_MODULE", 1000)
    for name, source in {
        "b": b"b = 1\r\n" * 100,
        "a": b"\n\na = 1\n",
        "c": "c = 'ü'\n".encode(),
        "d": b"#" * 1000,
        "e": b"",
        "f": b"f = 1\n" * 166,
        "g": b"g = 1\n" * 150,
        "h": b"h = 1\n",
    }.items():
        (tmp_path / f"{name}.py").write_bytes(source)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "z.py").write_bytes(b"z = 1\n")
    made = library_text(tmp_path)  # c is not ASCII, d is long, e is empty, g no longer fits
    assert made == b"a = 1\n\n\n" + b"b = 1\n" * 100 + b"\n\n" + b"f = 1\n" * 166 + b"\n\n" + b"h = 1\n"


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DfError, match="came without the sources") as caught:
        library_text(tmp_path)
    assert "--data" in caught.value.hint


def test_melodies_are_thirty_recordings_of_90_seconds(home: Path) -> None:
    (folder,) = builtin_sources("audio")
    assert folder.is_relative_to(home)
    files = sorted(folder.iterdir())
    assert len(files) == 30
    seconds = 0.0
    for path in files:
        recording = Recording(path)
        samples = np.concatenate(list(recording.stream()))
        assert (recording.rate, recording.channels) == (8000, 1)
        report = recording.report
        assert report is not None
        assert report.peak == pytest.approx(0.8, abs=1e-3)
        assert not report.silent
        assert report.clipped == 0
        assert abs(report.offset) < 0.01
        assert np.sqrt((samples**2).mean()) > 0.05  # neither silence ...
        assert np.abs(np.diff(samples)).mean() < 0.5 * np.abs(samples).mean()  # ... nor noise (1.4)
        seconds += len(samples) / 8000
    assert 80 < seconds < 100


def test_melodies_are_all_different_and_always_the_same(home: Path) -> None:
    made = [melody(number) for number in range(30)]
    assert len({sound.tobytes() for sound in made}) == 30
    assert all((sound == melody(number)).all() for number, sound in enumerate(made))
    (folder,) = builtin_sources("audio")
    stored, _ = soundfile.read(folder / "melody-01.wav", dtype="float32")
    np.testing.assert_allclose(stored, made[0], atol=2 / 32768)
    before = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert builtin_sources("audio") == [folder]
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == before


@pytest.mark.parametrize("frequency", [110, 440, 700])
def test_a_pluck_has_its_pitch_and_dies_away(frequency: float) -> None:
    sound = pluck(frequency, 4800)
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(4800)))
    assert spectrum.argmax() * 8000 / 4800 == pytest.approx(frequency, abs=2)
    assert np.abs(sound[:800]).max() > 5 * np.abs(sound[-800:]).max()
    assert sound[0] == sound[-1] == 0
