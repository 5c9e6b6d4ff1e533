"""Memory of training on a large dataset beside a small one: the most that the process had of its own.

    python -m tests.benchmarks.memory --data shakespeare.txt [--gigabytes 1]

The datasets hold the text of `--data` again and again, as characters of one byte each: 10 MB, and so many gigabytes
(twice that on disk for a while). A small GPT is trained on both in processes of their own, with batches from all over
the data. Pages of files are not counted: the system takes them back when it needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common

SMALL = 10_000_000  # bytes
TINY = {"context": "64", "layers": "1", "heads": "2", "channels": "32"}


def prepare(name: str, text: Path, val: Path) -> int:
    """Prepare a text; gives its training split's size in tokens."""
    import dfcli

    with dfcli.prepare([str(text)], name=name, val=[str(val)]) as dataset:
        return dataset.splits["train"].tokens_count


def train(name: str, steps: int) -> float:
    """Train a small GPT on a dataset; gives its validation loss."""
    import dfcli

    result = dfcli.train("gpt", [name], steps=steps, batch_size=64, device="cpu", overrides=TINY)
    return result.val_loss or 0.0


def measure(home: Path, source: Path, size: int, steps: int) -> dict[str, Any]:
    name = f"text-{size}"
    text = common.repeated(source, home / f"{name}.txt", size)
    val = common.repeated(source, home / "val.txt", 50_000)
    tokens, preparing = common.in_child(prepare, name, text, val)
    text.unlink()
    loss, training = common.in_child(train, name, steps)
    return {
        "tokens": tokens,
        "preparation_megabytes": preparing / 1e6,
        "training_megabytes": training / 1e6,
        "val_loss": loss,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a text that is repeated")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the large dataset")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args(words)
    with common.home() as home:
        small = measure(home, given.data, SMALL, given.steps)
        large = measure(home, given.data, int(given.gigabytes * 1e9), given.steps)
    more = large["training_megabytes"] - small["training_megabytes"]
    common.report({"benchmark": "memory", "small": small, "large": large, "training_megabytes_more": more})


if __name__ == "__main__":
    main()
