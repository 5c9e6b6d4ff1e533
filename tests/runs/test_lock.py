from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dfcli.errors import DfError, UsageError
from dfcli.runs import Run, list_runs, remove
from tests.runs.small import make_run, save, tree

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys\n"
    "from dfcli.runs import Run\n"
    "with Run.open('r').lock():\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.readline()\n"
)


def holder() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(run: Run) -> None:
    with run.lock():
        pass


def test_the_second_is_told_who_holds_it_and_removal_is_refused():
    run = make_run()
    save(run, 1)
    before = tree(run.path)
    process = holder()
    try:
        with pytest.raises(DfError, match=f"process {process.pid} on {socket.gethostname()} since 20") as error:
            take(run)
        assert "run `r` is in use" in error.value.message
        assert error.value.hint
        with pytest.raises(DfError, match=f"process {process.pid}"):
            remove("r")
        with pytest.raises(UsageError, match=f"a run `r` already, in use by process {process.pid}") as error:
            make_run("r")
        assert "--resume" not in error.value.hint
        assert run.load().step == 1  # reading needs no lock
    finally:
        process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert tree(run.path) == before
    take(run)
    remove("r")
    assert list_runs() == []


@pytest.mark.parametrize("kill", [signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_a_killed_holder_does_not_block(kill: signal.Signals):
    run = make_run()
    process = holder()
    os.kill(process.pid, kill)
    process.wait(timeout=30)
    with pytest.raises(UsageError, match=r"a run `r` already$") as error:
        make_run("r")
    assert error.value.hint == "choose another name"
    take(run)
    assert not (run.path / ".owner.json").exists()


def test_other_runs_are_not_touched():
    with make_run("a").lock(), make_run("b").lock():
        pass


def test_twice_in_one_process():
    run = make_run()
    with run.lock(), pytest.raises(DfError, match=f"process {os.getpid()}"):
        take(Run.open("r"))
    take(run)


def test_an_unreadable_owner_is_another_process():
    run = make_run()
    with run.lock():
        (run.path / ".owner.json").write_bytes(b"{")
        with pytest.raises(DfError, match="another process"):
            take(run)
        (run.path / ".owner.json").unlink()
        with pytest.raises(DfError, match="another process"):
            take(run)


def test_an_error_releases_it():
    run = make_run()
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    take(run)


def test_a_copied_lock_means_nothing(tmp_path: Path):
    import shutil

    run = make_run()
    with run.lock():
        shutil.copytree(run.path, tmp_path / "copy")
        take(Run.open(tmp_path / "copy"))


def test_what_a_killed_trainer_left_is_undone():
    run = make_run()
    save(run, 1)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    from dfcli.system import files

    for kind, name in (("tmp", "step-00000002"), ("old", "step-00000003")):
        folder = run.path / f".{kind}-{name}-{process.pid}-{files._host()}-0123abcd"
        folder.mkdir()
    take(run)
    assert sorted(path.name for path in run.path.glob("*step*")) == ["step-00000001", "step-00000003"]
