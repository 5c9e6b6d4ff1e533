"""The plan's memory against the most that a training takes of its own, for five shapes of a GPT on a CPU, by PyTorch.

    python -m tests.benchmarks.estimate [SHAPE ...]

Each shape is trained for two steps in a process of its own. What a training of a tiny model takes is taken off: PyTorch
itself. What remains is a little more than planned, because an allocator leaves gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.benchmarks import common

TINY = {"layers": "1", "heads": "2", "channels": "32", "context": "32"}
SHAPES: dict[str, tuple[int, dict[str, str]]] = {  # sequences, and what is set
    "wide": (16, {"layers": "6", "heads": "6", "channels": "384", "context": "128"}),
    "dropout": (16, {"layers": "4", "heads": "4", "channels": "256", "context": "128", "dropout": "0.2"}),
    "long": (4, {"layers": "4", "heads": "4", "channels": "256", "context": "512"}),
    "tables": (16, {"layers": "2", "heads": "4", "channels": "256", "context": "128", "ngrams": "4"}),
    "deep": (8, {"layers": "12", "heads": "8", "channels": "512", "context": "64", "optimizer": "adamw"}),
}


def train(text: str, rows: int, settings: dict[str, str]) -> int:
    """Train two steps; gives the memory that was planned."""
    import dfcli

    options: dict[str, Any] = {
        "steps": 2, "batch_size": rows, "device": "cpu",
        "overrides": {"ngrams": "1"} | settings | {"compile": "off", "eval_tokens": "256", "eval_every": "2"},
    }  # fmt: skip
    dfcli.train("gpt", [text], **options)
    return dfcli.plan("gpt", [text], **options).memory


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    given = parser.parse_args(words)
    figures: dict[str, Any] = {"benchmark": "estimate"}
    with common.home() as home:
        text = home / "text.txt"
        text.write_text("\n".join(f"Line {n} of a text that is no poem, and {n * n % 97}." for n in range(4000)))
        planned, most = common.in_child(train, str(text), 1, TINY)
        base = most - planned
        for name in given.shapes or SHAPES:
            planned, most = common.in_child(train, str(text), *SHAPES[name])
            figures[name] = {"planned": planned, "measured": most - base, "ratio": planned / (most - base)}
            print(f"{name}: planned {planned / 1e6:,.0f} MB, measured {(most - base) / 1e6:,.0f} MB")
    common.report(figures)


if __name__ == "__main__":
    main()
