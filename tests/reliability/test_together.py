"""Several commands at once on the same runs and datasets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs fork", allow_module_level=True)

from dfcli.runs.run import Run
from dfcli.training.trainer import Trainer
from tests.reliability import material
from tests.reliability.crash_loop import at, end_of, undisturbed
from tests.reliability.warm import Child, app, command

STEPS = 12


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    material.data(tmp_path)
    return [*material.trainings(tmp_path, STEPS)["gpt, muon"], "--name", "r"]


def held(line: list[str], home: Path, folder: Path) -> Child:
    """A training that goes on only when the file `go` is there, from its second step on."""

    parent = os.getpid()

    def work() -> int:
        real = Trainer.gradients

        def gradients(self: Trainer, step: int) -> tuple[float, int, float]:
            while step > 3 and not (folder / "go").exists() and os.getppid() == parent:
                time.sleep(0.01)
            return real(self, step)

        Trainer.gradients = gradients
        return app.run(line)

    child = Child(work, folder / "first", home)
    wait_for(lambda: (home / "runs" / "r").exists() and bool(at(home).steps()), child)
    return child


def wait_for(there: Callable[[], bool], child: Child) -> None:
    while not there():
        assert child.ended() is None, child.said()
        assert not child.hangs(60)
        time.sleep(0.005)


def df(words: list[str], home: Path) -> tuple[int, str]:
    child = command(words, home.with_name("said"), home)
    return child.wait(), child.said()


def test_a_second_training_is_told_at_once_who_trains(line: list[str], tmp_path: Path, home: Path):
    reference = undisturbed([*line, "--resume"], tmp_path / "undisturbed")
    first = held(line, home, tmp_path)
    code, said = df([*line, "--resume"], home)
    assert code == 1
    assert f"run `r` is in use by process {first.pid} on " in said
    code, said = df(line, home)
    assert code == 2
    assert f"in use by process {first.pid} on " in said
    (tmp_path / "go").touch()
    assert first.wait() == 0
    assert end_of(home) == reference.end


def test_of_two_that_begin_together_one_trains(line: list[str], tmp_path: Path, home: Path):
    for number in range(3):
        words = [*line[:-1], f"r{number}"]
        pair = [command(words, tmp_path / f"said-{i}", home) for i in range(2)]
        codes = [child.wait() for child in pair]
        said = [child.said() for child in pair]
        assert min(codes) == 0, said
        assert max(codes) in (1, 2), said
        assert sum("error: " in text for text in said) == 1, said
        assert Run.open(home / "runs" / f"r{number}").load("last", optimizer=True).step == STEPS


def test_what_is_in_training_can_be_used_and_not_removed(line: list[str], tmp_path: Path, home: Path):
    reference = undisturbed([*line, "--resume"], tmp_path / "undisturbed")
    first = held(line, home, tmp_path)
    (data,) = (path.name for path in (home / "datasets").iterdir() if not path.name.startswith("."))
    for words in (
        ["sample", "gpt", "--run", "r", "--tokens", "5", "--engine", "plain"],
        ["sample", "gpt", "--run", "r", "--tokens", "5", "--engine", "plain", "--checkpoint", "last"],
        ["eval", "--run", "r"],
        ["runs", "list"],
        ["runs", "show", "r"],
        ["data", "list"],
        ["data", "show", data],
    ):
        code, said = df(words, home)
        assert code == 0, said
    for words in (["runs", "remove", "r", "--yes"], ["data", "remove", data, "--yes"]):
        code, said = df(words, home)
        assert code == 1
        assert " is in use" in said
    (tmp_path / "go").touch()
    assert first.wait() == 0
    assert end_of(home) == reference.end
    for words in (["runs", "remove", "r", "--yes"], ["data", "remove", data, "--yes"]):
        assert df(words, home)[0] == 0


def test_readers_beside_a_trainer_that_saves_all_the_time(tmp_path: Path, home: Path):
    material.data(tmp_path)
    pace = ["log_every=1", "eval_every=3", "checkpoint_every=1"]
    line = [*material.trainings(tmp_path, 100, pace)["gpt, muon"], "--name", "r"]
    trainer = command(line, tmp_path / "first", home)
    wait_for(lambda: (home / "runs" / "r").exists() and bool(at(home).steps()), trainer)
    sample = ["sample", "gpt", "--run", "r", "--tokens", "3", "--engine", "plain", "--checkpoint"]
    status = None
    while status is None:
        for which in ("best", "last"):
            code, said = df([*sample, which], home)
            assert code == 0, said
        status = trainer.ended()
    assert status == 0, trainer.said()
