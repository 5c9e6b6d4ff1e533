"""The history of a run: `metrics.jsonl`, one JSON object a line, the first of which is {"format": 1}.

Lines are appended with one write each, so a reader sees whole lines and at most one unfinished at the end. A
process that dies while it writes leaves such a torn line: readers pass over it, the next writer cuts it off.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from dfcli.errors import CorruptError
from dfcli.system.files import DAMAGED, check_format, os_errors, strict_json, write_atomic

FORMAT = 1
HEADER = b'{"format": 1}\n'


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one line; NaN and infinity, which JSON lacks, become null. DfError if it cannot be written."""
    row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
    line = json.dumps(row, allow_nan=False).encode("ascii") + b"\n"
    with os_errors("write", path):
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
        try:
            end = _cut_torn_line(descriptor)
            data = line if end else HEADER + line
            while data:  # once, but on a disk that is just full: then a torn line stays behind
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines but the first. CorruptError naming file and line where one is not a JSON object."""
    return [row for _, row in _lines(path)]


def truncate(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, atomically: a resumed run writes them again."""
    lines = _lines(path)
    kept = [line for line, row in lines if row.get("step", 0) <= step]
    if len(kept) < len(lines):
        write_atomic(path, HEADER + b"".join(kept))


def sync(path: Path) -> None:
    """Make the lines so far durable."""
    with os_errors("write", path):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    with os_errors("read", path):
        data = path.read_bytes()
    *whole, _torn = data.split(b"\n")
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            row = strict_json(line)
            if not isinstance(row.get("step", 0), int):
                raise ValueError("its step is not a whole number")
        except ValueError as error:
            raise CorruptError(f"line {number} of {path} is damaged: {error}", DAMAGED) from error
        if number == 1:
            check_format(row, FORMAT, path)
        else:
            found.append((line + b"\n", row))
    return found


def _cut_torn_line(descriptor: int) -> int:
    """Cut off what follows the last line break; the size that remains."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, max(0, size - 1), os.SEEK_SET)
    if os.read(descriptor, 1) in (b"\n", b""):
        return size
    os.lseek(descriptor, 0, os.SEEK_SET)
    end = os.read(descriptor, size).rfind(b"\n") + 1
    os.ftruncate(descriptor, end)
    return end
