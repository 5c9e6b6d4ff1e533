"""Commands and groups as Typer draws them, without the types of flags and arguments; they read words in any case, say
which of two values of an option is used, and which line was probably meant."""

from __future__ import annotations

from typing import Any

from typer import Context
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from dfcli.cli import output
from dfcli.errors import UsageError


class Command(TyperCommand):
    """A command."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for argument in self.params:  # help shows an argument's name and its type; a type helps only with choices
            if isinstance(argument, TyperArgument) and not argument.type_descriptor.is_choice:
                argument.display_type_rich = lambda ctx: ""

    def get_help_option(self, ctx: Context) -> TyperOption | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _plain(super().get_help_option(ctx))

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.resilient_parsing:
            given, extra, order = self.make_parser(ctx).parse_args(list(args))
            if "help" not in given:
                for parameter in self.params:
                    value = given.get(str(parameter.name))
                    if order.count(parameter) > 1 and isinstance(value, str) and not getattr(parameter, "multiple", 1):
                        output.say(f"{parameter.opts[0]} is given twice: `{value}` is used")
                if extra:
                    self._refuse(ctx, args, extra, given)
        return super().parse_args(ctx, args)

    def _refuse(self, ctx: Context, args: list[str], extra: list[str], given: dict[str, Any]) -> None:
        from dfcli.cli import guess

        program, _, command = ctx.command_path.partition(" ")
        line = guess.line(program, command, args, extra, given)
        words = "word" if len(extra) == 1 else "words"
        raise UsageError(
            f"`{ctx.command_path}` has no place for the {words} `{' '.join(extra)}`",
            f"type `{line}`" if line else f"`{ctx.command_path} --help` lists its options",
        )


class Group(TyperGroup):
    """A command with commands of its own."""

    def get_help_option(self, ctx: Context) -> TyperOption | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _plain(super().get_help_option(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].lower() in self.commands:
            args = [args[0].lower(), *args[1:]]
        return super().resolve_command(ctx, args)


def _plain(option: TyperOption | None) -> TyperOption | None:
    if option is not None:
        option.metavar = ""
    return option
