"""Bounds on a core's dimensions, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Collection

MAX_PARAMETERS = 20_000_000_000


def whole(name: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless `value` is an int with low <= value <= high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high:,}, not {value!r}")


def flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")


def choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def affordable(parameters: int) -> None:
    """Raise ValueError where a model would have more parameters than any machine this is made for."""
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"the model would have {parameters:,} parameters, more than {MAX_PARAMETERS:,}")
