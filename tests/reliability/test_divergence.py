"""Losses that are not finite, at the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs fork", allow_module_level=True)

from dfcli.runs.run import Run
from dfcli.training.trainer import Trainer
from tests.reliability import material
from tests.reliability.warm import Child, app

STEPS = 12


def train(folder: Path, home: Path, broken: set[int], *more: str) -> tuple[int, str]:
    """`df train` with a loss that is not a number at these steps; its code and what it said."""
    if not (folder / "text.txt").exists():
        material.data(folder)
    words = [*material.trainings(folder, STEPS)["gpt, adamw, accumulated"], "--name", "r", *more]

    def work() -> int:
        real = Trainer.backward
        Trainer.backward = lambda self, batch, count: (
            real(self, batch, count) * (float("nan") if self.state.step in broken else 1)
        )
        return app.run(words)

    child = Child(work, folder / "said", home)
    return child.wait(), child.said()


def test_it_stops_before_the_update_and_keeps_the_last_good_checkpoint(tmp_path: Path, home: Path):
    code, said = train(tmp_path, home, {7})
    assert code == 1
    assert "error: the loss of step 8 is not finite" in said
    assert "the checkpoint of step 6 is kept" in said
    assert "hint: " in said
    assert "--lr" in said
    assert Run.open(home / "runs" / "r").load("last", optimizer=True).step == 6


def test_on_request_batches_are_skipped_and_counted(tmp_path: Path, home: Path):
    code, said = train(tmp_path, home, {3, 7}, "--set", "on_nonfinite=skip", "--json")
    assert code == 0, said
    result = json.loads(said)
    assert (result["skipped"], result["steps"]) == (2, STEPS)
    assert [row["step"] for row in Run.open(home / "runs" / "r").metrics() if "train_loss" not in row] == [4, 8]


def test_their_number_is_bounded(tmp_path: Path, home: Path):
    code, said = train(tmp_path, home, set(range(1, STEPS)), "--set", "on_nonfinite=skip")
    assert code == 1
    assert "the loss of step 12 is not finite (10 batches were left out before)" in said


def test_it_cannot_be_asked_for_wrongly(tmp_path: Path, home: Path):
    for more in (["--set", "on_nonfinite=go"], ["--set", "on_nonfinite=skip", "--set", "on_nonfinite=stop"]):
        code, said = train(tmp_path, home, set(), *more)
        assert code == 2
        assert "nonfinite" in said
    assert not (home / "runs").exists()
