"""One change to a default recipe at a time: what experiments.md, beside this file, was made with.

    python -m tests.benchmarks.experiments gpt --data shakespeare.txt --minutes 0.5 "" "ngrams=1" "ngrams=1 lr=0.03"
    python -m tests.benchmarks.experiments wavenet --data recordings/ --steps 2000 "" "skip=32"

Each word is a variant: settings as `--set` takes them, apart by spaces ("" is the recipe itself). All train on one
thread with the process's CPU time as the clock, so that other work on the machine disturbs the comparison little. The
loss is over the whole validation split, as `df eval` takes it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from dfcli.evaluation.evaluate import evaluate
from dfcli.training.train import train
from tests.benchmarks import common


def variant(kind: str, data: str, steps: int | None, minutes: float | None, settings: str, seed: int) -> dict[str, Any]:
    """Train the default recipe with these settings and score it."""
    values = dict(word.split("=", 1) for word in settings.split())
    batch_size = values.pop("batch_size", None)
    lr = values.pop("lr", None)
    result = train(
        kind, [data], steps=steps, minutes=minutes, device="cpu", seed=seed, overrides=values, clock=time.process_time,
        batch_size=int(batch_size) if batch_size else None, lr=float(lr) if lr else None,
    )  # fmt: skip
    loss = evaluate(result.run, device="cpu").loss
    return {
        "settings": settings,
        "val_loss": loss,
        "bits": loss / math.log(2),
        "steps": result.steps,
        "cpu_seconds": result.train_seconds,
        "tokens_seen": result.tokens_seen,
        "parameters": result.parameters,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("kind", choices=("gpt", "wavenet"))
    parser.add_argument("variants", nargs="+", metavar="SETTINGS")
    parser.add_argument("--data", required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of CPU time, for each variant")
    budget.add_argument("--steps", type=int, help="of each variant")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    with common.home():
        runs = [
            variant(given.kind, given.data, given.steps, given.minutes, settings, given.seed)
            for settings in given.variants
        ]
    common.report({"benchmark": "experiments", "minutes": given.minutes, "steps": given.steps, "variants": runs})


if __name__ == "__main__":
    main()
