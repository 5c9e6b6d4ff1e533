"""Trainings of every kind that are stopped and resumed end as one that never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs fork", allow_module_level=True)

from dfcli.training.trainer import Trainer
from tests.reliability import material
from tests.reliability.crash_loop import end_of, undisturbed
from tests.reliability.warm import Child, app

KINDS = list(material.trainings(Path(), 1))


def until(line: list[str], home: Path, last: int | None) -> int:
    """Train in a child that is asked to stop when it begins step `last`."""

    def work() -> int:
        real = Trainer.gradients

        def gradients(self: Trainer, step: int) -> tuple[float, int, float]:
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, step)

        Trainer.gradients = gradients
        return app.run(line)

    child = Child(work, home.with_name("said"), home)
    code = child.wait()
    assert "error" not in child.said(), child.said()
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_at_the_command_line(kind: str, tmp_path: Path, home: Path):
    """Weights, optimiser, metrics, result and samples; stopped on and off the steps that evaluate, save and log."""
    material.data(tmp_path)
    line = [*material.trainings(tmp_path, 8)[kind], "--name", "r", "--resume"]
    reference = undisturbed(line, tmp_path / "undisturbed")
    for step in (0, 2, 6):
        assert until(line, home, step) == 143
    for _ in range(2):  # a finished one is left alone
        assert until(line, home, None) == 0
        end = end_of(home)
        there = dict(zip(end.pop("steps"), end.pop("checkpoints"), strict=True))  # also those of the stops
        assert there[8] == reference.checkpoints[8]
        assert all(reference.checkpoints.get(step, hashes) == hashes for step, hashes in there.items())
        assert end == {key: reference.end[key] for key in end}
