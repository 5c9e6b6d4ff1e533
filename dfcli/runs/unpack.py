"""Opening a packed run (see `pack.py`): its members are checked and copied into a folder that is removed at the end."""

from __future__ import annotations

import atexit
import errno
import re
import zipfile
from pathlib import Path, PurePosixPath

from dfcli.errors import CorruptError, DfError
from dfcli.system import files
from dfcli.system.words import size

RUN = "run.json"
MEMBER = re.compile(r"(step-[0-9]{8,16}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
MOST_MEMBERS = 100
MOST_RATIO = 100  # of what is in a file to the file: beyond it the file was made to fill a disk


_unpacked: dict[tuple[str, int, int], Path] = {}  # by place, size and time


def unpack(path: Path) -> Path:
    """Copy the members of a packed run into a folder that is removed when the program ends; returns the folder.

    CorruptError where `path` is no packed run, or holds names or sizes that `pack` does not write.
    """
    with files.os_errors("read", path):
        status = path.stat()
        key = (str(path.absolute()), status.st_size, status.st_mtime_ns)
        if key in _unpacked:
            return _unpacked[key]
        try:
            with zipfile.ZipFile(path) as archive:
                _unpacked[key] = _extract(path, archive)
                return _unpacked[key]
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise CorruptError(f"{path} is damaged: {error}", files.DAMAGED) from None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise CorruptError(f"{path} is damaged: it names a place before its beginning", files.DAMAGED) from None


def _extract(path: Path, archive: zipfile.ZipFile) -> Path:
    members = [member for member in archive.infolist() if not member.is_dir()]
    total = sum(member.file_size for member in members)
    roots = {str(PurePosixPath(member.filename).parent) for member in members if member.filename.endswith(RUN)}
    root = roots.pop() if len(roots) == 1 else None
    prefix = "" if root in (None, ".") else f"{root}/"  # a folder that was zipped by hand is the top of all names
    names = [member.filename.removeprefix(prefix) for member in members]
    if root is None or len(set(names)) < len(names) or len(members) > MOST_MEMBERS:
        raise CorruptError(f"{path} is not a packed run", "`df runs pack` makes one")
    odd = [name for name in names if not MEMBER.fullmatch(name)]
    if odd:
        raise CorruptError(f"{path} holds the name {odd[0]!a}, which no packed run has", files.DAMAGED)
    if total > MOST_RATIO * path.stat().st_size:
        raise CorruptError(f"{path} would unpack to {size(total)}, far more than a packed run", files.DAMAGED)
    home = files.data_home() / "runs"
    files.clean_debris(home)
    if files.free_bytes(home) < total:
        raise DfError(f"{path} unpacks to {size(total)}, and {home} has less space", "free some space")
    temporary = files.Temporary(home / ".packed")
    atexit.register(temporary.discard)
    folder = temporary.path
    for member, name in zip(members, names, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        with archive.open(member) as source, (folder / name).open("xb") as target:
            left = member.file_size
            while data := source.read(min(1 << 20, left + 1)):
                left -= len(data)
                if left < 0:
                    raise CorruptError(f"{path} is damaged: {name} is longer than the file says", files.DAMAGED)
                target.write(data)
    return folder
