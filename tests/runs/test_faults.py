"""Every call that a run makes to the disk can fail, and the process can die there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dfcli.errors import DfError
from dfcli.runs import Run, list_runs, remove
from dfcli.system import files
from tests.faults import dies, failing, until_it_passes
from tests.runs.small import make_run, same, save, tree, weights

ERRORS = [errno.ENOSPC, errno.EIO]


def caught(n: int, error: int, lasting: bool, action: Callable[[], object]) -> tuple[bool, DfError | None]:
    """Whether the fault fired, and what came of it."""
    with failing(n, error, lasting=lasting) as faults:
        try:
            action()
        except DfError as raised:
            return faults.fired, raised
    return faults.fired, None


def two_steps() -> Run:
    """Run `r` anew, alone in the data home, with checkpoints 1 (the best) and 2."""
    home = files.data_home()
    shutil.rmtree(home, ignore_errors=True)
    template = home.with_name("template")
    if not template.exists():
        run = make_run()
        save(run, 1, 1.0)
        save(run, 2, 2.0)
        run.log({"step": 2})
        shutil.copytree(home, template)
        return run
    shutil.copytree(template, home)
    return Run.open("r")


def check_sound(run: Run) -> None:
    """All checkpoints are whole, the old ones are there or pruned by a newer one, and nothing else lies about."""
    assert run.steps() in ([1, 2], [1, 2, 3])
    for step in run.steps():
        saved = run.load(step, optimizer=True)
        assert same(saved.model, weights(step))
        assert saved.optimizer is not None
        assert saved.optimizer["moment"][0] == step
    assert run.resolve("best") == 1
    assert run.metrics() == [{"step": 2}]
    assert {name for name in os.listdir(run.path) if name.startswith(".")} <= {".lock", ".owner.json"}


def train_on(run: Run) -> None:
    with run.lock():
        save(run, 3, 3.0)


@pytest.mark.parametrize(("error", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_saving_can_fail_at_every_call(home: Path, error: int, lasting: bool):
    def attempt(n: int) -> bool:
        run = two_steps()
        fired, raised = caught(n, error, lasting, lambda: train_on(run))
        if raised is None:
            assert 3 in run.steps()
        else:
            assert str(run.path) in raised.message
            assert os.strerror(error) in raised.message
            assert raised.hint
            assert run.steps() == [1, 2]
        with run.lock():  # the next command
            check_sound(run)
            save(run, 4, 4.0)
        assert run.steps() in ([1, 2, 4], [1, 3, 4])
        return fired

    assert until_it_passes(attempt) > 20


def test_the_trainer_can_die_at_every_call(home: Path):
    def attempt(n: int) -> bool:
        run = two_steps()
        died = dies(n, lambda: train_on(run))
        for step in run.steps():  # a reader, before any cleaning
            assert same(run.load(step).model, weights(step))
        with run.lock():
            files.os.unlink(run.path / ".owner.json")
            check_sound(run)
            save(run, 4, 4.0)
        assert run.steps() in ([1, 2, 4], [1, 3, 4])
        return died

    assert until_it_passes(attempt) > 20


def test_the_trainer_can_die_at_every_call_while_it_replaces_a_step(home: Path):
    """As after a fallback: the step that was damaged comes again."""

    def again(run: Run) -> None:
        with run.lock():
            run.save(2, weights(9), {}, {})

    def attempt(n: int) -> bool:
        run = two_steps()
        died = dies(n, lambda: again(run))
        with run.lock():
            assert run.steps() == [1, 2]
            assert same(run.load(1).model, weights(1))
            new = same(run.load(2).model, weights(9))
            assert new or same(run.load(2).model, weights(2))
            assert new or died
        return died

    assert until_it_passes(attempt) > 20


@pytest.mark.parametrize("error", ERRORS)
def test_creating_can_fail_at_every_call(home: Path, error: int):
    def attempt(n: int) -> bool:
        shutil.rmtree(home, ignore_errors=True)
        fired, raised = caught(n, error, False, make_run)
        if raised is not None:
            assert str(home / "runs" / "r") in raised.message
            assert raised.hint
            if not list_runs():
                make_run()
        assert [run.name for run in list_runs()] == ["r"]
        assert os.listdir(home / "runs") == ["r"]
        return fired

    assert until_it_passes(attempt) > 8


def test_the_process_can_die_at_every_call_of_creating(home: Path):
    def attempt(n: int) -> bool:
        shutil.rmtree(home, ignore_errors=True)
        died = dies(n, make_run)
        if not list_runs():
            make_run()
        make_run("other")
        assert [run.name for run in list_runs()] == ["other", "r"]
        assert sorted(os.listdir(home / "runs")) == ["other", "r"]
        return died

    assert until_it_passes(attempt) > 8


@pytest.mark.parametrize("error", ERRORS)
def test_removing_can_fail_at_every_call(home: Path, error: int):
    def attempt(n: int) -> bool:
        run = two_steps()
        make_run("other")
        before = tree(run.path)
        fired, raised = caught(n, error, False, lambda: remove("r"))
        if raised is not None:
            assert str(run.path) in raised.message
            assert raised.hint
        if run.path.exists():
            assert raised is not None
            assert tree(run.path) == before
            remove("r")
        remove("other")  # a later command cleans up
        assert os.listdir(home / "runs") == []
        return fired

    assert until_it_passes(attempt) > 10


def test_the_process_can_die_at_every_call_of_removing(home: Path):
    def attempt(n: int) -> bool:
        run = two_steps()
        make_run("other")
        before = tree(run.path)
        died = dies(n, lambda: remove("r"))
        if run.path.exists():
            assert died
            (run.path / ".owner.json").unlink(missing_ok=True)
            assert {name: data for name, data in tree(run.path).items() if ".owner" not in name} == before
            remove("r")
        remove("other")
        assert os.listdir(home / "runs") == []
        return died

    assert until_it_passes(attempt) > 10
