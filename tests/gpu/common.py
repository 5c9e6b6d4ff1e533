"""What the parts share: where they run, and where their figures go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.shared import shared_data


@dataclass(frozen=True)
class Where:
    """One call of `tests/gpu/run`."""

    out: Path
    work: Path  # a folder for the runs of this call
    device: str  # as for --device
    quick: bool  # only rehearse

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def text(self) -> tuple[list[str], bool]:
        """What to train on, and whether it is tinyshakespeare, else the built-in corpus."""
        from dfcli.ingest.builtin import builtin_sources

        folder = shared_data()
        if folder is None or not (folder / "tinyshakespeare.txt").exists():
            return [str(path) for path in builtin_sources("text")], False
        file = self.work / "shakespeare.txt"
        if not file.exists():
            content = (folder / "tinyshakespeare.txt").read_bytes()
            file.write_bytes(content[:60_000] if self.quick else content)
        return [str(file)], True


class Failed(Exception):
    """A check of a part failed; the text says which."""


class Note:
    """The figures of one part: `note(loss=1.2)` writes them to results.json at once."""

    def __init__(self, out: Path, part: str) -> None:
        self.path, self.part = out / "results.json", part
        self.failures: list[str] = []

    def __call__(self, **figures: Any) -> None:
        everything = read(self.path)
        everything.setdefault(self.part, {}).update(figures)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(everything, indent=2))
        os.replace(temporary, self.path)

    def check(self, passed: bool, failure: str) -> None:
        """Note that the part has failed, and go on, unless `passed`."""
        if not passed:
            self.failures.append(failure)
            self(failures=self.failures)
            print(f"FAILED {self.part}: {failure}", file=sys.stderr)


def read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else {}


def nvidia_smi(query: str, *more: str) -> list[str]:
    """The values of a query, of the first GPU it tells of; "" for each where nvidia-smi is missing or fails."""
    line = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", *more]
    try:
        said = (
            subprocess.run(line, capture_output=True, text=True, timeout=20).stdout.strip().split("\n")[0].split(", ")
        )
    except (OSError, subprocess.TimeoutExpired):
        said = []
    wanted = query.count(",") + 1
    return said if len(said) == wanted else [""] * wanted


def machine(device: str) -> dict[str, Any]:
    """The device and the versions that figures are from."""
    import platform

    import torch

    from dfcli.system.device import resolve
    from tests.replications.replicate import machine

    found = resolve(device)
    driver = ""
    if found.kind == "cuda":
        driver = nvidia_smi("driver_version")[0]
    return {
        "device": found.name if found.kind == "cuda" else machine("cpu"), "precision": found.precision,
        "gpus": torch.cuda.device_count(), "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
