from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")

WORK = """
import sys, time
from dfcli.cli import signals
signals.exit_on_termination()
stop = signals.Stop()
try:
    with stop:
        print("ready", flush=True)
        for _ in range(150):
            time.sleep(0.01)
            if stop() and "stubborn" not in sys.argv:
                print(stop(), flush=True)
                sys.exit(stop.exit_code)
except KeyboardInterrupt:
    print("at once", flush=True)
    sys.exit(signals.INTERRUPTED)
"""


def run(
    numbers: list[int], *words: str, code: str = WORK, setup: Callable[[], None] | None = None
) -> tuple[int, str, str]:
    command = [sys.executable, "-c", code, *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=setup)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "terminated", 143),
        (signal.SIGHUP, "terminated", 143),
    ],
)
def test_the_first_signal_asks_to_stop_and_says_so(number: int, reason: str, code: int):
    status, out, err = run([number])
    assert (status, out) == (code, f"{reason}\n")
    assert "finished and saved" in err
    assert ("Ctrl-C again" in err) == (number == signal.SIGINT)


def test_the_second_interrupt_stops_at_once():
    assert run([signal.SIGINT, signal.SIGINT], "stubborn")[:2] == (130, "at once\n")


def test_a_second_termination_waits_for_the_save():
    """A terminal that closes and `timeout` send theirs twice."""
    started = time.monotonic()
    status, out, _ = run([signal.SIGTERM, signal.SIGHUP], "stubborn")
    assert (status, out) == (0, "")  # this worker never looks: it was left to its end
    assert time.monotonic() - started > 1.4


def test_ignored_signals_stay_ignored():
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    status, out, _ = run([signal.SIGHUP, signal.SIGINT, signal.SIGTERM], setup=nohup)
    assert (status, out) == (143, "terminated\n")


def test_outside_of_training_termination_cleans_up_and_exits():
    code = """
import time
from dfcli.cli import signals
signals.exit_on_termination()
try:
    print("ready", flush=True)
    time.sleep(20)
finally:
    print("clean", flush=True)
"""
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert run([number], code=code)[:2] == (143, "clean\n")


@pytest.mark.parametrize(("first", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_while_the_interpreter_shuts_down_changes_nothing(first: int, second: int, code: int):
    work = """
import time
from dfcli.cli import app

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

slow = Slow()
def work(arguments):
    print("ready", flush=True)
    time.sleep(20)

app._command = work
app.main([])
"""
    assert run([first, second], code=work) == (code, "", "")


def test_handlers_are_put_back():
    from dfcli.cli.signals import Stop

    before = signal.getsignal(signal.SIGINT)
    with Stop():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
