"""The effects of Ctrl-C and termination. Signals that were ignored when the program began (nohup, `&`) stay ignored.

Windows has no SIGHUP, and there only SIGINT and SIGBREAK (Ctrl-Break, a closing console) come from outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any

from dfcli.system import processes

INTERRUPTED, TERMINATED = 130, 143
_TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


def exit_on_termination() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit(143), so that files are cleaned up and the cursor comes back."""
    for number in _TERMINATION:
        _install(number, _terminate)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def ignore() -> None:
    """Ignore further signals. Python restores their default meaning while it shuts down, and a second signal would then
    change the exit code."""
    for number in (signal.SIGINT, *_TERMINATION):
        signal.signal(number, signal.SIG_IGN)


def _install(number: int, handler: Any) -> None:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


class Stop:
    """A request to stop that training looks at after each step.

    Inside the `with` block the first Ctrl-C, SIGTERM or SIGHUP only sets `exit_code`; a second Ctrl-C raises
    KeyboardInterrupt at once. A second SIGTERM does not: a closing terminal and `timeout` send theirs twice.
    """

    def __init__(self, announce: bool = True) -> None:
        self.exit_code = 0
        self.saved = False  # whether nothing is left to save
        self.announce = announce
        self._before: dict[int, Any] = {}
        self._again = processes.count() == 1  # torchrun passes on a Ctrl-C that its processes have had already

    def __call__(self) -> str | None:
        """The reason to stop training, or None."""
        return {0: None, INTERRUPTED: "interrupted", TERMINATED: "terminated"}[self.exit_code]

    @property
    def notice(self) -> str:
        """The message after a request to stop."""
        if self.saved:
            return "stopping: the run is finished and saved; `df runs show` measures the whole validation split"
        more = "; Ctrl-C again stops at once" if self.exit_code == INTERRUPTED and self._again else ""
        return f"stopping: this step is finished and saved first{more}"

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, *_TERMINATION):
            self._before[number] = signal.getsignal(number)
            _install(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code == INTERRUPTED and self._again:
            raise KeyboardInterrupt
        self.exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if self.announce:  # not through Rich or sys.stderr, whose buffers the signal may have interrupted
            with contextlib.suppress(OSError):  # its reader may be gone
                os.write(sys.stderr.fileno(), f"{self.notice}\n".encode())
