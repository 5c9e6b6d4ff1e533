"""Whole trainings on a terminal: Ctrl-C once and twice, termination, and a terminal that is closed."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs fork and a pseudo-terminal", allow_module_level=True)

from dfcli.cli import app
from dfcli.runs.run import Run
from dfcli.training.trainer import Trainer
from tests.reliability import material
from tests.reliability.warm import Child, command

SHOW, HIDE = b"\x1b[?25h", b"\x1b[?25l"


class Training:
    """`df train` on a pseudo-terminal, with steps of 20 ms; from the fifth on a step never ends if `stuck`."""

    def __init__(self, folder: Path, home: Path, stuck: bool = False) -> None:
        material.data(folder)
        self.home, self.seen = home, b""
        words = [*material.trainings(folder, 10_000, material.SELDOM)["gpt, muon"], "--name", "r"]
        words.remove("--quiet")

        def work() -> int:
            real = Trainer.gradients

            def gradients(self: Trainer, step: int) -> tuple[float, int, float]:
                time.sleep(60 if stuck and step == 5 else 0.02)
                return real(self, step)

            Trainer.gradients = gradients
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
            return app.run(words)

        self.child = Child(work, folder / "said", home, terminal=True)

    def read_until(self, text: bytes, seconds: float = 30) -> None:
        began = time.monotonic()
        while text not in self.seen:
            assert time.monotonic() - began < seconds, self.seen[-3000:].decode(errors="replace")
            self._read(0.1)

    def wait_for_a_step(self) -> None:
        """A step is made and the live view is there."""
        self.read_until(HIDE)
        history = self.home / "runs" / "r" / "metrics.jsonl"
        while not history.exists() or history.read_bytes().count(b"\n") < 2:
            self._read(0.02)
            assert self.child.ended() is None, self.seen.decode(errors="replace")

    def _read(self, seconds: float) -> bool:
        if not select.select([self.child.terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.child.terminal, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            return False
        self.seen += data
        return bool(data)

    def end(self, seconds: float = 30) -> int:
        """Its exit code, once all that it printed was read."""
        began = time.monotonic()
        while (status := self.child.ended()) is None:
            assert time.monotonic() - began < seconds, self.seen[-3000:].decode(errors="replace")
            self._read(0.05)
        while (
            self._read(0.05)
            and time.monotonic() - began < seconds
            and select.select([self.child.terminal], [], [], 0)[0]
        ):
            pass
        os.close(self.child.terminal)
        return status

    def press(self, key: bytes) -> None:
        os.write(self.child.terminal, key)

    def check_saved(self) -> None:
        """The last step is in a checkpoint, and none before was: it was saved because of the signal."""
        run = Run.open(self.home / "runs" / "r")
        assert len(run.steps()) == 1
        assert run.load("last", optimizer=True).state["step"] == run.steps()[0] > 0

    def check_cursor(self) -> None:
        assert HIDE in self.seen
        assert self.seen.rindex(SHOW) > self.seen.rindex(HIDE), "the cursor stays hidden"
        assert b"Traceback" not in self.seen


@pytest.fixture
def training(tmp_path: Path, home: Path) -> Training:
    started = Training(tmp_path, home)
    started.wait_for_a_step()
    return started


def test_ctrl_c_saves_and_says_how_to_go_on(training: Training):
    training.press(b"\x03")
    assert training.end() == 130
    training.check_saved()
    training.check_cursor()
    assert b"saved first" in training.seen
    assert b"to go on: df train gpt" in training.seen.replace(b"\r\n", b" ")
    assert b"--resume" in training.seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_saves(training: Training, number: int):
    training.child.kill(number)
    assert training.end() == 143
    training.check_saved()
    training.check_cursor()


def test_a_closed_terminal_saves(training: Training):
    os.close(training.child.terminal)  # the system sends SIGHUP, and everything printed fails
    assert training.child.wait(30) == 143
    training.check_saved()


def test_ctrl_c_twice_stops_at_once(tmp_path: Path, home: Path):
    training = Training(tmp_path, home, stuck=True)
    training.wait_for_a_step()
    time.sleep(0.5)
    training.press(b"\x03")
    training.read_until(b"saved first")
    began = time.monotonic()
    training.press(b"\x03")
    assert training.end() == 130
    assert time.monotonic() - began < 5
    training.check_cursor()


@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize(
    "words",
    [
        ["train", "gpt"],
        ["sample", "gpt", "--run", "talk", "--tokens", "400", "--engine", "plain"],
        ["runs", "list"],
        ["data", "list"],
        ["eval", "--run", "talk", "--json"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_pipe_that_is_closed_is_quiet(words: list[str], stream: int, tmp_path: Path, home: Path):
    """As behind `| head -1`: nothing is said of it; what only tells how work goes does not end that work."""
    material.data(tmp_path)
    training = material.trainings(tmp_path, 4)["gpt, muon"]
    assert command([*training, "--name", "talk"], tmp_path / "said", home).wait() == 0
    if words[0] == "train":
        words = [word for word in training if word != "--quiet"] + ["--name", "r", "--json"]

    kept: list[object] = []

    def work() -> int | None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, stream)
        kept.append(sys.stdout if stream == 1 else sys.stderr)  # its end would close the descriptor
        setattr(sys, "stdout" if stream == 1 else "stderr", os.fdopen(stream, "w"))
        try:
            app.main(words)
        except SystemExit as ended:
            return int(ended.code or 0)

    child = Child(work, tmp_path / "said", home)
    code = child.wait()
    said = child.said() if stream == 1 else ""  # else: what was to be said is data
    assert code == (1 if stream == 1 else 0), said
    assert "Traceback" not in said
    assert "error" not in said.lower()
    if words[0] == "train":
        assert Run.open(home / "runs" / "r").load("last", optimizer=True).step == 4
