"""One trainer a run, on every platform: a file lock that the system releases when its holder ends in any way.

A file beside the lock names the holder for messages. A stale one has no effect.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from dfcli.errors import DfError
from dfcli.system.files import os_errors, process_lives, read_json, write_json

LOCK, OWNER = ".lock", ".owner.json"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Does not wait: raises DfError naming the holder if there is one."""
    lock = filelock.FileLock(folder / LOCK, thread_local=False)
    with os_errors("lock", folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise DfError(
                f"run `{folder.name}` is in use by {_describe(_read_owner(folder))}",
                "wait until it has finished, or stop it (Ctrl-C lets it save first)",
            ) from None
        except NotImplementedError as error:
            raise DfError(f"could not lock {folder}: {error}", "keep runs on a local disk (DFCLI_HOME)") from None
    try:
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(folder / OWNER, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        yield
    finally:
        with suppress(OSError):
            os.unlink(folder / OWNER)
        lock.release()


def holder(folder: Path) -> str | None:
    """The holder of the lock, without trying to take it. A holder on another machine may be gone."""
    owner = _read_owner(folder)
    with suppress(OSError):
        since = (folder / OWNER).stat().st_mtime
        if owner and (owner["host"] != socket.gethostname() or process_lives(owner["pid"], since)):
            return _describe(owner)
    return None


def _read_owner(folder: Path) -> dict[str, Any] | None:
    try:
        owner = read_json(folder / OWNER)
    except DfError:  # there is none
        return None
    sound = isinstance(owner.get("pid"), int) and owner.keys() >= {"host", "started"}
    return owner if sound else None


def _describe(owner: dict[str, Any] | None) -> str:
    # There is none in the moment after another process took the lock.
    return f"process {owner['pid']} on {owner['host']} since {owner['started']}" if owner else "another process"
