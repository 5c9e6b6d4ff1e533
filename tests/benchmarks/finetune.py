"""Training on from a run's weights: the validation loss before and after.

    python -m tests.benchmarks.finetune --data shakespeare.txt [--kind gpt wavenet] [--minutes 0.2 1 5]

For each kind a model is trained for `--start-minutes`, as `df train` does it, then trained on from its best weights by
`--init` for each of `--minutes`. Every loss is over the whole validation split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common


def loss(run: str) -> float:
    """The loss of a run's best checkpoint over its whole validation split."""
    from dfcli.evaluation.evaluate import evaluate

    return evaluate(run, device="cpu").loss


def measure(kind: str, data: str, start_minutes: float, minutes: Sequence[float]) -> dict[str, Any]:
    start, trained = common.trained(kind, data, start_minutes)
    before, rows = loss(start), []
    for each in minutes:
        run, figures = common.trained(kind, data, each, init=start)
        after = loss(run)
        kept = ("steps", "best_step", "tokens_seen", "train_seconds")
        rows.append(
            {"minutes": each, "start": before, "end": after, "below": before - after}
            | {name: figures[name] for name in kept}
        )
        print(f"{kind}, {each:g} minutes: {before:.4f} -> {after:.4f}", flush=True)
    return {"start": before, "parameters": trained["parameters"], "core": trained["core"], "rows": rows}


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a text")
    parser.add_argument("--kind", nargs="+", choices=("gpt", "wavenet"), default=["gpt", "wavenet"])
    parser.add_argument("--start-minutes", type=float, default=1.0)
    parser.add_argument("--minutes", nargs="+", type=float, default=[0.2, 1.0, 5.0])
    given = parser.parse_args(words)
    with common.home():
        found = {kind: measure(kind, str(given.data), given.start_minutes, given.minutes) for kind in given.kind}
    never = all(row["below"] >= 0 for figures in found.values() for row in figures["rows"])
    common.report({"benchmark": "finetune", "kinds": found, "never_above_the_start": never})


if __name__ == "__main__":
    main()
