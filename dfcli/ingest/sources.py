"""What the user pointed at, as a list of files, and the text in them, read in chunks.

Files of folders are found recursively and in sorted order. What cannot be used is not dropped silently: it
comes back with a reason.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from dfcli.errors import DfError, UsageError
from dfcli.ingest.containers import EXTENSIONS, conversion, foreign, sniff
from dfcli.system.events import Note, OnEvent
from dfcli.system.files import data_home, os_errors
from dfcli.system.words import close

STDIN = "-"
CHUNK = 1 << 20  # bytes read at once
TEXT_SIGNATURES = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF8, codecs.BOM_UTF32_BE)
TEXT_SIGNATURES += (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PAR1")  # compressed, and Parquet
HEAD = 8192  # bytes that say what a file is
UNDECODED = "a sound or video file of a kind that cannot be decoded here"

Kind = str
"""Of a source: "text", "audio", or "media" for sound and video that cannot be decoded."""


class Stamp(NamedTuple):
    """What the file system says of a file; as long as it stays the same, so do the contents."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class Source:
    """One file, or standard input. `name` is how it is shown, `given` whether the user named it (rather
    than a folder it lies in)."""

    path: Path | None
    name: str
    kind: Kind
    size: int
    given: bool
    below: str = ""  # its path below the folder that the user named, with "/"; a file that was named: its name
    spooled: IO[bytes] | None = field(default=None, compare=False)

    @property
    def identity(self) -> str:
        """Where it is: an absolute path, or `-`."""
        return STDIN if self.path is None else os.path.abspath(self.path)

    def open(self) -> io.BufferedReader:
        """Its bytes from the start. Raises DfError."""
        if self.path is None:
            assert self.spooled is not None
            file = os.fdopen(os.dup(self.spooled.fileno()), "rb")
            file.seek(0)
            return file
        with os_errors("read", self.path):
            return self.path.open("rb")

    def looks_like_text(self) -> bool:
        """Whether it begins as text does. Raises DfError."""
        with self.open() as file:
            head = file.read(HEAD)
        if head.startswith(TEXT_SIGNATURES):
            return True
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            return False
        return bool(head) and b"\0" not in head

    def sha256(self) -> str:
        """The hash of its contents, hexadecimal. Raises DfError."""
        with self.open() as file, os_errors("read", Path(self.name)):
            return hashlib.file_digest(file, "sha256").hexdigest()

    def stamp(self) -> Stamp | None:
        """None for standard input. Raises DfError when the file is gone."""
        if self.path is None:
            return None
        with os_errors("read", self.path):
            status = self.path.stat()
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class Skipped:
    """A file that is left out, and why."""

    name: str
    reason: str


def discover(items: Iterable[str]) -> tuple[list[Source], list[Skipped]]:
    """The files that `items` (paths of files and folders, `-` for standard input) stand for, and what is
    left out.

    Links to files are followed, links to folders too unless they lead in a circle. Hidden files are left
    out. A file that is reached twice counts once. Raises UsageError where an item does not exist or is
    neither file nor folder.
    """
    sources: list[Source] = []
    skipped: list[Skipped] = []
    seen: dict[tuple[int, int], str] = {}

    def add(path: Path, given: bool, below: str) -> None:
        name = shown(path)
        try:
            status = path.stat()
        except OSError as error:
            reason = "a link that leads nowhere" if path.is_symlink() else f"unreadable: {error.strerror}"
            skipped.append(Skipped(name, reason))
            return
        identity = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            if given:
                raise UsageError(
                    f"{name} is neither a file nor a folder", "pipe its contents in, with `-` as the source"
                )
            skipped.append(Skipped(name, "not a regular file"))
        elif identity in seen:
            skipped.append(Skipped(name, f"the same file as {seen[identity]}"))
        else:
            seen[identity] = name
            sources.append(Source(path, name, _kind(path), status.st_size, given, below))

    for item in items:
        if item == STDIN:
            if any(source.path is None for source in sources):
                raise UsageError("standard input can be read only once")
            sources.append(_spool_stdin())
            continue
        path = Path(item)
        refuse_missing(item)
        if path.is_dir():
            for file in _walk(path, skipped):
                add(file, given=False, below=file.relative_to(path).as_posix())
        elif path.exists():
            add(path, given=True, below=path.name)
        else:
            raise UsageError(f"{shown(path)} is a link that leads nowhere")
    return sources, skipped


def refuse_missing(item: str, what: str = "file, folder or dataset") -> None:
    """Raise UsageError where there is no file or folder `item`, which should be `what`; DfError where that cannot be
    seen."""
    missing = not item or "\0" in item
    if not missing:
        with os_errors("read", Path(shown(item))):
            try:
                os.lstat(item)
            except PermissionError:
                raise
            except (OSError, ValueError):
                missing = True
    if missing:
        name = shown(item) or "without a name"
        raise UsageError(f"there is no {what} {name}", _meant(item, what) or "check the path")


def _meant(item: str, what: str) -> str:
    """The hint that names the file, dataset or public corpus whose name is closest to `item`."""
    from dfcli.data.dataset import dataset_names
    from dfcli.ingest.download import known_corpora

    several = [part.strip() for part in item.split(",")]
    if len(several) > 1 and all(map(os.path.lexists, several)):
        return f"give each by its own option: `{' '.join(f'--data {shlex.quote(shown(part))}' for part in several)}`"
    if name := close(os.path.basename(item), _beside(item)):
        return f"did you mean `{shown(Path(item).parent / name)}`?"
    if "dataset" not in what:
        return ""
    name = close(item, [*dataset_names(), *known_corpora()])
    return f"did you mean `{name}`?" if name else "`df data list` shows datasets"


def _beside(item: str) -> list[str]:
    """The names in the folder where `item` would be."""
    try:
        return os.listdir(os.path.dirname(item) or ".")
    except (OSError, ValueError):
        return []


class Lines:
    """Makes each line one document: "\\n" + line for every line that is not blank, and nothing else.

    Blank are lines of nothing but spaces and tabs; they are dropped, and counted in `blank`. Windows line
    ends become "\\n". A line may be of any length; memory is that of a few chunks.
    """

    BLANK = " \t\r\n"
    _blank_lines = re.compile(r"\n[ \t\r\n]*\n")

    def __init__(self) -> None:
        self.blank = 0

    def of(self, chunks: Iterable[str]) -> Iterator[str]:
        """The chunks of one text, rewritten: in what comes out a "\\n" begins each document, and none
        stands at the end."""
        held = "\n"  # blank characters at the end, of which it is not yet known whether a line follows
        half = ""  # of a "\r\n", perhaps
        for chunk in chunks:
            chunk = half + chunk
            half = "\r" if chunk.endswith("\r") else ""
            text = held + chunk.removesuffix(half).replace("\r\n", "\n")
            cleaned, runs = self._blank_lines.subn("\n", text)
            if runs:
                self.blank += text.count("\n") - cleaned.count("\n")
                text = cleaned
            body = text.rstrip(self.BLANK)
            held = text[len(body) :]
            if len(held) > CHUNK:  # a million blanks in a row are taken as they are
                body, held = text, ""
            if body:
                yield body
        rest, _, lines = (held + half).partition("\n")
        self.blank += lines.count("\n") + bool(lines.rpartition("\n")[2])
        if rest:
            yield rest


def refuse_undecoded(source: Source, wanted: Kind | None) -> None:
    """Raise DfError for sound or video that cannot be decoded; where audio is `wanted`, also for what is no text."""
    hint = conversion(source.name if source.path else "")
    if source.kind == "media":
        raise DfError(f"{source.name} is {UNDECODED}", hint)
    if wanted == "audio" and source.kind == "text" and source.size and not source.looks_like_text():
        with source.open() as file:
            head = file.read(4)
        name = shlex.quote(source.name)
        if head == b"MThd":
            raise DfError(
                f"{source.name} is MIDI: it holds notes, no sound", "let a synthesiser make a recording of it"
            )
        if head == b"PK\3\4":
            folder = shlex.quote(os.path.splitext(source.name)[0])
            hint = f"unpack it and give the folder: `unzip {name} -d {folder}`"
            raise DfError(f"{source.name} is a zip archive", hint)
        raise DfError(f"{source.name} is neither sound that can be decoded here nor text", hint)


def nothing_usable(skipped: Sequence[Skipped], purpose: str = "learn from") -> DfError:
    """The error for sources of which nothing is left to `purpose`."""
    reasons = list_some([f"{file.name} ({file.reason})" for file in skipped])
    return DfError(
        f"the sources hold nothing to {purpose}",
        f"left out: {reasons}{_how_to_convert(skipped)}" if skipped else "name a file, or a folder that holds some",
    )


def _how_to_convert(skipped: Sequence[Skipped]) -> str:
    name = next((file.name for file in skipped if file.reason == UNDECODED), None)
    return "" if name is None else f"; {conversion(name)}"


def note_skipped(skipped: dict[str, Any], on_event: OnEvent) -> None:
    """Tell what was left out, as dataset.json has it: {"count": n, "files": [{"name": ..., "reason": ...}]}."""
    if skipped["count"]:
        files = [f"{file['name']} ({file['reason']})" for file in skipped["files"]]
        what = "file was" if skipped["count"] == 1 else "files were"
        on_event(Note(f"{skipped['count']:,} {what} left out: {list_some(files, skipped['count'])}"))


def list_some(names: Sequence[str], total: int | None = None) -> str:
    """The first few names, and how many of `total` (default: all) there are besides."""
    more = (len(names) if total is None else total) - len(names[:3])
    return ", ".join(names[:3]) + (f" and {more:,} more" if more else "")


def shown(path: str | Path) -> str:
    """A path as it may be printed: control characters and undecodable bytes are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _kind(path: Path) -> Kind:
    """Sound by what stands in it or by its name; anything else may be text."""
    try:
        with path.open("rb") as file:
            return _kind_of(file.read(HEAD), path.name)
    except OSError:  # told when it is read
        return _kind_of(b"", path.name)


def _kind_of(head: bytes, name: str) -> Kind:
    if sniff(head):
        return "audio"
    if foreign(head, name):
        return "media"
    return "audio" if name.lower().endswith(EXTENSIONS) else "text"


def _walk(folder: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Every file below a folder that is not hidden, sorted by its path; each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        place = stack.pop()
        try:
            status = place.stat()
            if not stat.S_ISDIR(status.st_mode):
                yield place
                continue
            if (status.st_dev, status.st_ino) in entered:
                skipped.append(Skipped(shown(place), "a folder that was entered before"))
                continue
            entered.add((status.st_dev, status.st_ino))
            names = sorted((name for name in os.listdir(place) if not name.startswith(".")), reverse=True)
        except FileNotFoundError:
            yield place  # a link that leads nowhere
        except OSError as error:
            skipped.append(Skipped(shown(place), f"unreadable: {error.strerror}"))
        else:
            stack += [place / name for name in names]


def _spool_stdin() -> Source:
    """Standard input, copied to a nameless file, because text is read twice."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("standard input is a terminal", "pipe a text in: `cat book.txt | df ... -`")
    with os_errors("write", data_home()):
        data_home().mkdir(parents=True, exist_ok=True)
        spooled = tempfile.TemporaryFile(dir=data_home())  # noqa: SIM115 - it is closed with the Source
        while data := sys.stdin.buffer.read(CHUNK):
            spooled.write(data)
        spooled.flush()
        size = spooled.tell()
        spooled.seek(0)
        kind = _kind_of(spooled.read(HEAD), "")
    return Source(None, "standard input", kind, size, True, spooled=spooled)
