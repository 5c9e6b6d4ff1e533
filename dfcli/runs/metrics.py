"""The history of a run: `metrics.jsonl`, one JSON object a line, the first of which is {"format": 2}.

Lines are appended with one write each, so a reader sees whole lines and at most one unfinished at the end. A
process that dies while it writes leaves such a torn line: readers pass over it, the next writer cuts it off.
So a file that ends early, at whatever byte, is sound: it is the history up to there.

The last key of each line but the first is `crc`, the CRC-32 of the line's bytes before that key, in hexadecimal.
Files of format 1 have lines without it (and with it, once a newer program went on with them).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

from dfcli.errors import CorruptError
from dfcli.system.files import DAMAGED, check_format, os_errors, read_bytes, strict_json, write_atomic

FORMAT = 2
MAX_BYTES = 1 << 30  # some million lines
HEADER = b'{"format": 2}\n'
SEALED = re.compile(rb'(?P<body>\{.*), "crc": "(?P<crc>[0-9a-f]{8})"\}', re.DOTALL)


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one line; NaN and infinity, which JSON lacks, become null. DfError if it cannot be written."""
    line = _sealed({key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()})
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
    """All whole lines but the first. CorruptError naming file and line where one is not what was written."""
    *whole, torn = read_bytes(path, MAX_BYTES).split(b"\n")
    if _is_sealed(torn[:-1]):  # no write that broke off leaves a whole line and something else than its end
        whole.append(torn)
    rows: list[dict[str, Any]] = []
    version = FORMAT
    for number, line in enumerate(whole, start=1):
        try:
            row = strict_json(line)
            if number == 1:
                version = check_format(row, FORMAT, path)
                continue
            if not _is_sealed(line) and (version > 1 or "crc" in row):
                raise ValueError("its checksum does not match its contents")
            if not isinstance(row.get("step", 0), int):
                raise ValueError("its step is not a whole number")
        except ValueError as error:
            raise CorruptError(f"line {number} of {path} is damaged: {error}", DAMAGED) from error
        row.pop("crc", None)
        rows.append(row)
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, atomically: a resumed run writes them again."""
    rows = read(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if len(kept) < len(rows):
        write_atomic(path, HEADER + b"".join(map(_sealed, kept)))


def set_aside(path: Path) -> Path | None:
    """Begin a new history. Moves an existing file to a free name beside it and returns that name, else None."""
    names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    with os_errors("write", path):
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            aside = None
    write_atomic(path, HEADER)
    return aside


def sync(path: Path) -> None:
    """Make the lines so far durable."""
    with os_errors("write", path):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sealed(row: dict[str, Any]) -> bytes:
    """The line of a row that has at least one key."""
    body = json.dumps(row, allow_nan=False).encode("ascii").removesuffix(b"}")
    return b'%s, "crc": "%08x"}\n' % (body, zlib.crc32(body))


def _is_sealed(line: bytes) -> bool:
    match = SEALED.fullmatch(line)
    return match is not None and int(match["crc"], 16) == zlib.crc32(match["body"])


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
