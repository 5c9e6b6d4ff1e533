"""Runs the parts in order of value, each in a process of its own with a time limit, and prints a table.

python -m tests.gpu.main OUT [--device cuda|cpu|mps] [--quick] [--seconds 570]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.gpu import exact, limits, speed, training
from tests.gpu.common import Note, Where, machine, read

Part = Callable[[Where, Note], None]

# name: (part, seconds at most, what it is about)
PARTS: dict[str, tuple[Part, int, str]] = {
    "line": (training.line, 75, "df train gpt --data shakespeare.txt --device ..., Ctrl-C, and a sample"),
    "agree": (exact.agree, 150, "CPU and device agree: logits, gradients, the loss after 20 steps, for each preset"),
    "kernels": (exact.kernels, 120, "each kernel and graph against the plain step"),
    "resume": (training.resume, 60, "a stopped training goes on bit for bit"),
    "nano": (training.nano, 130, "preset nano: published validation loss 1.4697"),
    "lecture": (training.lecture, 130, "preset lecture: published validation loss of about 1.48"),
    "default": (training.default, 100, "the default recipe for a minute"),
    "sound": (training.sound, 100, "a WaveNet with labels: trained by default, heard, scored"),
    "throughput": (speed.throughput, 90, "training gpt2 (124M) at 1,024 tokens of context"),
    "generation": (speed.generation, 90, "generation by the plain and the fast engine"),
    "processes": (training.processes, 60, "torchrun on all GPUs (two processes on a CPU)"),
    "statistics": (limits.statistics, 30, "the live view's GPU figures against nvidia-smi"),
    "memory": (limits.memory, 80, "the plan's memory against the measured peak, for five shapes"),
    "out of memory": (limits.out_of_memory, 40, "memory that runs out is told in a sentence"),
}


ENDS = (signal.SIGTERM, signal.SIGHUP)


def work(part: str, where: Where) -> None:
    """One part, in its own process."""
    os.setsid()  # Ctrl-C is for the parent
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = open(where.out / "log.txt", "a")  # noqa: SIM115 - until the process ends
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    print(f"\n=== {part}", flush=True)
    os.environ["DFCLI_HOME"] = str(where.work / part.replace(" ", "-"))
    note, began = Note(where.out, part), time.perf_counter()
    note(status="running")
    try:
        note(**machine(where.device))
        PARTS[part][0](where, note)
    except BaseException as error:
        traceback.print_exc()
        note.check(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    note(status="failed" if note.failures else "passed", seconds=round(time.perf_counter() - began, 1))


def run(part: str, where: Where, seconds: float) -> None:
    """A part with its time limit. Whatever ends this process's wait, no process of the part is left."""
    # A forked process has PyTorch already; its parent has used no device. macOS cannot fork so.
    process = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Process(
        target=work, args=(part, where)
    )
    process.start()
    outcome = "interrupted"
    try:
        process.join(seconds)
        if process.is_alive():
            outcome = f"cut off after {seconds:.0f} s"
        else:
            outcome = f"failed: its process ended with {process.exitcode}" if process.exitcode else ""
    finally:
        kill(process.pid)
        process.join()
        if outcome:
            Note(where.out, part)(status=outcome)


def kill(number: int | None) -> None:
    """Kill a process and all below it, also those that torchrun put into sessions of their own. While they are listed a
    stopped process starts no more of them."""
    import psutil

    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(number)
        top.suspend()
        found = [top, *top.children(recursive=True)]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end(number: int, frame: object) -> None:
    """The handler of signals that end this script. The parts have the default meaning again, see `work`."""
    raise SystemExit(128 + number)


def table(where: Where) -> str:
    """The results so far, as Markdown."""
    results = read(where.out / "results.json")
    about = next((figures for figures in results.values() if "device" in figures), {})
    rows = [
        f"# {about.get('device', where.device)}, {about.get('date', time.strftime('%Y-%m-%d'))}",
        "",
        f"`bash tests/gpu/run OUT --device {where.device}{' --quick' if where.quick else ''}`; "
        f"precision {about.get('precision')}, driver {about.get('driver') or 'none'}, torch {about.get('torch')}, "
        f"CUDA {about.get('cuda')}, Python {about.get('python')}",
        "",
        *(["A rehearsal with tiny models: no figure below says anything of the device.", ""] if where.quick else []),
        "| part | result | seconds | figures |",
        "|---|---|---|---|",
    ]
    for part, (_, _, what) in PARTS.items():
        figures = results.get(part, {"status": "not run"})
        told = "; ".join([*figures.get("says", {}).values(), *figures.get("failures", [])])
        rows.append(f"| {part}: {what} | {figures['status']} | {figures.get('seconds', '')} | {told} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="rehearse with tiny models")
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="these parts")
    given = parser.parse_args()
    for number in ENDS:
        signal.signal(number, end)
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="dfcli-gpu-"))
    where = Where(given.out.absolute(), folder, given.device, given.quick)
    where.out.mkdir(parents=True, exist_ok=True)
    (where.out / "results.json").unlink(missing_ok=True)
    import dfcli.training.train  # noqa: F401 - imports PyTorch once, for all parts

    try:
        for part in given.only:
            left = given.seconds - (time.perf_counter() - began)
            try:
                if left < 15:
                    Note(where.out, part)(status="not run: the time was used up")
                else:
                    limit = PARTS[part][1] * (4 if given.quick else 1)  # a rehearsal may share its machine
                    run(part, where, min(limit, left))
            finally:
                (where.out / "summary.md").write_text(table(where))
            figures = read(where.out / "results.json")[part]
            print(f"{time.perf_counter() - began:5.0f} s  {part}: {figures['status']}", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for temporary in (str(folder), os.environ.get("GPU_SITE", "")):
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
    print(table(where))
    results = read(where.out / "results.json")
    sys.exit(0 if all(results[part]["status"] == "passed" for part in given.only) else 1)


if __name__ == "__main__":
    main()
