"""Quiet, and beside one process at 100 % of a CPU, in turns: the share of its speed that a command keeps.

    python -m tests.benchmarks.busy [JOB ...] [--rounds 6] [--seconds 3]

Training of the default recipe's GPT and WaveNet and of the preset `nano-cpu`, by the compiled kernels and by PyTorch
(`pytorch`), in steps/s of random batches; and
evaluation and sampling of a default GPT and WaveNet that were trained for one step. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `df` does, before PyTorch is imported

import torch

from dfcli import cores
from dfcli.data.batches import Batch
from dfcli.evaluation.evaluate import evaluate
from dfcli.generation.sample import sample_audio, sample_text
from dfcli.system.device import resolve
from dfcli.system.processes import Pulse
from dfcli.training.presets import preset
from dfcli.training.settings import Recipe
from dfcli.training.train import train
from dfcli.training.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.nano_cpu_ratio import Nowhere

GPT = {
    "vocab_size": 65, "context": 128, "layers": 4, "heads": 4, "channels": 64, "position": "rotary", "norm": "rmsnorm",
    "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True, "tied_head": False, "init": "zero",
}  # fmt: skip
WAVENET = {
    "vocab_size": 256, "dilations": (1, 2, 4, 8, 16, 32, 64, 128), "cycles": 2, "residual": 32, "skip": 64,
    "head": 128, "norm": "rmsnorm",
}  # fmt: skip
NANO = preset("gpt", "nano-cpu")["config"] | {"vocab_size": 65}
JOBS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # core, config, sequences, positions
    "gpt": ("gpt", GPT, 24, 128),
    "wavenet": ("wavenet", WAVENET, 8, 1024),
    "nano-cpu": ("gpt", NANO, 12, 64),
    "pytorch": ("gpt", NANO, 12, 64),
}


class Rows:
    """Random batches."""

    def __init__(self, V: int, B: int, T: int) -> None:
        self.ids = torch.randint(V, (B, T + 1))

    def at(self, step: int, micro: int = 0) -> Batch:
        return Batch(self.ids[:, :-1], self.ids[:, 1:], None)


class Neighbour:
    """A process that keeps a CPU busy, while it is there."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def come(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(0.2)

    def go(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def call_rates(once: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Calls/s, quiet and busy, of each round."""
    quiet, busy, neighbour = [], [], Neighbour()
    once()  # loads and compiles
    try:
        for _ in range(rounds):
            for found in (quiet, busy):
                if found is busy:
                    neighbour.come()
                began = time.perf_counter()
                once()
                found.append(1 / (time.perf_counter() - began))
                neighbour.go()
    finally:
        neighbour.go()
    return quiet, busy


def calls(folder: Path) -> dict[str, Callable[[], Any]]:
    """What evaluates and samples, for some seconds a call."""
    steps: dict[str, Any] = {"steps": 1, "device": "cpu", "overrides": {"eval_tokens": "200"}}
    gpt, wavenet = train("gpt", [], **steps).run, train("wavenet", [], **steps).run
    return {
        "eval-gpt": lambda: evaluate(gpt, limit=400_000, device="cpu"),
        "eval-wavenet": lambda: evaluate(wavenet, limit=200_000, device="cpu"),
        "sample-gpt": lambda: sample_text(gpt, tokens=20_000, device="cpu"),
        "sample-wavenet": lambda: sample_audio(wavenet, 10.0, folder / "out.wav", device="cpu"),
    }


def training_rates(name: str, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Steps/s, quiet and busy, of each round."""
    core_name, config, B, T = JOBS[name]
    core = cores.build(core_name, config)
    neighbour, found = Neighbour(), list[float]()
    began, first = time.perf_counter(), 0

    def turn() -> str | None:
        nonlocal began, first
        spent = time.perf_counter() - began
        if spent < seconds:
            return None
        found.append((trainer.state.step - first) / spent)
        if neighbour.process:
            neighbour.go()
        elif len(found) <= 2 * rounds:
            neighbour.come()
        began, first = time.perf_counter(), trainer.state.step
        return "all rounds are over" if len(found) > 2 * rounds else None

    compile = "off" if name == "pytorch" else "auto"
    never = {"steps": 10**9, "checkpoint_every": 10**9, "log_every": 10**9, "eval_every": 10**9}
    recipe = Recipe(**never, batch_size=B, compile=compile)
    trainer = Trainer(core, recipe, Rows(config["vocab_size"], B, T), Nowhere(), resolve("cpu"), pulse=Pulse(stop=turn))
    try:
        trainer.run()
    finally:
        neighbour.go()
    return found[2::2], found[1::2]  # the first turn warms up


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn of a training")
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="gpt, wavenet, nano-cpu, eval-gpt, ...; all")
    given = parser.parse_args(words)
    figures: dict[str, Any] = {"benchmark": "busy"}
    with common.home() as folder:
        others = calls(folder)
        for name in given.jobs or [*JOBS, *others]:
            if name in JOBS:
                quiet, busy = training_rates(name, given.rounds, given.seconds)
            else:
                quiet, busy = call_rates(others[name], given.rounds)
            figures[name] = {
                "kept": statistics.median(b / q for q, b in zip(quiet, busy, strict=True)),
                "quiet_per_second": statistics.median(quiet),
                "busy_per_second": statistics.median(busy),
            }
            print(name, figures[name], flush=True)
    common.report(figures)


if __name__ == "__main__":
    main()
