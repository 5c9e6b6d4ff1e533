"""Whole commands on a disk that fails, or in a process that dies, at the n-th call, for n = 1, 2, 3, ...

    python -m tests.reliability.fault_loop         (every n; a count bounds how many are tried of each)

Commands: preparing text and recordings, training from nothing and on, sampling to a file, removing a run and a
dataset. Each is tried with a disk that is full from the n-th call on (ENOSPC), with one bad call (EIO), and with the
process gone at it, a write half done. Afterwards what was there before is unchanged; the error is exit code 1, one
sentence that names a file and why, and a hint; the same command then succeeds; and then no half-made thing lies about.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfcli.cli import app
from dfcli.runs.run import Run
from tests import faults
from tests.reliability import material
from tests.reliability.warm import Child, main

STEPS = 3
DIED = 137


@dataclass(frozen=True)
class Command:
    """A command, what it starts from, and what no fault may change."""

    words: list[str]
    name: str
    before: list[list[str]]  # what was done in its data home
    begun: bool = False  # the run `r` there was killed before its end
    kept: Callable[[Path], object] = lambda home: None
    again: list[str] | None = None  # what succeeds after a failure, if that is another line
    output: str = ""  # the file that it writes, beside the home


def run(words: list[str], home: Path, n: int = 0, error: int = 0, lasting: bool = False) -> tuple[int, str, bool]:
    """Exit code, what was said, and whether a fault came. `error` 0: the process dies."""
    fired = home.with_name("fired")
    fired.unlink(missing_ok=True)
    descriptor = os.open(fired, os.O_WRONLY | os.O_CREAT)

    def work() -> int:
        def fail(path: str) -> None:
            REAL_WRITE(descriptor, b"x")
            if not error:
                os._exit(DIED)
            raise OSError(error, os.strerror(error), path)

        with faults._installed(faults.Faults(n, fail, lasting)):
            code = app.run(words)
            sys.stdout.flush()
        return code

    child = Child(work, home.with_name("said"), home)
    os.close(descriptor)
    code = child.wait(180)  # where nothing can be written, kernels are compiled anew: a minute
    return code, child.said(), fired.stat().st_size > 0


REAL_WRITE = os.write


def contents(home: Path) -> dict[str, str]:
    """The files of all runs and datasets, but for locks and what says who last held them."""
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(home.rglob("*"))
        if path.is_file() and not re.search(r"\.lock$|\.owner\.json$|locks/|\.tmp-", str(path))
    }


def debris(home: Path) -> list[str]:
    return [str(path) for path in home.rglob("*") if path.name.startswith((".tmp-", ".old-"))]


def commands(folder: Path) -> list[Command]:
    lines = material.trainings(folder, STEPS)

    def parts(kind: str) -> list[str]:
        return [*lines[kind], "--name", "r", "--resume"]

    gpt, wavenet = parts("gpt, muon"), parts("wavenet, adamw")
    other = [*lines["gpt of lines, sgd"], "--name", "other"]

    def others(place: Path) -> dict[str, str]:
        """What no training of `r` may touch."""
        return {name: sha for name, sha in contents(place).items() if "/other/" in name}

    def committed(place: Path) -> object:
        """The other run, and all checkpoints there are, which must load."""
        if (place / "runs" / "r" / "run.json").exists():
            found = Run.open(place / "runs" / "r")
            assert all(found.load(step, optimizer=True).step == step for step in found.steps())
            assert "train-on" not in str(place) or found.steps(), "the checkpoints are gone"
        return others(place)

    text = ["data", "prepare", str(folder / "text.txt"), "--name", "t", "--codec", "bytes"]
    recordings = ["data", "prepare", str(folder / "sound"), "--name", "s", "--val-fraction", "0.4"]
    labelled = [*recordings, "--label", r"(?P<tone>\d)"]
    sample = [
        "sample",
        "wavenet",
        "--run",
        "r",
        "--seconds",
        "0.05",
        "-o",
        "out.wav",
        "--engine",
        "plain",
        "--seed",
        "1",
    ]
    named = ["data", "prepare", str(folder / "names.txt"), "--name", "d"]
    return [
        Command(text, "prepare text", [other], kept=others),
        Command(recordings, "prepare recordings", [other], kept=others),
        Command(labelled, "prepare recordings with labels", [other], kept=others),
        Command(gpt, "train from nothing", [other], kept=committed),
        Command(gpt, "train on", [other, gpt], begun=True, kept=committed),
        Command(wavenet, "train a wavenet", [other], kept=committed),
        Command(parts("wavenet with labels"), "train a wavenet with labels", [other], kept=committed),
        Command(sample, "sample to a file", [other, wavenet], kept=contents, output="out.wav"),
        Command(["runs", "remove", "r", "--yes"], "remove a run", [other, gpt], kept=others, again=["runs", "list"]),
        Command(
            ["data", "remove", "d", "--yes"], "remove a dataset", [other, named], kept=others, again=["data", "list"]
        ),
    ]


def make(command: Command, home: Path) -> None:
    """The data home that a command starts from."""
    home.mkdir(parents=True)
    for words in command.before:
        code, said, _ = run(words, home)
        assert code == 0, said
    if command.begun:
        (home / "runs" / "r" / "result.json").unlink()
        shutil.rmtree(home / "runs" / "r" / f"step-{STEPS:08d}")


def attempt(command: Command, folder: Path, n: int, error: int, lasting: bool) -> bool:
    """One command with a fault at call n; False if it needs fewer calls."""
    place = folder / command.name.replace(" ", "-")
    template, home = place / "template", place / "home"
    if not template.exists():
        make(command, template)
    for path in place.iterdir():
        if path.is_file():
            path.unlink()
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home)
    os.chdir(place)
    before, kept = contents(home), command.kept(home)
    code, said, fired = run(command.words, home, n, error, lasting)
    where = f"call {n}, {errno.errorcode.get(error, 'death')}: {code}\n{said}"
    assert code in (0, 1) if error else code in (0, DIED), where
    assert "unexpected" not in said, where
    assert "Traceback" not in said, where
    assert command.kept(home) == kept, where
    if not fired:
        assert code == 0, where
        return False
    if code == 1:
        assert os.strerror(error) in said, where
        assert "hint: " in said, where
        assert str(place) in said or command.output in said, where
    if command.output and Path(command.output).exists() and code != DIED:
        assert Path(command.output).read_bytes()[:4] in (b"RIFF", b""), where
    removes = command.words[1] == "remove"
    if removes and code == 1:  # removed whole, or there as it was
        gone = {name for name in before if name not in contents(home)}
        assert not gone or not (home / command.words[0].replace("data", "datasets") / command.words[2]).exists(), where
    again = command.words
    if removes and not (home / command.words[0].replace("data", "datasets") / command.words[2]).exists():
        again = command.again or again
    code, said, _ = run(again, home)
    assert code == 0, f"the command after {where}\n{said}"
    if removes:  # a later command of another kind cleans
        rest = sorted(path.name for path in (home / "runs").iterdir() if not path.name.startswith("."))
        run(["runs", "remove", rest[-1], "--yes"], home)
        run(["data", "prepare", str(folder / "names.txt"), "--name", "after"], home)
    assert not debris(home), f"{debris(home)} after {where}"
    return True


def fault_loop(folder: Path, count: int, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Try every command with every kind of fault at up to `count` calls; the figures of it."""
    folder = folder.resolve()
    material.data(folder)
    tried: dict[str, dict[str, int]] = {}
    here = os.getcwd()
    losses: list[str] = []
    for command in commands(folder):
        name = command.name
        if only not in name:
            continue
        tried[name] = {}
        for kind, error, lasting in (("ENOSPC", errno.ENOSPC, True), ("EIO", errno.EIO, False), ("death", 0, False)):
            n = 1
            while n <= count:
                try:
                    if not attempt(command, folder, n, error, lasting):
                        break
                except AssertionError as problem:
                    losses.append(f"{name}: {problem}"[:3000])
                n += 1
                print(f"\r{name}, {kind} {n}, {len(losses)} defects   ", end="", file=sys.stderr, flush=True)
            tried[name][kind] = n - 1
    os.chdir(here)
    print(file=sys.stderr)
    return {"faults": sum(sum(kinds.values()) for kinds in tried.values()), "by_command": tried, "defects": losses}


if __name__ == "__main__":
    main(fault_loop, 10_000, __doc__ or "")
