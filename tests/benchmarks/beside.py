"""This checkout beside another one, in turns: whether a change made anything slower or worse.

    python -m tests.benchmarks.beside --other ../earlier --data shakespeare.txt --audio recordings/ [--minutes 1]

Both run the same command lines, in processes and with a data dir of their own, one after the other in each
round: the default GPT and WaveNet for `--minutes` each, generation with what was trained, and `df --help`. A ratio
above 1 says that this checkout is better; losses are given as they are.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common

HERE = Path(__file__).resolve().parents[2]


class Checkout:
    """A checkout, and the figures of the commands that it ran."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path, self.home = path.resolve(), home
        self.figures: dict[str, list[float]] = {}

    def df(self, *words: object) -> str:
        """The stdout of `df ...`. SystemExit with its messages if it fails."""
        environment = {**os.environ, "PYTHONPATH": str(self.path), "DFCLI_HOME": str(self.home)}
        line = [sys.executable, "-m", "dfcli", *map(str, words)]
        here: dict[str, Any] = {"cwd": self.home.parent, "env": environment, "stdin": subprocess.DEVNULL}
        done = subprocess.run(line, capture_output=True, text=True, check=False, **here)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr}")
        return done.stdout

    def note(self, what: str, value: float) -> None:
        self.figures.setdefault(what, []).append(value)

    def help(self) -> None:
        began = time.perf_counter()
        self.df("--help")
        self.note("help_seconds", time.perf_counter() - began)

    def train(self, kind: str, data: str, minutes: float) -> None:
        name = f"{kind}-{len(self.figures.get(f'{kind}_loss', []))}"
        options: tuple[str | int, ...] = ("--device", "cpu", "--seed", 0, "--quiet", "--json")
        if kind == "wavenet" and self.path == HERE:  # earlier checkouts have no other levels
            options += ("--levels", 256)
        told = json.loads(self.df("train", kind, "--data", data, "--minutes", minutes, "--name", name, *options))
        self.note(f"{kind}_loss", told["val_loss"])
        self.note(f"{kind}_training_tokens_per_second", told["tokens_seen"] / told["train_seconds"])

    def sample(self, kind: str) -> None:
        length = ("--tokens", 5000) if kind == "gpt" else ("--seconds", 10, "-o", self.home.with_suffix(".wav"))
        told = json.loads(self.df("sample", kind, "--run", f"{kind}-0", *length, "--device", "cpu", "--json"))
        self.note(f"{kind}_generated_tokens_per_second", told["tokens_per_second"])


def summary(ours: Checkout, theirs: Checkout) -> dict[str, Any]:
    """Medians of both, and how much better ours is."""
    found: dict[str, Any] = {}
    for what, values in ours.figures.items():
        a, b = statistics.median(values), statistics.median(theirs.figures[what])
        ratio = b / a if what.endswith(("seconds", "loss")) else a / b
        found[what] = {"here": round(a, 5), "other": round(b, 5), "times_better": round(ratio, 4)}
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--other", required=True, type=Path, help="a checkout of another commit")
    parser.add_argument("--data", required=True, type=Path, help="a text")
    parser.add_argument("--audio", required=True, type=Path, help="a folder of recordings")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each training")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args(words)
    with common.home() as folder:
        both = [Checkout(HERE, folder / "here"), Checkout(given.other, folder / "other")]
        for checkout in both:  # kernels are compiled, and the data are prepared, before anything is timed
            for kind, data in (("gpt", given.data), ("wavenet", given.audio)):
                checkout.train(kind, str(data.resolve()), 0.05)
                checkout.df("runs", "remove", f"{kind}-0", "--yes")
            checkout.figures.clear()
        for number in range(given.rounds):
            for kind, data in (("gpt", given.data), ("wavenet", given.audio)):
                for checkout in both if number % 2 == 0 else both[::-1]:
                    checkout.train(kind, str(data.resolve()), given.minutes)
                for _ in range(3):
                    for checkout in both:
                        checkout.sample(kind)
                        checkout.help()
    common.report({"benchmark": "beside", "minutes": given.minutes, "rounds": given.rounds, **summary(*both)})


if __name__ == "__main__":
    main()
