"""An option is written once: as a field of a dataclass, with its type, default and help.

The command line makes its options from the fields, and the Python API takes them as keyword arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from dfcli.errors import UsageError
from dfcli.system.words import close


def option(
    default: Any,
    help: str,
    metavar: str = "",
    *,
    flags: tuple[str, ...] = (),
    kind: Any = None,
    bounds: tuple[float, float] | None = None,
    recipe: bool = False,
) -> Any:
    """A field that is an option. `flags` are its names on the command line, by default the field's name. `kind` is its
    type there, by default the field's type. `bounds` are the lowest and the highest value; floats must be above the
    lowest. `recipe`: it sets the recipe's field of the same name."""
    metadata = {"help": help, "metavar": metavar, "flags": flags, "kind": kind, "bounds": bounds, "recipe": recipe}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def same_option(cls: type, name: str, *, data: bool = False) -> Any:
    """The option of that name of another dataclass. `data`: it is the argument of
    `ingest.prepare` of the same name."""
    (found,) = (f for f in fields(cls) if f.name == name)
    return field(default=found.default, metadata={**found.metadata, "data": data})


def check_device(name: str) -> None:
    """Raise UsageError where `name` is the word of no device. Whether this machine has it is seen when it is used."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", name):
        gpu = re.fullmatch(r"gpu(:[0-9]{1,4})?", name.lower())
        meant = f"cuda{gpu[1] or ''}" if gpu else close(name, ("auto", "cpu", "mps", "cuda"))
        hint = f"did you mean `{meant}`? " if meant else ""
        raise UsageError(f"`{name}` is no device", f"{hint}use auto, cpu, cuda, cuda:0 (a GPU's number) or mps")


def device_option() -> Any:
    return option("auto", "auto, cpu, cuda, cuda:0 (a GPU's number) or mps.", "NAME")


def checkpoint_option() -> Any:
    return option("best", "best, last, or the number of a step.", "WHICH", kind=str)


def options(cls: type) -> Iterable[Field[Any]]:
    """The fields of a dataclass that are options. Those of the class itself stand before those that it inherits."""
    known = {f.name: f for f in fields(cls) if "help" in f.metadata}
    for each in cls.__mro__:
        if is_dataclass(each):
            yield from (known.pop(name) for name in each.__annotations__ if name in known)


def flag(field: Field[Any]) -> str:
    """The option's name on the command line."""
    return (field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",))[0]
