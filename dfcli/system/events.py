"""What long functions tell their caller while they work, by `on_event(event)`; only `cli/` makes text of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """Something the user should know: a fact or a warning, in one sentence."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A value that was chosen automatically, and why."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True)
class Progress:
    """How far a piece of work has come. `total` is None where it is not known; `unit` is "bytes", "files", ..."""

    what: str
    done: int
    total: int | None
    unit: str


OnEvent = Callable[[object], None]


def ignore(_event: object) -> None:
    """The callback of callers who do not listen."""
