"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from dfcli.cli import output
from dfcli.errors import UsageError
from dfcli.training.request import DEVICES, Request, flag

STDIN_SECONDS = 0.5  # of silence on standard input before saying that it is being read


def request_options() -> list[inspect.Parameter]:
    """The options of `training.request.Request`, as parameters of a Typer command."""
    hints = get_type_hints(Request)
    return [_parameter(f, hints[f.name]) for f in dataclasses.fields(Request) if "help" in f.metadata]


def _parameter(f: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    default = f.default
    if get_origin(kind) in (tuple, Mapping):  # may be repeated
        kind, default = list[str] | None, None
    declared = typer.Option(
        *(f.metadata["flags"] or (flag(f),)), metavar=f.metadata["metavar"], help=f.metadata["help"]
    )
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


Device = Annotated[str, typer.Option("--device", metavar="NAME", help=DEVICES)]
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
