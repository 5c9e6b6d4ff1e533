"""Two processes with gloo against one: the same data, the same model, one run, and an end when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dfcli.data.batches import Batches
from dfcli.runs.run import Run
from tests.distributed import work

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [f"word{i * i % 97} and{i % 13}" for i in range(3000)]
    (tmp_path / "text.txt").write_text("\n".join(words))
    return tmp_path


def pair(scenario: str, folder: Path) -> list[int]:
    """Run a scenario of `work` in two processes, as torchrun would start them; their exit codes. No launcher: it would
    end the survivor of two before its message. Each process writes stderr to `said-RANK.txt`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", "tests.distributed.work", scenario, str(folder)]
    started = []
    for rank in ("0", "1"):
        with (folder / f"said-{rank}.txt").open("wb") as said:
            own = {"RANK": rank, "LOCAL_RANK": rank}
            started.append(subprocess.Popen(line, cwd=ROOT, env=os.environ | shared | own, stderr=said))
    try:
        return [process.wait(110) for process in started]
    finally:
        for rank, process in enumerate(started):
            process.kill()
            print((folder / f"said-{rank}.txt").read_text())  # shown where a test fails


def weights(name: str) -> dict[str, torch.Tensor]:
    return Run.open(name).load("last").model


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.timeout(300)
def test_two_processes_train_as_one(folder: Path) -> None:
    line = [*TORCHRUN, "-m", "tests.distributed.work", "all_die", str(folder)]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, timeout=110).returncode != 0
    assert 4 <= Run.open("all-die").load("last").step < work.STEPS
    began = time.monotonic()
    assert pair("one_dies", folder) == [1, -signal.SIGKILL]
    assert "another process of this training has ended" in (folder / "said-0.txt").read_text()
    assert time.monotonic() - began < 60  # it sees the closed connection, and waits for no timeout
    assert work.train(folder, "alone", stop=work.at(10, lambda: "interrupted")).steps == 10

    assert pair("life", folder) == [0, 0]
    first, second = (json.loads((folder / f"notes-{rank}.json").read_text()) for rank in range(2))

    rows: list[Any] = []
    draw = Batches.at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "at", lambda self, *at: rows.append(draw(self, *at)) or rows[-1])
        results = {recipe: work.train(folder, f"one-{recipe}", recipe) for recipe in work.RECIPES}
    for both, own, other in zip(rows, first["rows"], second["rows"], strict=False):
        assert own + other == both.ids.tolist()
    for recipe, result in results.items():
        one, two = weights(f"one-{recipe}"), weights(f"two-{recipe}")
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)
        assert first["losses"][recipe] == second["losses"][recipe] == pytest.approx(result.val_loss, abs=1e-5)

    # Stopped and killed runs go on bit for bit with as many processes, and to the same model with fewer or more.
    whole = weights("two-muon")
    assert first["stopped"] == second["stopped"]
    assert first["stopped"][0] == "terminated"
    assert 4 <= first["stopped"][1] < work.STEPS
    for name in ("half", "one-dies", "all-die", "alone"):
        assert first[name] == second[name] == work.STEPS
        assert equal(whole, weights(name)) == (name != "alone")
    for name, tensor in whole.items():
        torch.testing.assert_close(weights("alone")[name], tensor, rtol=1e-5, atol=1e-5)
    lines = [json.loads(line) for line in (Run.open("half").path / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [line["step"] for line in lines] == list(range(1, work.STEPS + 1))
    assert first["finished"] == second["finished"] == work.STEPS

    # One process goes on from the checkpoint of two.
    assert 4 <= Run.open("less").load("last").step < work.STEPS
    work.train(folder, "less", resume=True)
    for name, tensor in weights("one-muon").items():
        torch.testing.assert_close(weights("less")[name], tensor, rtol=1e-5, atol=1e-5)

    assert first["backends"] == ["PyTorch", "the compiled kernels do not work in every process; in float32"]
    assert second["backends"] == [
        "PyTorch",
        "the compiled kernels do not work here (ImportError: no numba here); in float32",
    ]
    assert equal(weights("mixed"), whole)

    message = "process 1 of 2: there is too little memory"
    assert first["failure"] == second["failure"] == ["Elsewhere", message, "take less"]
    assert first["odd"][:2] == ["UsageError", "2 processes cannot share 9 sequences equally"]
    assert "`--batch-size 10`" in first["odd"][2]
    assert second["odd"] == ["Elsewhere", *first["odd"][1:]]


@pytest.mark.timeout(300)
def test_weights_in_two_parts_train_as_whole_ones(folder: Path) -> None:
    for recipe in work.RECIPES:
        work.train(folder, f"one-{recipe}", recipe)
    assert work.train(folder, "whole-half", stop=work.at(10, lambda: "interrupted")).steps == 10

    assert pair("sharded", folder) == [0, 0]
    first, second = (json.loads((folder / f"parts-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert 4 <= first["parts-half"] < work.STEPS

    # A checkpoint of parts is one of whole weights: one process goes on from it, and two in parts from that of one.
    assert work.train(folder, "parts-half", resume=True).steps == work.STEPS
    same = {"parts-adamw": "one-adamw", "parts-muon": "one-muon", "parts-half": "one-muon", "whole-half": "one-muon"}
    for name, one in same.items():
        found = weights(name)
        for key, tensor in weights(one).items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
    assert equal(weights("parts-muon"), weights("parts-again"))


@pytest.mark.timeout(200)
def test_ctrl_c_stops_the_typed_line_with_one_checkpoint(folder: Path, home: Path) -> None:
    settings = [word for key, value in work.SHAPE.items() for word in ("--set", f"{key}={value}")]
    line = [
        "-m",
        "dfcli",
        "train",
        "gpt",
        "--data",
        str(folder / "text.txt"),
        "--device",
        "cpu",
        "--name",
        "r",
        *settings,
    ]
    typed = [*TORCHRUN, *line, "--minutes", "5", "--batch-size", "8"]
    process = subprocess.Popen(typed, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = home / "runs" / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to torchrun and its processes at once
    _, said = process.communicate(timeout=60)
    assert "process 1 of" not in said
    assert said.count("stopping: this step is finished and saved first") == 1
    assert "to go on: torchrun --nproc-per-node 2 -m dfcli train gpt" in said
    run = Run.open("r")
    assert len(list((home / "runs").iterdir())) == 1
    last = run.load("last", optimizer=True)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert last.step >= steps[-1]
