"""kill -9 at random moments of real trainings, most of them while a checkpoint is written.

    python -m tests.reliability.crash_loop 200

A life is one training under a line with `--resume` that is killed again and again, each time at another moment, until
it is done. After each kill every checkpoint there is must be, byte for byte, the one that an undisturbed training
wrote at that step; none that was reported as saved may be gone; and the history must be readable. In the end, weights,
optimiser, metrics, result and samples must be those of the undisturbed training. One kill in twenty goes to the
program as a person starts it, the others to forks of a process that has PyTorch imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfcli.cli import app
from dfcli.generation.sample import sample_audio, sample_text
from dfcli.runs.run import Run, list_runs
from tests.reliability import material
from tests.reliability.warm import Child, main

STEPS = 24
TIMES = ("seconds", "tokens_per_second", "train_seconds", "path")
TENSORS = ("model.safetensors", "optimizer.safetensors")


@dataclass
class Undisturbed:
    """What a training does when nothing happens to it."""

    checkpoints: dict[int, list[str]]  # step: the SHA-256 of its files of tensors
    end: dict[str, Any]
    seconds: float
    save_seconds: float


@dataclass
class Session:
    """A child that trains and tells through a pipe when it begins and ends to save."""

    child: Child
    pipe: int

    def events(self, seconds: float) -> list[tuple[str, int]]:
        """("B" or "E", step) of what was told in the meantime, waiting at most so long for the first."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return []
        return [(line[0], int(line[1:])) for line in os.read(self.pipe, 1 << 16).decode().split()]


def start(line: list[str], home: Path, record: Path | None = None) -> Session:
    """Train in a child. `record` gets the hashes of all checkpoints, also of those removed later."""
    reader, writer = os.pipe()

    def work() -> int:
        real = Run.save

        def save(self: Run, step: int, *arguments: Any) -> Path:
            os.write(writer, b"B%d\n" % step)
            path = real(self, step, *arguments)
            os.write(writer, b"E%d\n" % step)
            if record is not None:
                hashes.append((step, tensors(path)))
                record.write_text(json.dumps(hashes))
            return path

        hashes: list[tuple[int, list[str]]] = []
        Run.save = save
        return app.run(line)

    child = Child(work, home.with_name(home.name + ".log"), home)
    os.close(writer)
    return Session(child, reader)


def tensors(checkpoint: Path) -> list[str]:
    return [hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in TENSORS]


def end_of(home: Path) -> dict[str, Any]:
    """All that a finished training leaves, but for times."""
    run = at(home)
    result = json.loads((run.path / "result.json").read_text())

    def sample() -> None:
        if run.codec.kind == "audio":
            told = run.conditioning
            mel = home.parent / "sound" / "0.wav" if told is not None and told.mel else None
            sample_audio(run.path, 0.01, home / "sample.wav", mel=mel, seed=1, engine="plain", device="cpu")
        else:
            made = sample_text(run.path, tokens=30, seed=1, engine="plain", device="cpu")
            (home / "sample.wav").write_text(json.dumps(made.samples))

    child = Child(sample, home / "sample.log", home)
    assert child.wait() == 0, child.said()
    return {
        "steps": run.steps(),
        "checkpoints": [tensors(run.path / f"step-{step:08d}") for step in run.steps()],
        "metrics": [{key: value for key, value in row.items() if key not in TIMES} for row in run.metrics()],
        "result": {key: value for key, value in result.items() if key not in (*TIMES, "checksum")},
        "sample": (home / "sample.wav").read_bytes().hex(),
        "debris": [str(path) for path in home.rglob(".tmp-*")],
    }


def at(home: Path) -> Run:
    return Run.open(home / "runs" / "r")


def undisturbed(line: list[str], home: Path) -> Undisturbed:
    record = home.with_name(home.name + ".json")
    began = time.monotonic()
    session = start(line, home, record)
    saves, told = [], 0.0
    while (status := session.child.ended()) is None:
        for what, _ in session.events(0.1):
            saves += [time.monotonic() - told] if what == "E" else []
            told = time.monotonic()
    os.close(session.pipe)
    assert status == 0, session.child.said()
    seconds = time.monotonic() - began
    end = end_of(home)
    assert not end["debris"]
    checkpoints = {step: hashes for step, hashes in json.loads(record.read_text())}
    return Undisturbed(checkpoints, end, seconds, sorted(saves)[len(saves) // 2])


def check(home: Path, reference: Undisturbed, saved: int) -> None:
    """What a reader finds after a kill, before anything is cleaned. `saved`: the last step reported as saved, or 0."""
    if not (home / "runs" / "r").exists():
        assert not saved, "a run is gone"
        return
    run = at(home)
    steps = run.steps()
    assert not saved or saved in steps or max(steps) > saved, f"checkpoint {saved} is lost: there are {steps}"
    for step in steps:
        assert run.load(step, optimizer=True).step == step
        assert tensors(run.path / f"step-{step:08d}") == reference.checkpoints[step], f"checkpoint {step} differs"
    if steps and (losses := run.state(steps[-1])["val_losses"]):
        assert run.state(run.resolve("best"))["val_loss"] == min(losses), "the best checkpoint is lost"
    run.metrics()
    environment = os.environ.get("DFCLI_HOME")
    os.environ["DFCLI_HOME"] = str(home)
    try:
        notes: list[object] = []
        assert [run.name for run in list_runs(notes.append)] == ["r"]
        assert not notes
    finally:
        os.environ.pop("DFCLI_HOME")
        if environment:
            os.environ["DFCLI_HOME"] = environment


def killed_session(line: list[str], home: Path, reference: Undisturbed, dice: random.Random) -> tuple[str, int]:
    """Train until a random moment; what was aimed at ("done" where the training was faster), and the last step that
    was reported as saved."""
    aim = "saving" if dice.random() < 0.8 else "anywhere"
    saves = dice.randint(1, 4)  # in which of this session's
    delay = dice.uniform(0, 1.3 * reference.save_seconds if aim == "saving" else reference.seconds)
    session = start(line, home)
    began, saved = time.monotonic(), 0
    try:
        while (status := session.child.ended()) is None:
            if aim == "anywhere" and time.monotonic() - began > delay:
                break
            for what, step in session.events(0.002):
                saved = step if what == "E" else saved
                saves -= what == "B"
            if aim == "saving" and saves <= 0:
                time.sleep(delay)
                break
            assert not session.child.hangs(60), f"a training hung\n{session.child.said()}"
        if status is None:
            session.child.kill()
            status = session.child.wait()
        for what, step in session.events(0):  # what it told before it died
            saved = step if what == "E" else saved
    finally:
        os.close(session.pipe)
    assert status in (0, -9), f"status {status}\n{session.child.said()}"
    return ("done" if status == 0 else aim), saved


def killed_program(line: list[str], home: Path, dice: random.Random) -> str:
    """The same with the real program, killed soon after a folder of an unfinished checkpoint is seen."""
    saves, delay = dice.randint(1, 4), dice.uniform(0, 0.05)
    environment = {**os.environ, "DFCLI_HOME": str(home), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dfcli", *line], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    seen: set[str] = set()
    while process.poll() is None:
        seen.update(path.name for path in (home / "runs" / "r").glob(".tmp-step-*"))
        if len(seen) >= saves:
            time.sleep(delay)
            process.kill()
        time.sleep(0.0005)
    _, said = process.communicate()
    assert process.returncode in (0, -9), said.decode()
    return "done" if process.returncode == 0 else "program"


def crash_loop(folder: Path, count: int, seed: int = 0, programs: bool = True) -> dict[str, Any]:
    """Kill `count` times; the figures of it. AssertionError where anything was lost."""
    dice = random.Random(seed)
    material.data(folder)
    lines = {name: [*line, "--name", "r", "--resume"] for name, line in material.trainings(folder, STEPS).items()}
    references: dict[str, Undisturbed] = {}
    kills: Counter[str] = Counter()
    by_training: Counter[str] = Counter()
    without_checkpoint = lives = 0
    while kills.total() < count:
        name = list(lines)[lives % len(lines)]
        if name not in references:
            references[name] = undisturbed(lines[name], folder / f"undisturbed-{len(references)}")
        home = folder / f"life-{lives}"
        lives += 1
        while True:
            if kills.total() >= count:
                session = start(lines[name], home)
                assert session.child.wait() == 0, session.child.said()
                os.close(session.pipe)
                break
            if programs and kills.total() % 20 == 19:
                aim, saved = killed_program(lines[name], home, dice), 0
            else:
                aim, saved = killed_session(lines[name], home, references[name], dice)
            if aim == "done":
                break
            kills[aim] += 1
            by_training[name] += 1
            check(home, references[name], saved)
            without_checkpoint += not (home / "runs" / "r").exists() or not at(home).steps()
            print(f"\r{kills.total()} kills", end="", file=sys.stderr, flush=True)
        assert end_of(home) == references[name].end, f"life {lives} ({name}) ended otherwise"
        shutil.rmtree(home)
    print(file=sys.stderr)
    return {
        "kills": kills.total(),
        "kills_by_aim": dict(kills),
        "kills_by_training": dict(by_training),
        "kills_before_the_first_checkpoint": without_checkpoint,
        "trainings_finished_equal_to_the_undisturbed_one": lives,
        "checkpoints_torn_or_lost": 0,
    }


if __name__ == "__main__":
    main(crash_loop, 200, __doc__ or "")
