"""Options that several commands share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from dfcli.cli import output
from dfcli.errors import UsageError

STDIN_SECONDS = 0.5  # of silence on standard input before saying that it is being read

Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:<n> or mps.")]
RunName = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="A run's name or folder; the newest by default.")
]
Checkpoint = Annotated[str, typer.Option("--checkpoint", metavar="WHICH", help="best, last, or the number of a step.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask for confirmation.")]


@contextmanager
def reading_stdin(what: str) -> Iterator[None]:
    """Say that standard input is being read: at once where a person has to type it, else where it keeps silent."""
    if sys.stdin is not None and sys.stdin.isatty():
        output.say(f"reading {what} from standard input; end it with Ctrl-D (Ctrl-Z and Enter on Windows)")
        yield
        return
    waiting = threading.Timer(STDIN_SECONDS, output.say, [f"reading {what} from standard input until it ends"])
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def mention_stdin(sources: list[str]) -> None:
    """Say that the data is read from a pipe. A terminal is refused where it would be read."""
    if "-" in sources and sys.stdin is not None and not sys.stdin.isatty():
        output.say("reading the data from standard input")


def confirmed(what: str, yes: bool) -> bool:
    """Whether to do `what`, which cannot be undone. UsageError where nobody can be asked and `--yes` was not given."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"nobody can be asked whether to {what}", "repeat it with `--yes`")
    output.stderr().print(output.one_line(what) + "? [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
