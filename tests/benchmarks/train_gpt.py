"""The default GPT recipe beside nanoGPT's CPU configuration: loss by time, throughput, and what is not training.

    python -m tests.benchmarks.train_gpt --data shakespeare.txt [--full] [--shares 0.1 0.125 1] [--minutes 10]

The anchor is a plain eager loop of nanoGPT's CPU configuration. Its time is that of its 2,000 steps, estimated from
`--anchor-steps` of them, or with `--full` taken by all of them, which also gives its loss. Then `df train gpt` gets
these shares of that time (and `--minutes` beside). Every loss is over the whole validation split, in windows of the
model's context without overlap. The anchor's speed is measured again at the end: it says whether the machine was calm.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dfcli.evaluation.sweep import sweep
from dfcli.ingest.prepare import prepare
from dfcli.system.device import resolve
from dfcli.training.presets import preset
from tests.benchmarks import common
from tests.replications.replicate import df

STEPS: int = preset("gpt", "nano-cpu")["recipe"]["steps"]


def anchor(data: str, steps: int, full: bool) -> dict[str, Any]:
    """Seconds that the plain loop takes for its 2,000 steps, and with `full` its loss after them."""
    device = resolve("cpu")
    with prepare([data], codec="chars") as dataset:
        core, step = common.nano_loop(dataset)
        if not full:
            return {"seconds": STEPS * common.timed(step, steps), "estimated_from_steps": steps}
        began = time.perf_counter()
        for i in range(STEPS):
            step(i)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "val_loss": sweep(core, dataset, "val", device).mean}


def recipe(data: str, minutes: float) -> dict[str, Any]:
    """The default recipe, trained as `df train` does."""
    run, figures = common.trained("gpt", data, minutes)
    scored = df("eval", "--run", run, "--device", "cpu")
    return {"val_loss": scored["loss"], "context": scored["context"], **figures}


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, help="tiny shakespeare, or another text")
    parser.add_argument("--anchor-steps", type=int, default=100, help="to time")
    parser.add_argument("--full", action="store_true", help="train the anchor to its end")
    parser.add_argument("--shares", type=float, nargs="*", default=[1 / 8, 1.0], help="of the anchor's time")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="further budgets")
    given = parser.parse_args(words)
    resolve("cpu")
    with common.home():
        plain = anchor(given.data, given.anchor_steps, given.full)
        budgets = [share * plain["seconds"] / 60 for share in given.shares] + given.minutes
        runs = []
        for minutes in budgets:
            run = recipe(given.data, minutes)
            run["share_of_anchor_time"] = run["train_seconds"] / plain["seconds"]
            if "val_loss" in plain:
                run["loss_below_anchor"] = plain["val_loss"] - run["val_loss"]
            runs.append(run)
        again = anchor(given.data, given.anchor_steps, full=False)["seconds"]
    common.report(
        {
            "benchmark": "train_gpt",
            "anchor": plain | {"seconds_at_the_end": again},
            "recipes": runs,
        }
    )


if __name__ == "__main__":
    main()
