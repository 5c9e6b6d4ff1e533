"""A long training of small steps: memory, open files and threads stay as they are.

    python -m tests.reliability.long_run 20000

One run of the whole program with evaluations and checkpoints on the way; measured in the process itself after a
twentieth of the steps and at the end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil

from dfcli.runs.run import Run
from dfcli.training.events import Step
from dfcli.training.train import train
from tests.reliability import material
from tests.reliability.warm import Child, main

GROWTH = 0.02  # of the resident memory, from the first measurement to the last


def measure() -> dict[str, int]:
    """Bytes of resident memory, open files, and threads."""
    process = psutil.Process()
    return {
        "resident_bytes": process.memory_info().rss,
        "open_files": process.num_fds(),
        "threads": process.num_threads(),
    }


def long_run(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Train for `count` steps; what was measured. AssertionError where something grew."""
    material.data(folder)
    points = sorted({max(1, count // 20), count // 4, count // 2, 3 * count // 4, count})
    record = folder / "measured.json"
    pause = max(1, count // 40)

    def work() -> None:
        found: dict[int, dict[str, int]] = {}

        def on_event(event: object) -> None:
            if isinstance(event, Step) and event.step in points:
                found[event.step] = measure()
                record.write_text(json.dumps(found))

        overrides = dict(setting.split("=") for setting in (*material.GPT, "batch_size=2", "compile=off"))
        overrides |= {"log_every": "10", "eval_every": str(pause), "checkpoint_every": str(pause), "eval_tokens": "200"}
        # Every point must be a line that is logged.
        assert all(point % 10 == 0 for point in points), "take a count that 200 divides"
        train("gpt", [str(folder / "text.txt")], name="r", steps=count, seed=seed, overrides=overrides,
              device="cpu", on_event=on_event)  # fmt: skip

    child = Child(work, folder / "said", folder / "home")
    assert child.wait(3600) == 0, child.said()
    found = {int(step): values for step, values in json.loads(record.read_text()).items()}
    first, last = found[points[0]], found[points[-1]]
    growth = last["resident_bytes"] / first["resident_bytes"] - 1
    assert growth <= GROWTH, f"memory grew by {growth:.1%}: {found}"
    assert last["open_files"] <= first["open_files"], found
    assert last["threads"] <= first["threads"], found
    rows = Run.open(folder / "home" / "runs" / "r").metrics()
    assert [row["step"] for row in rows] == [1, *range(10, count + 1, 10)]
    assert os.listdir(folder / "home" / "runs") == ["r"]
    return {"steps": count, "growth_of_resident_memory": round(growth, 5), "bound": GROWTH, "measured": found}


if __name__ == "__main__":
    main(long_run, 20_000, __doc__ or "")
