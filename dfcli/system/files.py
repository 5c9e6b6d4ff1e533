"""Everything that must survive a crash goes to disk through here.

A file or folder appears whole or not at all: it is written beside its place under a temporary name, flushed
to the disk (fsync), renamed into place, and then the parent folder is flushed too, because a rename is atomic
but not yet durable (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). On Windows a folder
cannot be flushed; there the last step is left to the system.

Names of temporaries say who made them, so that what a killed process leaves behind can be told from work in
progress:

    .tmp-NAME-PID-HOST-RANDOM   half-made or half-removed: deleted once its process is gone
    .old-NAME-PID-HOST-RANDOM   moved away for its replacement: moved back if that never came into place
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from dfcli.errors import CorruptError, DfError, UsageError

try:
    import fcntl
except ImportError:  # Windows, where what is open cannot be removed anyway
    fcntl = None

MAX_JSON_BYTES = 64 << 20  # the largest honest file, a codec of every Unicode character, stays under 16 MiB
FOREIGN_DEBRIS_SECONDS = 24 * 3600  # processes of another machine cannot be asked whether they live

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
TEMPORARY = re.compile(
    r"\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d{1,9})-(?P<host>[0-9a-f]{8})-[0-9a-f]{8}", re.DOTALL
)
CHECKSUM_LINE = re.compile(rb'(?P<body>\{.*)"checksum": "(?P<sha256>[0-9a-f]{64})"\n\}\n', re.DOTALL)
DAMAGED = "it was changed or cut off after it was written; restore it from a copy or make it again"
HINTS = {
    errno.ENOSPC: "free some space, or use another disk",
    errno.EIO: "check the disk, or use another one",
    errno.EACCES: "check the permissions, or use another place",
}
HINTS |= {errno.EDQUOT: HINTS[errno.ENOSPC]} if hasattr(errno, "EDQUOT") else {}
HINTS |= {errno.EPERM: HINTS[errno.EACCES], errno.EROFS: HINTS[errno.EACCES]}
PATIENCE = (0.05, 0.2, 1.0) if os.name == "nt" else ()  # Windows lets nobody rename what a virus scanner looks at

_temporaries: set[str] = set()  # names made by this process and not yet done with


def data_home() -> Path:
    """Where datasets, runs and downloads are kept: `$DFCLI_HOME`, else the system's place. Not created. UsageError
    where something else than a folder is there, DfError where it may not be entered."""
    home = _home()
    with os_errors("read", home), suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(home).st_mode):
            raise UsageError(f"{home} is not a folder", "set DFCLI_HOME to a folder; it is made if it is not there")
        os.stat(home / "runs")  # fails where the folder may be seen, but not what is in it
    return home


def _home() -> Path:
    chosen = os.environ.get("DFCLI_HOME")
    try:
        if chosen:
            return Path(os.path.expanduser(chosen)).absolute()
        import platformdirs

        return platformdirs.user_data_path("dfcli", appauthor=False)
    except RuntimeError:  # the user has no home folder, as with `docker run -u 12345`
        raise UsageError("this user has no home folder", "set DFCLI_HOME to a folder for data and runs") from None


def check_name(name: str, what: str) -> str:
    """Return `name` if it is safe as a folder's name on every system, else raise UsageError (`what`: "run").

    Where names end up in paths, this is what keeps them inside their folder."""
    if NAME.fullmatch(name) and not name.endswith(".") and not WINDOWS_DEVICE.fullmatch(name):
        return name
    raise UsageError(
        f"{name!r} cannot be the name of a {what}",
        "use at most 100 letters, digits, `.`, `_` and `-`, with neither `.` nor `-` first, and no name that "
        "Windows reserves (`con`, `nul`, ...)",
    )


def same_name(parent: Path, name: str) -> str | None:
    """The entry of `parent` that equals `name` but perhaps for case, which some systems do not tell apart."""
    if not parent.is_dir():
        return None
    with os_errors("read", parent):
        entries = sorted(os.listdir(parent))
    return next((entry for entry in entries if entry.casefold() == name.casefold()), None)


@contextmanager
def os_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the block into DfError `could not <verb> <path>: <reason>`, with a hint.

    What a disk cannot read back (EIO) is as good as damaged: CorruptError.
    """
    try:
        yield
    except OSError as error:
        family = CorruptError if verb == "read" and error.errno == errno.EIO else DfError
        reason = error.strerror or str(error) or type(error).__name__
        raise family(f"could not {verb} {path}: {reason}", _hint(error.errno or 0, path)) from error


def _hint(number: int, path: Path) -> str:
    """What to do about an OSError; names DFCLI_HOME only where `path` lies among dfcli's own files."""
    hint = HINTS.get(number, "")
    with suppress(UsageError):
        if hint and Path(os.path.abspath(path)).is_relative_to(_home()):
            return f"{hint} (DFCLI_HOME sets where dfcli keeps its data)"
    return hint


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """A file that dfcli wrote, opened to be read; OSErrors of the block are told as `os_errors` does.

    CorruptError where it is missing, or no regular file: a FIFO is waited for and a device read without end.
    """
    with os_errors("read", path):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing", DAMAGED) from None
        if not regular:
            raise CorruptError(f"{path} is damaged: not a regular file", DAMAGED)
        with open(path, "rb") as file:
            yield file


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file that dfcli wrote. Errors as of `reading`; CorruptError where it has more than `most` bytes."""
    with reading(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise CorruptError(f"{path} is damaged: larger than any file that dfcli writes there", DAMAGED)
        return file.read()


def write_atomic(path: Path, data: bytes) -> None:
    """Create or replace the file `path`, durably: readers and crashes find the old contents or the new."""
    with writing(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a file to be made; if the block ends well, that file becomes `path`, durably."""
    temporary = _beside(path, "tmp")
    try:
        with os_errors("write", path):
            _make_folder(path.parent)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            _rename(temporary, path)
            sync_folder(path.parent)
    finally:
        _discard(temporary)


def json_bytes(obj: dict[str, Any]) -> bytes:
    """`obj` as JSON whose last key, `checksum`, is the SHA-256 of all bytes before that key.

    It is ASCII, so that no editor's encoding and no terminal that prints it is surprised. ValueError for NaN
    and infinities, which JSON does not have.
    """
    body = {key: value for key, value in obj.items() if key != "checksum"}
    text = json.dumps(body | {"checksum": "?"}, indent=2, allow_nan=False)
    head = text[: text.rindex('"checksum"')].encode("ascii")
    return head + b'"checksum": "%s"\n}\n' % hashlib.sha256(head).hexdigest().encode("ascii")


def write_json(path: Path, obj: dict[str, Any]) -> None:
    """Write `json_bytes(obj)` atomically. Inside a `building` folder, write those bytes plainly instead."""
    write_atomic(path, json_bytes(obj))


def read_json(path: Path) -> dict[str, Any]:
    """The object whose `json_bytes` are in the file `path`, without the checksum.

    CorruptError naming the file if any byte differs from what was written, or if that was not one JSON object
    with distinct keys, or if there is no such file; DfError if it cannot be read.
    """
    data = read_bytes(path, MAX_JSON_BYTES)
    match = CHECKSUM_LINE.fullmatch(data)
    if not match or hashlib.sha256(match["body"]).hexdigest().encode() != match["sha256"]:
        raise CorruptError(f"{path} is damaged: its checksum does not match its contents", DAMAGED)
    try:
        obj = strict_json(data)
    except ValueError as error:
        raise CorruptError(f"{path} is damaged: {error}", DAMAGED) from error
    del obj["checksum"]
    return obj


def strict_json(data: bytes) -> dict[str, Any]:
    """Parse one JSON object. ValueError on bad JSON, duplicate keys, NaN and nesting beyond reason."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        obj = dict(pairs)
        if len(obj) < len(pairs):
            raise ValueError("a key appears twice")
        return obj

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        obj = json.loads(data.decode("utf-8"), object_pairs_hook=distinct, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(obj, dict):
        raise ValueError("it is not a JSON object")
    return obj


def check_format(obj: dict[str, Any], newest: int, path: Path) -> int:
    """The `format` of what was read from `path`: a version from 1 to `newest`, for its reader to deal with.

    DfError where it is newer than this program, CorruptError where it is no version at all.
    """
    version = obj.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CorruptError(f"{path} is damaged: it does not say which format it has", DAMAGED)
    if version > newest:
        raise DfError(f"{path} has format {version}; this dfcli reads formats up to {newest}", "use a newer dfcli")
    return version


class Temporary:
    """An empty folder beside `final`, which may not exist. It is removed by `discard`, or as debris after a crash."""

    def __init__(self, final: Path) -> None:
        """Raises DfError where it cannot be made."""
        self.path = _beside(final, "tmp")
        try:
            with os_errors("write", final):
                _make_folder(final.parent)
                os.mkdir(self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Delete the folder if it is still there."""
        _discard(self.path)


@contextmanager
def building(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `final` to be filled; if the block ends well it becomes `final`, durably.

    If the block or a later step fails, nothing of it remains and what stood at `final` still stands there.
    UsageError if `final` exists, unless `replace`. An OSError of the block is reported as failing to write
    `final`, so the block must turn its reading errors into DfErrors itself.
    """
    with os_errors("write", final):
        if not replace and os.path.lexists(final):
            raise UsageError(f"{final} exists already", "choose another name, or remove it first")
        temporary = Temporary(final)
        try:
            yield temporary.path
            _sync_tree(temporary.path)
            _publish(temporary.path, final, replace)
        finally:
            temporary.discard()


def remove_folder(path: Path) -> None:
    """Remove a folder (or a link to one) so that it vanishes whole: it is renamed first, then emptied.

    DfError if that cannot be made sure; then it stays, whole. What resists deletion after that is left to
    `clean_debris`.
    """
    doomed = _beside(path, "tmp")
    with os_errors("remove", path):
        _move((path, doomed))
    _discard(doomed)


def rename_folder(path: Path, name: str) -> None:
    """Give a folder another name beside the old one, durably. DfError where that fails; then it keeps its name."""
    with os_errors("rename", path):
        _move((path, path.with_name(name)))


def clean_debris(parent: Path) -> None:
    """Undo what killed processes left half-done in `parent`; what a living process works on is not touched.

    It is done in passing: what cannot be cleaned now is left, without an error, for the next time.
    """
    with suppress(OSError):
        for entry in sorted(os.listdir(parent)):
            match = TEMPORARY.fullmatch(entry)
            if not match or _in_use(parent / entry, int(match["pid"]), match["host"]):
                continue
            original = parent / match["name"]
            if match["kind"] == "old" and not os.path.lexists(original):
                with suppress(OSError):
                    os.rename(parent / entry, original)
            else:
                _discard(parent / entry)


def hold(file: Path) -> IO[bytes] | None:
    """Mark what `file` belongs to as being in use, for `alone`: a shared lock that ends when the returned file is
    closed, and with this process at the latest. None where there are no such locks, or the file is not there."""
    if fcntl is None:
        return None
    with suppress(OSError):  # a file system without locks: removal then cannot know
        handle = file.open("rb")
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            handle.close()
        else:
            return handle
    return None


@contextmanager
def alone(files: Iterable[Path], refusal: DfError) -> Iterator[None]:
    """Keep others from holding `files`. Those who hold one get half a second to end; then `refusal` is raised."""
    with ExitStack() as stack:
        for file in files:
            if fcntl is None:
                break
            if not file.is_file():  # nobody holds it, and a FIFO would be waited for
                continue
            with os_errors("read", file):
                handle = stack.enter_context(file.open("rb"))
            for last in [False] * 10 + [True]:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if last:
                        raise refusal from None
                    time.sleep(0.05)
                except OSError:  # a file system without locks
                    break
        yield


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with os_errors("read", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that may still be written at `path`, which need not exist yet."""
    with os_errors("read", path):
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        return shutil.disk_usage(existing).free


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable. Does nothing on Windows, which has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            with open(Path(place, name), "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _make_folder(folder: Path) -> None:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync_folder(place.parent)


def _publish(new: Path, final: Path, replace: bool) -> None:
    """Put a folder into its place; if that fails, what was there is there again."""
    if not (replace and os.path.lexists(final)):
        _move((new, final))
        return
    old = _beside(final, "old")
    try:
        _move((final, old), (new, final))
        _discard(old)
    finally:
        _temporaries.discard(old.name)


def _move(*moves: tuple[Path, Path]) -> None:
    """Rename within one folder, all durably or none: only what is sure to stay moved may be deleted."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            _rename(source, target)
            done.append((source, target))
        sync_folder(moves[-1][1].parent)
    except BaseException:
        for source, target in reversed(done):
            _rename(target, source)
        raise


def _rename(source: Path, target: Path) -> None:
    for seconds in PATIENCE:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _beside(path: Path, kind: str) -> Path:
    name = path.name if kind == "old" else path.name[:40]  # a long name must leave room for the rest
    temporary = path.with_name(f".{kind}-{name}-{os.getpid()}-{_host()}-{secrets.token_hex(4)}")
    _temporaries.add(temporary.name)
    return temporary


def _discard(path: Path) -> None:
    """Delete a file, link or folder as far as possible: what resists is debris, found again by its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    _temporaries.discard(path.name)


def _in_use(path: Path, pid: int, host: str) -> bool:
    with suppress(FileNotFoundError):
        status = path.lstat()
        changed = max(status.st_mtime, status.st_ctime)
        if host != _host():
            return time.time() - changed < FOREIGN_DEBRIS_SECONDS
        if pid == os.getpid():
            return path.name in _temporaries
        return process_lives(pid, changed)
    return False


def process_lives(pid: int, since: float) -> bool:
    """Whether the process that had this id at the time `since` (Unix seconds) still runs on this machine.

    Ids are reused (in containers almost at once), so a process that began later than `since` is another one.
    """
    import psutil

    try:
        return psutil.Process(pid).create_time() <= since + 2  # start times are known to about a second
    except (psutil.NoSuchProcess, ValueError):  # ValueError: no process ever had that id
        return False
    except psutil.AccessDenied:
        return True
