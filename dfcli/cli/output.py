"""Output for people and programs: data goes to stdout, everything else to stderr.

Text from models, files and names is shown through `printable`, so that it cannot drive the terminal. Rich is
imported only where something is drawn, which keeps `df --help` fast.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import IO, TYPE_CHECKING, Any, cast

from dfcli.cli.figures import count, duration, short, size
from dfcli.errors import DfError
from dfcli.system.events import Choice, Note, Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

NARROW = 60  # columns below which a choice and its reason are one paragraph
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal

# C0 and C1 controls, what changes the direction of text, line separators, and halves of surrogate pairs.
_INERT = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with control characters shown as \\x1b, \\u202e and the like, except those in `keep`.

    Works a character at a time, so text may come in pieces.
    """
    return _INERT.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def one_line(text: object) -> str:
    """`printable` without line breaks: for names, paths and other parts of a sentence."""
    return printable(str(text), keep="")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class _Stderr:
    """Standard error as a file whose writes never fail, because a closed log must not end a training."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    @staticmethod
    def _stream() -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # Rich's Live replaces sys.stderr by a proxy

    def write(self, text: str) -> int:
        try:
            return self._stream().write(text)
        except OSError:
            silence(self._stream())
            return len(text)

    def flush(self) -> None:
        try:
            self._stream().flush()
        except OSError:
            silence(self._stream())


@cache
def stderr() -> Console:
    """The Rich console for messages and views. Without a terminal, lines are not wrapped."""
    from rich.console import Console

    return _wide(Console(file=cast("IO[str]", _Stderr()), markup=False, highlight=False, emoji=False))


@cache
def stdout() -> Console:
    """The Rich console for tables. They are cut to the width of a terminal, and complete without one."""
    from rich.console import Console

    return _wide(Console(markup=False, highlight=False, emoji=False))


def _wide(console: Console) -> Console:
    if not console.is_terminal:
        console.width = 100_000
    return console


def animated() -> bool:
    """Whether stderr can show a live view."""
    return stderr().is_interactive and not stderr().is_dumb_terminal


def unicode() -> bool:
    """Whether stderr can show characters beyond ASCII."""
    return (stderr().encoding or "").lower().startswith("utf")


def silence(stream: Any) -> None:
    """Discard further writes to `stream`, because its reader is gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def write(data: str | bytes) -> None:
    """Write data to stdout unchanged, and flush it. Raises DfError if that fails."""
    try:
        if isinstance(data, str):
            sys.stdout.write(data)
        else:
            sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        raise SystemExit(1) from None  # quietly, like other filters whose reader has closed the pipe
    except OSError as error:
        silence(sys.stdout)
        if error.errno == errno.EINVAL and os.name == "nt":  # what Windows says of a closed pipe
            raise SystemExit(1) from None
        raise DfError(f"could not write to standard output: {error.strerror}") from None


class Stdout(io.RawIOBase):
    """Standard output as a binary stream that reports errors as `write` does. It is seekable if stdout is a file."""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return sys.stdout.buffer.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return sys.stdout.buffer.seek(offset, whence)

    def fileno(self) -> int:
        return sys.stdout.fileno()

    def write(self, data: Any) -> int:
        write(bytes(data))
        return len(data)


def write_json(value: dict[str, Any]) -> None:
    """Write one JSON object to stdout, in ASCII, which is inert on a terminal; NaN and infinity are null."""
    write(json.dumps(_finite(value), indent=2, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def loading() -> Iterator[None]:
    """Show a status line while PyTorch is imported, because that takes seconds."""
    if animated():
        with stderr().status("loading"):
            yield
    else:
        yield


def say(text: str, style: str | None = None, fold: bool = True) -> None:
    """Print a line on stderr. `fold` wraps it between words; a command to copy must not be wrapped."""
    stderr().print(printable(text), style=style, soft_wrap=not fold)


def error(message: str, hint: str = "") -> None:
    """Print an error: a sentence, and a hint below it."""
    from rich.text import Text

    stderr().print(Text.assemble(("error", "bold red"), ": ", one_line(message)))
    if hint:
        stderr().print(Text.assemble("\n", ("hint", "bold cyan"), ": ", printable(hint)))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Print a table on stdout, in plain aligned columns. Those in `right` are right-aligned; the others are wrapped
    where a terminal is too narrow."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        side = "right" if column in right else "left"
        grid.add_column(column, justify=side, no_wrap=side == "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(one_line(cell)) for cell in row))
    _write_rich(grid)


def pairs(items: Iterable[tuple[str, object]]) -> None:
    """Print names and values on stdout, one pair a line, aligned."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in items:
        grid.add_row(name, Text(one_line(value)))
    _write_rich(grid)


def paragraph(text: str) -> None:
    """Print a sentence on stdout, wrapped between words on a terminal."""
    from rich.text import Text

    _write_rich(Text(one_line(text)))


def _write_rich(drawing: RenderableType) -> None:
    with stdout().capture() as captured:
        stdout().print(drawing)
    write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


class Listener:
    """Shows the events of long-running functions on stderr: notes and choices as lines, progress as a bar.

    A context manager; call it with events. Without a terminal, progress is a line every ten seconds. When
    `quiet`, it shows nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self.line_due = time.monotonic() + LINE_SECONDS  # without a terminal

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()

    def __call__(self, event: object) -> None:
        if self.quiet:
            return
        if isinstance(event, Note):
            say(event.text)
        elif isinstance(event, Choice):
            self.choice(event)
        elif isinstance(event, Progress):
            self.progress(event)

    @staticmethod
    def choice(event: Choice) -> None:
        """A chosen value and, fainter, its reason."""
        from rich.table import Table
        from rich.text import Text

        if stderr().width < NARROW:
            say(f"{event.what}: {event.value} ({event.reason})")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=13, no_wrap=True)
        grid.add_column(min_width=16)
        grid.add_column(style="dim")
        grid.add_row(Text(one_line(event.what), style="bold"), one_line(event.value), one_line(event.reason))
        stderr().print(grid)

    def progress(self, event: Progress) -> None:
        """Show the progress of one task, its rate and the remaining time."""
        seconds = time.monotonic() - self._started.setdefault(event.what, time.monotonic())
        rate = event.done / seconds if seconds > 0.5 else 0.0
        figure = size if event.unit == "bytes" else count
        unit = "" if event.unit == "bytes" else f" {event.unit}"
        text = figure(event.done) + (f" / {figure(event.total)}" if event.total else "") + unit
        if rate:
            text += f"  {size(rate) if event.unit == 'bytes' else short(rate)}/s"
            if event.total and event.done < event.total:
                text += f"  {duration((event.total - event.done) / rate)} left"
        self.bar(event.what, event.done, event.total, text)
        if event.done == event.total:
            del self._started[event.what]  # the next task of this name has a rate of its own

    def bar(self, what: str, done: float, total: float | None, figures: str) -> None:
        """Update the bar `what` and the figures beside it. Without a terminal, print a line every ten seconds."""
        if self.quiet:
            return
        if not animated():
            now = time.monotonic()
            if now >= self.line_due and done != total:
                self.line_due = now + LINE_SECONDS
                say(f"{what}: {figures}")
            return
        what = one_line(what)
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, figures="")
        self._bar.update(self._tasks[what], completed=done, total=total, figures=figures)
        if total is not None and done >= total:
            self._bar.remove_task(self._tasks.pop(what))


def _new_bar() -> Bar:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[figures]}", markup=False, style="dim"),
        console=stderr(),
        transient=True,
    )
