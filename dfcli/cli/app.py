"""The program: runs a command, and turns every error into a sentence, a hint and an exit code.

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
from dfcli.system import processes


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of `df`, `dfcli` and `python -m dfcli`. Always raises SystemExit.

    Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    # Idle threads of PyTorch spin for 4 ms before they sleep, on CPUs that other programs or compiled code need. With
    # so few turns a busy neighbour on one of two CPUs leaves half of the speed, where 10,000 left a third; without one
    # they cost up to a fifth (tests/benchmarks/busy.py). Read when PyTorch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed by the caller: writing data must fail, not lose it
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # data is UTF-8 everywhere; a terminal keeps its own encoding
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
        if not (isinstance(error, processes.Elsewhere) and processes.rank()):
            _report(error.message, error.hint)
        return error.exit_code
    except MemoryError:
        _report(*_OUT_OF_MEMORY)
    except Exception as error:
        if os.environ.get("DFCLI_DEBUG"):
            raise
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # PyTorch's
            _report(*_OUT_OF_MEMORY)
        elif "failed to map segment" in str(error) or "annot allocate memory" in str(error):  # the dynamic linker's
            _report(*_LIMITED)
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


_LIMITED = (
    "this process may not take the memory that PyTorch needs",
    "raise the limit: `ulimit -v` shows it in kB, and a container or a batch system may set one too",
)


def _report(message: str, hint: str) -> None:
    from dfcli.cli import output

    if processes.rank():
        message = f"process {processes.rank()} of {processes.count()}: {message}"
    output.error(message, hint)


def _command(arguments: list[str]) -> int:
    import typer

    from dfcli.cli import output
    from dfcli.cli.commands import build

    program = "dfcli" if Path(sys.argv[0]).stem == "dfcli" else "df"
    command = build(completion=program == "dfcli")
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        if len(arguments) > 1 and arguments[0] == "-h" and arguments[1] not in command.commands:
            raise typer.BadParameter(f"`{arguments[1]}` is no command")  # `df -h /home` means the other df
        # The arguments are kept for the line that resumes a training.
        found = command.main(arguments, prog_name=program, standalone_mode=False, obj={"arguments": arguments})
        return found or 0
    except OSError:  # Typer could not print the help to stdout; any other OSError is a defect
        output.write("")
        raise
    except typer.TyperException as error:  # wrong usage: an unknown option, a missing or bad value
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            return error.exit_code
        message, hint = _number_expected(error)
        message = message or error.format_message().replace("Value error, ", "")
        message = " ".join(message.split()).removesuffix(".")
        hint = hint or _hint(error, message, program, arguments, command.commands)
        _report(message[:1].lower() + message[1:], hint)
        return error.exit_code


def _number_expected(error: Exception) -> tuple[str, str]:
    """Sentence and hint for an option whose value is no number; empty for any other error."""
    from dfcli.cli import guess

    option, cause = getattr(error, "param", None), error.__cause__
    for problem in getattr(cause, "errors", list)():  # pydantic's, whose own words are a library's
        kind = {"int": "a whole number", "float": "a number"}.get(problem["type"].partition("_")[0])
        if option is not None and kind:
            name = option.opts[0]
            kind = {"--minutes": "minutes, for example 5", "--seconds": "seconds, for example 1.5"}.get(name, kind)
            meant = guess.number(name, str(problem["input"]), kind == "a whole number")
            return f"{name} takes {kind}, not `{problem['input']}`", f"type `{name} {meant}`" if meant else ""
    return "", ""


def _hint(error: Exception, message: str, program: str, arguments: list[str], commands: Container[str]) -> str:
    from dfcli.cli import guess
    from dfcli.system.words import close

    context = getattr(error, "ctx", None)
    path = context.command_path.split()[1:] if context is not None else []
    rest = arguments[len(path) :]
    if "Did you mean" not in message:
        line, meant = "", ""
        one_dash = next((word for word in rest if re.match(r"-[a-z]{2}", word)), "")
        if message.startswith("No such option: -") and not message.startswith("No such option: --") and one_dash:
            line = shlex.join([program, *path, *(f"-{word}" if word == one_dash else word for word in rest)])
        elif rest and message.startswith("No such command"):
            line = guess.command_line(program, " ".join(path), rest)
        elif path == ["train"] and (bad := re.search(r": '(.+)' is not one of 'gpt', 'wavenet'", message)):
            at = rest.index(bad[1]) if bad[1] in rest else 0
            line = guess.command_line(program, "train", [bad[1], *rest[:at], *rest[at + 1 :]])
        elif path == ["train"] and message.startswith("Missing argument"):
            line = shlex.join([program, "train", "gpt", *rest])
        elif bad := re.search(r": '(.+)' is not one of (.+)", message):
            meant = close(bad[1], re.findall(r"'(.+?)'", bad[2]))
        elif options := getattr(error, "possibilities", None):
            bare = {option.lstrip("-"): option for option in options}  # dashes would make all of them alike
            meant = bare.get(close(getattr(error, "option_name", "").lstrip("-"), bare), "")
        if meant:
            return f"did you mean `{meant}`?"
        if line and path:
            return f"type `{line}`"
        if line:
            return (
                f"to use it type `{line}`; for the disk tool type `{shlex.join(['command', '-p', 'df', *arguments])}`"
            )
    if context is not None and context.parent is not None:
        what = "commands" if hasattr(context.command, "commands") else "options"
        return f"`{context.command_path} --help` lists its {what}"
    if arguments[0] in commands:
        return f"`{program} {arguments[0]} --help` lists its options"
    if "Did you mean" in message or "Possible options" in message:
        return f"`{program} --help` lists the commands"
    disk = shlex.join(["command", "-p", "df", *arguments])
    return f"this is dfcli, which trains models: see `{program} --help`; for the disk tool type `{disk}`"
