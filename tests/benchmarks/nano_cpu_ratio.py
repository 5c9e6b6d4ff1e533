"""The trainer on the `nano-cpu` preset beside a plain eager loop of the same model: tokens/s over tokens/s.

    python -m tests.benchmarks.nano_cpu_ratio --data shakespeare.txt [--rounds 15] [--steps 40]
        [--compile on] [--precision float32]

Both take turns in one process, so that what else the machine does disturbs both alike; the ratio is the median over the
rounds. A faithful preset must not be slower than the loop that it repeats: the ratio should be at least 1. With
`--compile on` the trainer takes torch.compile instead of the compiled kernels. The loop computes in float32, the
trainer in what this CPU has units for, unless `--precision` is float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfcli import cores
from dfcli.data.batches import Batches
from dfcli.data.dataset import Dataset
from dfcli.ingest.prepare import prepare
from dfcli.system.device import pytorch_threads, resolve
from dfcli.system.processes import Pulse
from dfcli.training.presets import preset
from dfcli.training.settings import Recipe
from dfcli.training.trainer import Trainer
from tests.benchmarks import common


class Nowhere:
    """A store that keeps nothing, as the plain loop keeps nothing."""

    def log(self, row: dict[str, Any], /) -> None: ...

    def save(self, *what: Any) -> Path:
        return Path()


def turns(dataset: Dataset, rounds: int, steps: int, **recipe: str) -> tuple[list[float], list[float]]:
    """Seconds that the plain loop and the trainer take for `steps` steps, of each round."""
    entry: dict[str, Any] = preset("gpt", "nano-cpu")
    plain: list[float] = []
    ours: list[float] = []
    _, step = common.nano_loop(dataset)
    began = 0.0

    def other() -> str | None:
        """Asked before each step of the trainer: after each `steps` of them it is the plain loop's turn."""
        nonlocal began
        at = trainer.state.step
        if at % steps:
            return None
        ended = time.perf_counter()
        ours.append(ended - began)
        if len(plain) > rounds:
            return "all rounds are over"
        with pytorch_threads(trainer.device.threads):  # of which the kernels leave one
            for i in range(at, at + steps):
                step(i)
        began = time.perf_counter()
        plain.append(began - ended)
        return None

    torch.manual_seed(entry["seed"])
    core = cores.build("gpt", entry["config"] | {"vocab_size": dataset.codec.vocab_size})
    long = {"steps": 10**9, "checkpoint_every": 10**9} | recipe
    recipe = Recipe(**entry["recipe"] | long)
    batches = Batches(dataset.splits["train"], batch_size=recipe.batch_size, window=core.context, seed=entry["seed"])
    trainer = Trainer(core, recipe, batches, Nowhere(), resolve("cpu"), seed=entry["seed"], pulse=Pulse(stop=other))
    trainer.run()
    return plain[1:], ours[2:]  # the first round warms up; before it the trainer took no step


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, help="tiny shakespeare, or another text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="of each in a round")
    parser.add_argument("--compile", choices=("auto", "on"), default="auto", help="the trainer's; the loop is eager")
    parser.add_argument("--precision", choices=("auto", "float32"), default="auto", help="the trainer's")
    given = parser.parse_args(words)
    resolve("cpu")
    with common.home(), prepare([given.data], codec="chars") as dataset:
        plain, ours = turns(dataset, given.rounds, given.steps, compile=given.compile, precision=given.precision)
    entry = preset("gpt", "nano-cpu")
    tokens = given.steps * entry["recipe"]["batch_size"] * entry["config"]["context"]
    ratios = sorted(a / b for a, b in zip(plain, ours, strict=True))
    common.report(
        {
            "benchmark": "nano_cpu_ratio",
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "trainer_tokens_per_second": tokens / statistics.median(ours),
            "plain_tokens_per_second": tokens / statistics.median(plain),
            "rounds": given.rounds,
            "steps_a_round": given.steps,
            "compile": given.compile,
            "precision": given.precision,
        }
    )


if __name__ == "__main__":
    main()
