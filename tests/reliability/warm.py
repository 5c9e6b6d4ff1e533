"""Trainings in processes that start warm: PyTorch takes seconds to import, a fork of a process that has it a moment.

The parent never trains (a fork of a process with busy threads may hang); each child works on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import pty
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch

from dfcli.cli import app, commands, output

FOR_CHILDREN = """
    torch._dynamo typer._adapters filelock psutil soundfile numpy.ma encodings.ascii encodings.utf_32_le rich.table
    rich.live dfcli.cli.live dfcli.ingest.prepare dfcli.evaluation.evaluate dfcli.generation.sample
    dfcli.training.train dfcli.runs.rebuild dfcli.runs.tensors dfcli.system.stats
"""  # what they import sooner or later
for _name in FOR_CHILDREN.split():
    importlib.import_module(_name)
_TREE = commands.build(completion=False)

FAILED = 99  # a child's status where it raised what no command may raise


class Child:
    """A forked process that runs `action`; its status is what that returns, and `FAILED` where it raises.

    What it prints goes to the file `out`, or to a pseudo-terminal that is read here from `terminal`.
    """

    def __init__(
        self, action: Callable[[], int | None], out: Path, home: Path | None = None, *, terminal: bool = False
    ) -> None:
        self.out = out
        self.began = time.monotonic()
        self.terminal = -1
        if terminal:
            self.pid, self.terminal = pty.fork()
        else:
            self.pid = os.fork()
        if not self.pid:
            status = FAILED
            gc.freeze()  # else its first collection copies all pages of the parent
            commands.build = lambda completion: _TREE  # half of a small command's time
            try:
                if not terminal:
                    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                sys.stdin = open(os.devnull)  # noqa: SIM115
                sys.stdout = os.fdopen(1, "w", errors="replace")
                sys.stderr = os.fdopen(2, "w", errors="replace")
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                if home is not None:
                    os.environ["DFCLI_HOME"] = str(home)
                torch.set_num_threads(1)
                output.stdout.cache_clear()  # what they know of the terminal is of the parent's
                output.stderr.cache_clear()
                status = action() or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):  # a terminal that is gone
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ended(self) -> int | None:
        """Its status if it has ended: negative where a signal ended it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def hangs(self, seconds: float, since: float = 0.0, used: float = 0.0) -> bool:
        """Whether it has worked for so many seconds since that time, when it had `used` so many of the processor's:
        on a busy machine it is given ten times as long as on an idle one."""
        passed = time.monotonic() - (since or self.began)
        return passed > seconds and (self.seconds() - used > seconds or passed > 10 * seconds)

    def seconds(self) -> float:
        """How long it has had a processor."""
        with contextlib.suppress(psutil.Error):
            return sum(psutil.Process(self.pid).cpu_times()[:2])
        return 0.0

    def wait(self, seconds: float = 60) -> int:
        """Its status. A child that hangs for longer is killed, and an AssertionError."""
        while (status := self.ended()) is None:
            if self.hangs(seconds):
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"a child hung for {seconds} s\n{self.said()}")
            time.sleep(0.002)
        return status

    def said(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""


def command(words: list[str], out: Path, home: Path) -> Child:
    """`df` with these words, in a child."""
    return Child(lambda: app.run(words), out, home)


def main(work: Callable[..., dict[str, Any]], count: int, doc: str) -> None:
    """Run a long test from the command line: its figures are printed as JSON, and kept with `--keep`."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("count", type=int, nargs="?", default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FILE", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = work(Path(folder), arguments.count, seed=arguments.seed)
    figures = {
        "test": Path(sys.argv[0]).stem,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}",
        "seconds": round(time.monotonic() - began),
        "seed": arguments.seed,
        **figures,
    }
    text = json.dumps(figures, indent=2)
    if arguments.keep:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
        arguments.keep.write_text(text + "\n")
    print(text)
