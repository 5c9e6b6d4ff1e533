"""Disks that fail and processes that die at the n-th call, after SQLite's crash tests (writecrash.test).

    for n in itertools.count(1):
        with failing(n, errno.ENOSPC) as faults: ...   # what is tested, expecting a DfError if it fires
        if not faults.fired: break                     # a whole run without a fault: every place was tried

Counted are the calls that change a disk, made through `os`, `open` or `pathlib`: opening a file to write, write,
fsync, truncate, rename, replace, mkdir, link, unlink and rmdir. What C code writes by itself is not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

GROWING = ("fsync", "fdatasync", "ftruncate", "truncate", "mkdir", "link", "symlink")
MOVING = ("rename", "replace", "unlink", "remove", "rmdir")  # a full disk still allows these
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Counts the calls that change a disk; the n-th fails (if `lasting`, so do all after it that need space)."""

    def __init__(self, n: int, fail: Callable[[str], None], lasting: bool) -> None:
        self.n, self.fail, self.lasting = n, fail, lasting
        self.calls: list[str] = []

    @property
    def fired(self) -> bool:
        return 0 < self.n <= len(self.calls)

    def call(self, name: str, path: object, torn: Callable[[], object] = lambda: None) -> None:
        self.calls.append(f"{name} {path}")
        count = len(self.calls)
        if count == self.n or (self.lasting and 0 < self.n < count and name not in MOVING):
            torn()
            self.fail(str(path))


@contextmanager
def _installed(faults: Faults) -> Iterator[Faults]:
    real_open, real_os_open, real_write = io.open, os.open, os.write

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            faults.call(name, args[0])
            return real(*args, **options)

        return call

    def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & WRITING:
            faults.call("open", path)
        return real_os_open(path, flags, *args, **options)

    def os_write(descriptor: int, data: Any) -> int:
        view = memoryview(data).cast("B")
        faults.call("write", descriptor, torn=lambda: real_write(descriptor, view[: len(view) // 2]))
        return real_write(descriptor, data)

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            faults.call("write", self.name, torn=lambda: super(Raw, self).write(view[: len(view) // 2]))
            return super().write(data)

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+") or opener is not None:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            faults.call("open", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffer = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)

    with pytest.MonkeyPatch.context() as patch:
        for name in (*GROWING, *MOVING):
            if hasattr(os, name):
                patch.setattr(os, name, counted(name))
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "write", os_write)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield faults


@contextmanager
def failing(n: int, error: int = errno.ENOSPC, *, lasting: bool = False) -> Iterator[Faults]:
    """Within the block the n-th call (from 1; 0: none) that changes a disk fails, a write when half done.

    `lasting`: from then on every call that needs space fails too, as on a disk that stays full.
    """

    def fail(path: str) -> None:
        raise OSError(error, os.strerror(error), path)

    with _installed(Faults(n, fail, lasting)) as faults:
        yield faults


def count(action: Callable[[], object]) -> int:
    """How many calls of `action` change a disk."""
    with failing(0) as faults:
        action()
    return len(faults.calls)


def dies(n: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child process that is gone at its n-th call, a write half done. False if it ended.

    Needs fork: skips the test on Windows. An exception in the child is an error of the test.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    child = os.fork()
    if child == 0:
        status = 99
        try:
            with _installed(Faults(n, lambda _: os._exit(137), False)):
                action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 137), f"the child process failed with status {status}"
    return status == 137


def until_it_passes(attempt: Callable[[int], bool], limit: int = 2000) -> int:
    """Call `attempt(n)` for n = 1, 2, 3, ... until it returns False (no fault fired); how many fired."""
    for n in itertools.count(1):
        assert n < limit, "no run passes: does the number of calls grow without end?"
        if not attempt(n):
            return n - 1
    raise AssertionError
