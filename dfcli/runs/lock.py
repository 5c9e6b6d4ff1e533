"""One trainer a run, on every platform: a file lock, which the system releases however its holder dies.

Who holds it stands in a file beside it, only to be told to others: a stale one means nothing.
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
    """Hold the lock of a run's folder. Does not wait: DfError that names the holder if there is one."""
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
    """Who seems to hold the lock, without trying to take it: as good as certain, but for another machine's."""
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
