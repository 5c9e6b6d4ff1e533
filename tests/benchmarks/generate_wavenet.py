"""WaveNet generation on a CPU: µs a sample of the plain step and of the compiled engine, in one process.

    python -m tests.benchmarks.generate_wavenet

Prints JSON. Every figure is the best of several short runs that take turns, so that what else the machine
does disturbs all alike. Weights are random: the speed does not depend on them.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from dfcli.cores import WaveNet, WaveNetConfig
from dfcli.generation import wavenet_cpu
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice, Filters
from dfcli.system.device import Device
from tests.benchmarks import common

PAPER = WaveNetConfig()
SMALL = WaveNetConfig(cycles=2, residual=32, skip=128, head=128)
ROUNDS = 15


def best(jobs: dict[str, tuple[Any, int, int, Filters]]) -> dict[str, float]:
    """µs a sample of one clip, for jobs (engine, clips, samples, filters): the best of `ROUNDS`, in turns."""
    found = dict.fromkeys(jobs, float("inf"))
    for engine, clips, _, _ in jobs.values():
        engine.start(clips)
        engine.prefill(torch.full((clips, 1), 128).numpy())
    for _ in range(ROUNDS):
        for name, (engine, clips, samples, filters) in jobs.items():
            uniforms = Dice(0, range(clips)).draw(samples)
            began = time.perf_counter()
            engine.generate(uniforms, filters)
            found[name] = min(found[name], 1e6 * (time.perf_counter() - began) / samples / clips)
    return found


def cpu(threads: int) -> Device:
    return Device(torch.device("cpu"), "cpu", "CPU", "float32", "", threads)


def main() -> None:
    common.arguments(__doc__).parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    wavenet_cpu.ROUNDED = 0  # the small model's weights too
    result: dict[str, Any] = {}
    for name, config in {"paper": PAPER, "small": SMALL}.items():
        core = WaveNet(config).eval()
        torch.set_num_threads(1)
        one = best(
            {
                "plain": (Plain(core, cpu(1)), 1, 100, Filters()),
                "float32": (wavenet_cpu.build(core, 1, cpu(1)), 1, 1000, Filters()),
                "bfloat16": (wavenet_cpu.build(core, 1, cpu(1), exact=False), 1, 1000, Filters()),
            }
        )
        many = best(
            {
                "1 clip": (wavenet_cpu.build(core, 1, cpu(threads)), 1, 1000, Filters()),
                "16 clips": (wavenet_cpu.build(core, 16, cpu(threads)), 16, 200, Filters()),
                "16 clips, 1 thread": (wavenet_cpu.build(core, 16, cpu(1)), 16, 100, Filters()),
            }
        )
        engine = wavenet_cpu.build(core, 1, cpu(1))
        wanted = {"none": Filters(), "top-k 50": Filters(1, 50), "top-p 0.9": Filters(1, None, 0.9)}
        filters = best({key: (engine, 1, 1000, value) for key, value in wanted.items()})
        torch.set_num_threads(threads)
        result[name] = {
            "parameters": config.parameters(),
            "us_a_sample": {key: round(value, 1) for key, value in one.items()},
            "times_plain": {key: round(one["plain"] / value, 1) for key, value in one.items()},
            "samples_per_second": {key: round(1e6 / value) for key, value in (one | many).items()},
            "16_clips_over_1": round(many["1 clip"] / many["16 clips"], 2),
            "us_with_filters": {key: round(value, 1) for key, value in filters.items()},
        }
    common.report(result)


if __name__ == "__main__":
    main()
