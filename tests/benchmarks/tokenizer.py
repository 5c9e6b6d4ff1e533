"""Time and memory of training a byte-pair tokenizer on a large text.

    python -m tests.benchmarks.tokenizer [--megabytes 1000] [--vocab-size N]

The text is Python's standard library, then the sources and documentation of the installed packages, each distinct file
once; where that is less than `--megabytes`, all of it again and again. It is prepared with `codec="bpe"` in a process
of its own, which ends when the tokenizer is there: time counts from the first text that the trainer reads, memory is
the most that the process had of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfcli.system.events import Choice, Progress
from tests.benchmarks import common


class Trained(Exception):
    """The tokenizer is there."""


def write(target: Path, size: int) -> int:
    """Write a text of `size` bytes or a little more. Gives the distinct bytes among them."""
    with target.open("wb") as file:
        for text in common.installed():
            if file.tell() >= size:
                break
            file.write(text + b"\n")
        distinct = file.tell()
    if distinct < size:
        common.repeated(target, again := target.with_suffix(".again"), size)
        again.replace(target)
    return distinct


def train(text: Path, vocab_size: int | None) -> dict[str, Any]:
    """Prepare a text as far as its tokenizer: what that took."""
    from dfcli.ingest.prepare import prepare

    began: tuple[float, float] | None = None
    read = 0
    found: dict[str, Any] = {}

    def watch(event: object) -> None:
        nonlocal began, read
        now = time.perf_counter(), time.process_time()
        if isinstance(event, Progress) and event.what == "learning pairs":
            began, read = began or now, event.done
        elif isinstance(event, Choice) and event.what == "codec":
            assert began is not None
            seconds, busy = now[0] - began[0], now[1] - began[1]
            found.update(seconds=seconds, processor_seconds=busy, bytes_read=read, codec=event.value)
            raise Trained

    try:
        prepare([str(text)], codec="bpe", vocab_size=vocab_size, on_event=watch)
    except Trained:
        return found
    raise SystemExit("no tokenizer was trained")


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--vocab-size", type=int, help="by the size of the text by default")
    given = parser.parse_args(words)
    with common.home() as home:
        text = home / "text.txt"
        distinct = write(text, int(given.megabytes * 1e6))
        size = text.stat().st_size
        found, most = common.in_child(train, text, given.vocab_size)
    common.report(
        {
            "benchmark": "tokenizer",
            "megabytes": size / 1e6,
            "distinct_megabytes": distinct / 1e6,
            **found,
            "megabytes_per_second": size / 1e6 / found["seconds"],
            "megabytes_of_memory": most / 1e6,
        }
    )


if __name__ == "__main__":
    main()
