"""WaveNet generation: µs a sample of the plain step and of the compiled engine, in one process.

    python -m tests.benchmarks.generate_wavenet
    python -m tests.benchmarks.generate_wavenet --device cuda

Prints JSON. Every figure is the best of several short runs that take turns, so that what else the machine
does disturbs all alike. Weights are random: the speed does not depend on them.
- `filters_cost_percent`: of a sample's time, from many runs of 100 samples.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from dfcli.cores import WaveNet, WaveNetConfig
from dfcli.cores.protocols import Picking
from dfcli.cores.wavenet import DOUBLING
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice
from dfcli.kernels import wavenet_sample
from dfcli.system.device import Device, resolve
from tests.benchmarks import common
from tests.generation.engine import cpu, picking, start

PAPER = WaveNetConfig()
SMALL = WaveNetConfig(dilations=DOUBLING[:8], cycles=2, residual=32, skip=64, head=128)  # the default recipe's
FILTERS = {
    "none": picking(),
    "top-k 50": picking(1, 50),
    "top-p 0.9": picking(1, None, 0.9),
    "min-p 0.05": picking(1, None, None, 0.05),
    "all three": picking(0.8, 50, 0.95, 0.05),
}
ROUNDS = 15


def best(jobs: dict[str, tuple[Any, int, int, Picking]], rounds: int = ROUNDS) -> dict[str, float]:
    """µs a sample of one clip, for jobs (engine, clips, samples, filters): the best of `rounds`, in turns."""
    found = dict.fromkeys(jobs, float("inf"))
    for engine, clips, _, _ in jobs.values():
        start(engine, [[128]] * clips)
    for _ in range(rounds):
        for name, (engine, clips, samples, filters) in jobs.items():
            uniforms = Dice(0, range(clips)).draw(samples)
            began = time.perf_counter()
            engine.generate(uniforms, filters)
            found[name] = min(found[name], 1e6 * (time.perf_counter() - began) / samples / clips)
    return found


def on_gpu(device: Device) -> dict[str, Any]:
    """One clip, and the most samples/s of many together, by the kernel; and the plain step's."""
    from dfcli.kernels.cuda import wavenet as wavenet_cuda  # needs Triton, which is not everywhere

    processors = torch.cuda.get_device_properties(device.torch_device).multi_processor_count
    result: dict[str, Any] = {}
    for name, config in {"paper": PAPER, "small": SMALL}.items():
        core = WaveNet(config).eval().to(device.torch_device)
        total: dict[int, float] = {}  # samples/s of all clips together
        for clips in (1, 16, 256, wavenet_cuda.ROWS * processors, 2 * wavenet_cuda.ROWS * processors):
            engine = wavenet_cuda.build(core, device)
            total[clips] = 1e6 / best({"": (engine, clips, 2000 if clips == 1 else 100, picking())})[""]
        plain = best({"": (Plain(core, device), 1, 50, picking())})[""]
        most = max(total, key=lambda clips: total[clips])
        result[name] = {
            "samples_per_second_1_clip": round(total[1]),
            "times_plain": round(total[1] * plain / 1e6, 1),
            "best_samples_per_second": round(total[most]),
            "best_clips": most,
            "samples_per_second": {"plain, 1 clip": round(1e6 / plain)}
            | {f"{clips} clips": round(value) for clips, value in total.items()},
        }
    return result


def on_cpu() -> dict[str, Any]:
    threads = torch.get_num_threads()
    wavenet_sample.ROUNDED = 0  # the small model's weights too
    result: dict[str, Any] = {}
    for name, config in {"paper": PAPER, "small": SMALL}.items():
        core = WaveNet(config).eval()
        torch.set_num_threads(1)
        one = best(
            {
                "plain": (Plain(core, cpu(1)), 1, 100, picking()),
                "float32": (wavenet_sample.build(core, cpu(1)), 1, 1000, picking()),
                "bfloat16": (wavenet_sample.build(core, cpu(1), exact=False), 1, 1000, picking()),
            }
        )
        many = best(
            {
                "1 clip": (wavenet_sample.build(core, cpu(threads)), 1, 1000, picking()),
                "16 clips": (wavenet_sample.build(core, cpu(threads)), 16, 200, picking()),
                "16 clips, 1 thread": (wavenet_sample.build(core, cpu(1)), 16, 100, picking()),
            }
        )
        engine = wavenet_sample.build(core, cpu(1))
        filters = best({key: (engine, 1, 100, value) for key, value in FILTERS.items()}, 10 * ROUNDS)
        torch.set_num_threads(threads)
        result[name] = {
            "parameters": config.parameters(),
            "us_a_sample": {key: round(value, 1) for key, value in one.items()},
            "times_plain": {key: round(one["plain"] / value, 1) for key, value in one.items()},
            "samples_per_second": {key: round(1e6 / value) for key, value in (one | many).items()},
            "16_clips_over_1": round(many["1 clip"] / many["16 clips"], 2),
            "us_with_filters": {key: round(value, 1) for key, value in filters.items()},
            "filters_cost_percent": {
                key: round(100 * (value / filters["none"] - 1), 1) for key, value in filters.items()
            },
        }
    return result


def main() -> None:
    name = common.device_argument(__doc__)
    torch.manual_seed(0)
    device = resolve(name)
    if device.kind == "cuda":
        common.report(on_gpu(device), name)
    else:
        common.report(on_cpu())


if __name__ == "__main__":
    main()
