"""The command tree, and the page that `df --help` shows."""

from __future__ import annotations

from typing import Annotated, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

import dfcli
from dfcli.cli import data, eval, report, runs, sample, train
from dfcli.cli.layout import Command, Group

SETTINGS = {"help_option_names": ["-h", "--help"]}


class Ordered(Group):
    """The root. It lists its commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ["train", "sample", "eval", "report", "data", "runs"]


def build(completion: bool) -> TyperGroup:
    """The command tree. `completion` adds --install-completion and --show-completion.

    Only `dfcli` has them. A completion of `df` would run the disk tool outside this environment.
    """
    app = typer.Typer(
        cls=Ordered,
        context_settings=SETTINGS,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback(invoke_without_command=True)(root)
    app.command("train", cls=Command)(train.train)
    app.add_typer(sample.app, name="sample")
    app.command("eval", cls=Command)(eval.evaluate)
    app.command("report", cls=Command)(report.report)
    app.add_typer(data.app, name="data")
    app.add_typer(runs.app, name="runs")
    return cast(TyperGroup, get_command(app))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dfcli {dfcli.__version__}")
        raise typer.Exit


def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, metavar="", help="Print the version.")
    ] = False,
) -> None:
    """Train, hear, read and measure a small GPT or WaveNet.

    Text and audio become token ids. A GPT or a WaveNet learns to predict the
    next id. Its predictions become text or sound again.

    Examples:
      df train gpt --minutes 1                   learn from built-in text
      df sample gpt                              read what the newest GPT writes
      df train wavenet --data recordings/        learn from your own audio
      df sample wavenet --seconds 4 -o out.wav   hear the newest WaveNet
      df eval                                    measure the newest run, beside baselines
      df report                                  one page about the newest run
      df runs list                               see what was trained

    The disk tool of the same name is `command -p df`.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
