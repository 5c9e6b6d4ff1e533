"""What it costs to round a WaveNet's weights to bfloat16 for generation: bits a sample on the run's own data.

    python -m tests.benchmarks.rounded_wavenet RUN [--split val]

Prints JSON. RUN is a name or a path; the model's widths must be multiples of 32.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from dfcli.data.dataset import Dataset
from dfcli.evaluation.sweep import sweep
from dfcli.runs.run import Run
from dfcli.system.device import resolve
from tests.benchmarks import common
from tests.generation.rounding import rounded


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("run")
    parser.add_argument("--split", default="val")
    given = parser.parse_args()
    device = resolve("cpu")
    run = Run.open(given.run)
    core: Any = cast(Any, run.build("best", torch.device("cpu"))[0])
    bits = {}
    with Dataset.open(run.info["dataset"]["path"]) as dataset:
        for name, model in {"float32": core, "bfloat16": rounded(core)}.items():
            bits[name] = sweep(model, dataset, given.split, device).mean / math.log(2)
    common.report({"run": run.name, "bits_per_sample": bits, "difference": bits["bfloat16"] - bits["float32"]})


if __name__ == "__main__":
    main()
