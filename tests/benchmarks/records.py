"""Memory and speed of preparing JSONL records: a large file beside a small one.

    python -m tests.benchmarks.records [--gigabytes 10] [--codec chars]

The records hold parts of the Python standard library's sources, about 2,000 characters each, again and again. The
files and the datasets are temporary. They need about twice `--gigabytes` of disk; four times as much must be free.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common

SMALL = 10_000_000  # bytes
CHARACTERS = 2000  # of a record


def write(target: Path, size: int) -> None:
    """Write `size` bytes of records or a little more."""
    texts = (path.read_bytes().decode("utf-8", "ignore") for path in common.library())
    parts = (text[start : start + CHARACTERS] for text in texts for start in range(0, len(text), CHARACTERS))
    records = (json.dumps({"id": n, "meta": {"source": "library"}, "text": part}) for n, part in enumerate(parts))
    once = target.with_suffix(".once")
    with once.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record + "\n")
            if file.tell() >= size:
                break
    common.repeated(once, target, size)
    once.unlink()


def prepare(file: Path, codec: str) -> tuple[float, int]:
    """Seconds to prepare the records of a file, and how many ids they are."""
    import dfcli

    began = time.perf_counter()
    with dfcli.prepare([str(file)], codec=codec, field="text") as dataset:
        return time.perf_counter() - began, sum(split.tokens_count for split in dataset.splits.values())


def measure(home: Path, size: int, codec: str) -> dict[str, Any]:
    file = home / f"records-{size}.jsonl"
    write(file, size)
    bytes_ = file.stat().st_size
    (seconds, tokens), most = common.in_child(prepare, file, codec)
    file.unlink()
    shutil.rmtree(home / "datasets")
    speed = bytes_ / 1e6 / seconds
    return {
        "megabytes": bytes_ / 1e6,
        "tokens": tokens,
        "seconds": seconds,
        "megabytes_per_second": speed,
        "megabytes_of_memory": most / 1e6,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of the large file")
    parser.add_argument("--codec", default="chars")
    given = parser.parse_args(words)
    with common.home() as home:
        needed, free = 4 * given.gigabytes, shutil.disk_usage(home).free / 1e9
        if free < needed:
            raise SystemExit(f"{home} has {free:.0f} GB free, and {needed:.0f} GB are wanted")
        small = measure(home, SMALL, given.codec)
        large = measure(home, int(given.gigabytes * 1e9), given.codec)
    more = large["megabytes_of_memory"] - small["megabytes_of_memory"]
    common.report(
        {"benchmark": "records", "codec": given.codec, "small": small, "large": large, "megabytes_of_memory_more": more}
    )


if __name__ == "__main__":
    main()
