"""Commands run as a person runs them: in a process of their own, with their exit code and both streams."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

import dfcli
from dfcli.cli import app, signals


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find the package under test from every folder."""
    monkeypatch.setenv("PYTHONPATH", str(Path(dfcli.__file__).parent.parent))


Df = Callable[..., Ended]


@pytest.fixture
def df(tmp_path: Path, home: Path) -> Df:
    """`df("runs", "list", stdin="...", VARIABLE="...")` in an empty folder; no traceback is ever shown."""

    def call(*words: object, stdin: str | bytes | None = None, program: str = "df", **environment: str) -> Ended:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        code = f"import sys; sys.argv[0] = {program!r}; from dfcli.cli.app import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            input=b"" if data is None else data,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment},
            timeout=100,
            check=False,
        )
        ended = Ended(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in ended.err, ended.err
        return ended

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Df:
    """As `df`, but inside this process, where PyTorch is imported already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(signals, "exit_on_termination", lambda: None)

    def call(*words: object, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = app.run([str(word) for word in words])
        shown = capfd.readouterr()
        return Ended(code, shown.out, shown.err)

    return call


TINY = {"layers": "1", "heads": "2", "channels": "16", "context": "16", "compile": "off"}
TINY_WAVENET = {"dilations": "1,2,4", "cycles": "1", "residual": "8", "skip": "8", "compile": "off"}
TEXT = "It was the best of times, it was the worst of times.\nIt was the age of wisdom.\n" * 40


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data home with the runs `call` (a WaveNet of text), `talk` (a GPT) and `tune` (a WaveNet), in order of age."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "talk.txt").write_text(TEXT)
    (folder / "names.txt").write_text("\n".join(f"{a}n{b}" for a in "abcdefghij" for b in ("na", "nie", "o")) + "\n")
    time = np.arange(4000) / 4000
    for i in range(6):
        tone = 0.5 * np.sin(2 * np.pi * (200 + 50 * i) * time)
        soundfile.write(folder / f"tone-{i}.wav", tone, 4000)
    (folder / "tones").mkdir()
    for path in folder.glob("tone-*.wav"):
        path.rename(folder / "tones" / path.name)
    options = {"steps": 12, "batch_size": 4, "seed": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFCLI_HOME", str(folder / "home"))
        dfcli.train(
            "wavenet", [str(folder / "names.txt")], name="call", preset="makemore", steps=12,
            overrides={"hidden": "8", "embedding": "4"},
        )  # fmt: skip
        dfcli.train("gpt", [str(folder / "talk.txt")], name="talk", overrides=TINY, **options)
        dfcli.train("wavenet", [str(folder / "tones")], name="tune", overrides=TINY_WAVENET, **options)
    return folder


@pytest.fixture
def trained(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` that a test may change; its home is the data home."""
    copy = tmp_path / "made"
    shutil.copytree(made, copy)
    monkeypatch.setenv("DFCLI_HOME", str(copy / "home"))
    return copy
