"""How help pages look: as Typer draws them, without the types of flags, which say nothing."""

from __future__ import annotations

from typer import Context
from typer.core import TyperCommand, TyperGroup, TyperOption


class Command(TyperCommand):
    """A command."""

    def get_help_option(self, ctx: Context) -> TyperOption | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _plain(super().get_help_option(ctx))


class Group(TyperGroup):
    """A command with commands of its own."""

    def get_help_option(self, ctx: Context) -> TyperOption | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _plain(super().get_help_option(ctx))


def _plain(option: TyperOption | None) -> TyperOption | None:
    if option is not None:
        option.metavar = ""
    return option
