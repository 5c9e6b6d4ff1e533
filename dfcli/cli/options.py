"""Options that several commands share."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dfcli.cli import output

Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:<n> or mps.")]
RunName = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="A run's name or folder; the newest by default.")
]
Checkpoint = Annotated[str, typer.Option("--checkpoint", metavar="WHICH", help="best, last, or the number of a step.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")]


def mention_terminal(sources: list[str]) -> None:
    """Say that standard input is being read where a person has to type it."""
    if "-" in sources and sys.stdin is not None and sys.stdin.isatty():
        output.say("reading standard input; end it with Ctrl-D (Ctrl-Z and Enter on Windows)")


def confirmed(what: str, yes: bool) -> bool:
    """Whether to do `what`, which cannot be undone: asks only where a person sits at the terminal."""
    if yes or sys.stdin is None or not sys.stdin.isatty():
        return True
    output.stderr().print(output.one_line(what) + "? [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
