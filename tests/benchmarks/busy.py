"""Training quiet and beside one process at 100 % of a CPU, in turns: the share of its speed that it keeps.

    python -m tests.benchmarks.busy [--rounds 6] [--seconds 3]

For the default recipe's GPT and WaveNet, and the preset `nano-cpu`: steps/s of random batches. Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from dfcli import cores
from dfcli.data.batches import Batch
from dfcli.system.device import resolve
from dfcli.training.presets import preset
from dfcli.training.settings import Recipe
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
JOBS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # core, config, sequences, positions
    "gpt": ("gpt", GPT, 24, 128),
    "wavenet": ("wavenet", WAVENET, 8, 1024),
    "nano-cpu": ("gpt", preset("gpt", "nano-cpu")["config"] | {"vocab_size": 65}, 12, 64),
}


class Rows:
    """Random batches."""

    def __init__(self, V: int, B: int, T: int) -> None:
        self.ids = torch.randint(V, (B, T + 1))

    def at(self, step: int, micro: int = 0) -> Batch:
        return Batch(self.ids[:, :-1], self.ids[:, 1:], None)


def rates(name: str, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Steps/s, quiet and busy, of each round."""
    core_name, config, B, T = JOBS[name]
    core = cores.build(core_name, config)
    neighbour: subprocess.Popen[bytes] | None = None
    found: list[float] = []
    began, first = time.perf_counter(), 0

    def turn() -> str | None:
        nonlocal neighbour, began, first
        spent = time.perf_counter() - began
        if spent < seconds:
            return None
        found.append((trainer.state.step - first) / spent)
        if neighbour:
            neighbour.kill()
            neighbour.wait()
            neighbour = None
        elif len(found) <= 2 * rounds:
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            time.sleep(0.2)
        began, first = time.perf_counter(), trainer.state.step
        return "all rounds are over" if len(found) > 2 * rounds else None

    recipe = Recipe(steps=10**9, checkpoint_every=10**9, log_every=10**9, eval_every=10**9, batch_size=B)
    trainer = Trainer(core, recipe, Rows(config["vocab_size"], B, T), Nowhere(), resolve("cpu"), stop=turn)
    try:
        trainer.run()
    finally:
        if neighbour:
            neighbour.kill()
    return found[2::2], found[1::2]  # the first turn warms up


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; all")
    given = parser.parse_args(words)
    figures: dict[str, Any] = {"benchmark": "busy"}
    for name in given.jobs or JOBS:
        quiet, busy = rates(name, given.rounds, given.seconds)
        figures[name] = {
            "kept": statistics.median(b / q for q, b in zip(quiet, busy, strict=True)),
            "quiet_steps_per_second": statistics.median(quiet),
            "busy_steps_per_second": statistics.median(busy),
        }
    common.report(figures)


if __name__ == "__main__":
    main()
