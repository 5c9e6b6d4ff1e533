"""The one family of errors that a user may see: a sentence, a hint, an exit code. Anything else is a defect."""

from __future__ import annotations


class DfError(Exception):
    """Something could not be done. `message` is one sentence without a full stop; `hint` says what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DfError):
    """Something was asked wrongly: a value out of range, a name that is taken, a device that is not there."""

    exit_code = 2


class CorruptError(DfError):
    """A file on disk is not what was written: truncated, changed, or of an unknown format."""
