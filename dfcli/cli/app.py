"""The program: runs a command, and turns whatever goes wrong into a sentence, a hint and an exit code.

Only the standard library is imported before `main` runs, so that an early Ctrl-C is quiet too.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from dfcli.cli import signals
from dfcli.errors import DfError


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of `df`, `dfcli` and `python -m dfcli`. Always raises SystemExit.

    Exit codes: 0 done, 1 could not do it, 2 asked wrongly, 130 interrupted, 143 terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed by the caller: data that is written there fails, as data that is lost must
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # data is UTF-8 everywhere; no terminal is ever sent what it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    try:
        code = run(arguments)
    finally:
        signals.ignore()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        signals.exit_on_termination()
        return _command(arguments)
    except KeyboardInterrupt:
        return signals.INTERRUPTED
    except DfError as error:
        _report(error.message, error.hint)
        return error.exit_code
    except MemoryError:
        _report(*_OUT_OF_MEMORY)
    except Exception as error:
        if os.environ.get("DFCLI_DEBUG"):
            raise
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # PyTorch's
            _report(*_OUT_OF_MEMORY)
        else:
            _report(
                f"an unexpected {type(error).__name__}: {error}",
                "this is a defect of dfcli; the same command with DFCLI_DEBUG=1 set shows the traceback to report",
            )
    return 1


_OUT_OF_MEMORY = (
    "the device's memory ran out",
    "lower `--batch-size`, or take a smaller model (`--set context=...`, `--set layers=...`); "
    "when sampling, lower `--num`",
)


def _report(message: str, hint: str) -> None:
    from dfcli.cli import output

    output.error(message, hint)


def _command(arguments: list[str]) -> int:
    import typer

    from dfcli.cli import output
    from dfcli.cli.commands import build

    program = "dfcli" if Path(sys.argv[0]).stem == "dfcli" else "df"
    command = build(completion=program == "dfcli")
    try:
        if len(arguments) > 1 and arguments[0] == "-h" and arguments[1] not in command.commands:
            raise typer.BadParameter(f"`{arguments[1]}` is no command")  # `df -h /home` means the other df
        # The arguments are kept for the line that resumes a training.
        found = command.main(arguments, prog_name=program, standalone_mode=False, obj={"arguments": arguments})
        return found or 0
    except OSError:  # of the help, which Typer prints, if stdout cannot be written; else a defect
        output.write("")
        raise
    except typer.TyperException as error:  # asked wrongly: an unknown option, a missing or bad value
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            return error.exit_code
        message = _number_expected(error) or error.format_message().replace("Value error, ", "")
        message = " ".join(message.split()).removesuffix(".")
        _report(message[:1].lower() + message[1:], _hint(error, message, program, arguments, command.commands))
        return error.exit_code


def _number_expected(error: Exception) -> str:
    """The sentence for an option whose value is no number; "" for any other error."""
    option, cause = getattr(error, "param", None), error.__cause__
    for problem in getattr(cause, "errors", list)():  # pydantic's, whose own words are a library's
        kind = {"int": "a whole number", "float": "a number"}.get(problem["type"].partition("_")[0])
        if option is not None and kind:
            return f"{option.opts[0]} takes {kind}, not `{problem['input']}`"
    return ""


def _hint(error: Exception, message: str, program: str, arguments: list[str], commands: Container[str]) -> str:
    option = {"train": "--data", "sample": "--run", "eval": "--run"}.get(arguments[0])
    if option and (extra := re.search(r"extra argument\S* \((\S+)", message)):
        return f"name it by its option: `{option} {extra[1].rstrip(')')}`"
    context = getattr(error, "ctx", None)
    if context is not None and context.parent is not None:
        return f"`{context.command_path} --help` shows what there is"
    if arguments[0] in commands:
        return f"`{program} {arguments[0]} --help` shows what there is"
    if "Did you mean" in message or "Possible options" in message:
        return f"`{program} --help` lists the commands"
    disk = shlex.join(["command", "-p", "df", *arguments])
    return f"this is dfcli, which trains models: see `{program} --help`; for the disk tool type `{disk}`"
