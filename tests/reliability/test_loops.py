"""The long tests of this folder, a few rounds of each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("they need fork, and read /proc", allow_module_level=True)

from tests.reliability.crash_loop import crash_loop
from tests.reliability.fault_loop import fault_loop
from tests.reliability.fuzz import fuzz
from tests.reliability.long_run import long_run


def test_kill_at_random_moments(tmp_path: Path):
    figures = crash_loop(tmp_path, 5, seed=1, programs=False)
    assert figures["kills"] == 5
    assert figures["trainings_finished_equal_to_the_undisturbed_one"] >= 1


@pytest.mark.parametrize("command", ["prepare text", "train on", "sample to a file", "remove a dataset"])
def test_a_disk_that_fails(tmp_path: Path, command: str):
    figures = fault_loop(tmp_path, 3, only=command)
    assert figures["defects"] == []
    assert figures["faults"] == 9


def test_hostile_input(tmp_path: Path):
    figures = fuzz(tmp_path, 100, seed=3)
    assert figures["defects"] == []
    assert figures["cases"] == 100


def test_a_longer_training(tmp_path: Path):
    assert long_run(tmp_path, 400)["steps"] == 400
