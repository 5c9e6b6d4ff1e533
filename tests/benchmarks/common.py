"""What the benchmarks share: an anchor to compare with, the machine's rate, the memory of a child process, the report.

An anchor is a plain eager PyTorch loop, as a tutorial would write it, with nothing of the trainer in it. It is timed in
the run that it is compared in, so that a ratio says something whatever the machine.

PyTorch is imported where it is needed: a child process whose memory is measured shall not have it for nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.replications.replicate import machine

if TYPE_CHECKING:
    from dfcli import cores
    from dfcli.data.dataset import Dataset


def arguments(documentation: str | None) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def device_argument(documentation: str | None) -> str:
    """What `--device` says, for a benchmark that has no other argument."""
    parser = arguments(documentation)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<n>")
    return parser.parse_args().device


@contextmanager
def home() -> Iterator[Path]:
    """A data dir for this benchmark alone ($DFCLI_HOME), removed at its end."""
    before = os.environ.get("DFCLI_HOME")
    with tempfile.TemporaryDirectory(prefix="dfcli-benchmark-") as folder:
        os.environ["DFCLI_HOME"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["DFCLI_HOME"]
            else:
                os.environ["DFCLI_HOME"] = before


def report(figures: dict[str, Any], device: str = "cpu") -> None:
    """Print the figures as JSON, with where (on which processor or GPU), when and with what they were measured."""
    import torch

    from dfcli.system.device import resolve

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    where = {"machine": machine(device), "threads": resolve("cpu").threads}
    print(json.dumps(figures | where | {"date": time.strftime("%Y-%m-%d"), "versions": versions}, indent=2))


# How fast the machine is ---------------------------------------------------------------------------------------------


def product_rate(size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a float32 product of two size x size matrices: the best of `rounds`."""
    import torch

    a, b, out = torch.ones(size, size), torch.ones(size, size), torch.empty(size, size)
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def timed(step: Callable[[int], object], steps: int, warmup: int = 10) -> float:
    """Seconds a step takes: the mean over `steps`, after the `warmup` first."""
    for i in range(warmup):
        step(i)
    began = time.perf_counter()
    for i in range(warmup, warmup + steps):
        step(i)
    return (time.perf_counter() - began) / steps


# Anchors -------------------------------------------------------------------------------------------------------------


def nano_loop(dataset: Dataset) -> tuple[cores.GPT, Callable[[int], None]]:
    """nanoGPT's CPU configuration as nanoGPT trains it: the model, and a function that takes step `i`."""
    import torch
    import torch.nn.functional as F

    from dfcli import cores
    from dfcli.training.presets import preset

    values = preset("gpt", "nano-cpu")
    recipe: dict[str, Any] = values["recipe"]
    torch.manual_seed(values["seed"])
    core = cores.GPT(cores.GPTConfig(vocab_size=dataset.codec.vocab_size, **values["config"]))
    split = dataset.splits["train"]
    data = torch.from_numpy(split.read(0, split.tokens_count).copy()).long()
    matrices = [p for p in core.parameters() if p.ndim >= 2]
    others = [p for p in core.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=recipe["betas"])
    T = core.context

    def step(i: int) -> None:
        if i < recipe["warmup"]:
            factor = (i + 1) / (recipe["warmup"] + 1)
        else:
            way = min(1.0, (i - recipe["warmup"]) / (recipe["steps"] - recipe["warmup"]))
            factor = recipe["final_lr"] + (1 - recipe["final_lr"]) * (1 + math.cos(math.pi * way)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * factor
        starts = torch.randint(len(data) - T, (recipe["batch_size"],)).tolist()
        ids = torch.stack([data[start : start + T] for start in starts])
        targets = torch.stack([data[start + 1 : start + 1 + T] for start in starts])
        loss = F.cross_entropy(core(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), recipe["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i % recipe["log_every"] == 0:
            loss.item()

    return core, step


# What a run reached --------------------------------------------------------------------------------------------------


class Turns:
    """A clock for a training that stands still while, every few seconds, a product is taken: so both have the same part
    of a machine whose rate moves. `stop` is the training's, and never stops it."""

    PAUSE = 2.0  # seconds of training between two products
    SIZE = 2048

    def __init__(self, threads: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.threads, self.now, self.seconds = threads, now, []  # of each product
        self.paused, self.last = 0.0, -math.inf

    def clock(self) -> float:
        return self.now() - self.paused

    def stop(self) -> None:
        from dfcli.system.device import pytorch_threads

        if self.clock() - self.last >= self.PAUSE:
            began = self.now()
            with pytorch_threads(self.threads):
                self.seconds.append(2 * self.SIZE**3 / product_rate(self.SIZE, rounds=1))
            self.paused += self.now() - began
            self.last = self.clock()

    def rate(self, best: bool = False) -> float:
        """FLOP/s of all products together, or of the best one."""
        return 2 * self.SIZE**3 / (min(self.seconds) if best else sum(self.seconds) / len(self.seconds))


def trained(
    kind: str, data: str, minutes: float, *, cpu_time: bool = False, **options: Any
) -> tuple[str, dict[str, Any]]:
    """A training in a process of its own, as `df train KIND --data DATA --minutes M` does it: the run's name, and its
    speed and shares of the machine's rate for products, which are taken in turns with its steps. With `cpu_time` the
    minutes are the CPU time of all threads; the shares then mean nothing."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `df` does
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_train, kind, data, minutes, cpu_time, options).result()


def _train(kind: str, data: str, minutes: float, cpu_time: bool, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from dfcli import cores
    from dfcli.runs.run import Run
    from dfcli.system.device import resolve
    from dfcli.training.train import train

    turns = Turns(resolve("cpu").threads, time.process_time if cpu_time else time.perf_counter)
    result = train(kind, [data], minutes=minutes, device="cpu", seed=0, stop=turns.stop, clock=turns.clock, **options)
    product, run = turns.rate(), Run.open(result.run)
    core = run.info["core"]
    flops = 3 * cores.config(core["name"], core["config"]).flops_per_token()
    # Each line has the rate of training alone since the line before it: what is left of the time is the rest.
    training = before = 0
    for row in run.metrics():
        if row["tokens"] > before:
            training += (row["tokens"] - before) / row["tokens_per_second"]
        before = row["tokens"]
    done, seconds = flops * result.tokens_seen, result.train_seconds
    return result.run, {
        "minutes": minutes,
        "train_seconds": seconds,
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens_seen": result.tokens_seen,
        "parameters": result.parameters,
        "core": core["config"],
        "tokens_per_second": result.tokens_seen / training,
        "products": len(turns.seconds),
        "product_flops_per_second": product,
        "best_product_flops_per_second": turns.rate(best=True),
        "training_flops_per_second": done / training,
        "share_of_product_rate": done / training / product,
        "share_of_product_rate_with_validation": done / seconds / product,
        "share_of_time_for_validation_and_checkpoints": 1 - training / seconds,
    }


# Memory --------------------------------------------------------------------------------------------------------------


def in_child(function: Callable[..., Any], *values: Any) -> tuple[Any, int]:
    """What `function` (of a module) returns in a new process, and the most memory that process had of its own, in
    bytes: resident, without the pages of files."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(theirs, function, *values))
    child.start()
    theirs.close()
    process, most, done = psutil.Process(child.pid), 0, False
    while not done:
        done = ours.poll(0.002)  # the child then waits, so that it is measured once more before it ends
        info = process.memory_info()
        most = max(most, info.rss - getattr(info, "shared", 0))  # only Linux tells the pages of files apart
    try:
        result = ours.recv()
        ours.send("measured")
    except EOFError:
        raise SystemExit(f"{function.__name__} failed in its process") from None
    finally:
        child.join()
    return result, most


def _answer(ours: Any, function: Callable[..., Any], *values: Any) -> None:
    ours.send(function(*values))
    ours.recv()


def repeated(source: Path, target: Path, size: int) -> Path:
    """Write `target`: the text of `source` again and again, `size` bytes or up to a line more."""
    text = source.read_bytes()
    with target.open("wb") as file:
        while (left := size - file.tell()) > len(text):
            file.write(text)
        file.write(text[: text.find(b"\n", left) + 1] or text)
    return target


# Texts that every machine has ----------------------------------------------------------------------------------------


def library() -> list[Path]:
    """The Python standard library's sources, without installed packages, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.relative_to(root).parts]


def installed() -> Iterator[bytes]:
    """The standard library's sources, then sources and documentation of the installed packages: each text once."""
    roots = {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}
    packages = [path for root in sorted(roots) for path in sorted(root.rglob("*"))]
    seen = set()
    for path in [*library(), *packages]:
        if path.suffix not in (".py", ".md", ".rst", ".txt") or not path.is_file():
            continue
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if digest in seen or b"\0" in text:
            continue
        seen.add(digest)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield text
