"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from dfcli.cli import output
from dfcli.errors import UsageError
from dfcli.system.options import checkpoint_option, device_option, flag, options

STDIN_SECONDS = 0.5  # of silence on standard input before saying that it is being read


def with_options(cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a Typer command the options of a dataclass (`system.options`) in place of its `**options`. They stand before
    its keyword-only parameters."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        last = [p for p in own if p.kind == p.KEYWORD_ONLY]
        hints = get_type_hints(cls)
        parameters = [_parameter(f, f.metadata["kind"] or hints[f.name]) for f in options(cls)]
        signature = inspect.Signature([*own[: len(own) - len(last)], *parameters, *last])
        command.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def _parameter(f: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    default = None if f.default is dataclasses.MISSING else f.default
    if get_origin(kind) in (tuple, Mapping):  # may be repeated
        kind, default = list[str] | None, None
    choices = Literal in (get_origin(kind), *map(get_origin, get_args(kind)))
    declared = _declared(f, *(f.metadata["flags"] or (flag(f),)), metavar=None if choices else "")
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def _declared(f: dataclasses.Field[Any], *flags: str, metavar: str | None = "") -> Any:
    """Typer's form of an option, of `metavar` where the option has none of its own."""
    return typer.Option(
        *flags, metavar=f.metadata["metavar"] or metavar, help=f.metadata["help"], case_sensitive=False
    )  # fmt: skip


def key_values(items: list[str] | None, option: str, form: str, example: str) -> dict[str, str]:
    """`["layers=4"]` -> {"layers": "4"}. Raises UsageError for what is not of this `form`, or is given twice."""
    found: dict[str, str] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not (equals and key.strip() and value):
            raise UsageError(f"`{option} {item}` is not {form}", f"for example `{option} {example}`")
        if key.strip() in found:
            raise UsageError(f"`{option} {key.strip()}` is given twice")
        found[key.strip()] = value
    return found


RunName = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="A run's name or folder; the newest by default.")
]
Checkpoint = Annotated[str, _declared(checkpoint_option(), "--checkpoint")]
Device = Annotated[str, _declared(device_option(), "--device")]
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
        raise UsageError(f"this would {what}, and there is no terminal to confirm on", "repeat it with `--yes`")
    output.stderr().print(output.one_line(what) + "? [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
