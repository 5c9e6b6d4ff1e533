"""GPT generation: tokens/s of the plain step and of what `auto` takes, in one process, and the memory's speed.

    python -m tests.benchmarks.generate_gpt
    python -m tests.benchmarks.generate_gpt --device cuda

Prints JSON. Every figure is the best of several short runs that take turns, so that what else the machine
does disturbs all alike. Weights are random: the speed does not depend on them.
- `share_of_copy`: the weights' bytes, read once a token, over the bytes a second that a large copy copies.
- `times_no_cache`: against running the whole text through the model for each of 500 new tokens after a
  prompt of one; that loop is timed at six lengths and summed by the trapezoidal rule. On a CPU only.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from dfcli.cores import GPT, GPTConfig
from dfcli.cores.protocols import Picking
from dfcli.generation import engines
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice
from dfcli.system.device import Device, resolve
from tests.benchmarks import common
from tests.generation.engine import picking, start

MODELS = {
    "nano-cpu": GPTConfig(65, context=64, layers=4, heads=4, channels=128, bias=False, qkv_bias=False),
    "nano": GPTConfig(65, context=256, layers=6, heads=6, channels=384, bias=False, qkv_bias=False),
    "gpt2": GPTConfig(50257, context=1024, layers=12, heads=12, channels=768, activation="gelu_tanh"),
}
NEW = 500
ROUNDS = 9


def copy_rate(device: Device) -> float:
    """Bytes a second that torch copies from one large array to another."""
    source = torch.ones(64 * 2**20, device=device.torch_device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = min(best, time.perf_counter() - began)
    return 4 * source.numel() / best


def best(jobs: dict[str, tuple[Any, int, Picking]], tokens: int) -> dict[str, float]:
    """Seconds a token of one sequence, for jobs (engine, sequences, filters): the best of `ROUNDS`, in turns."""
    found = dict.fromkeys(jobs, float("inf"))
    for engine, batch, _ in jobs.values():
        start(engine, [[0]] * batch)
    for _ in range(ROUNDS):
        for name, (engine, batch, filters) in jobs.items():
            uniforms = Dice(0, range(batch)).draw(tokens)
            began = time.perf_counter()
            engine.generate(uniforms, filters)
            found[name] = min(found[name], (time.perf_counter() - began) / tokens / batch)
    return found


@torch.inference_mode()
def no_cache(core: GPT) -> float:
    """Seconds for NEW tokens with the whole text run through the model for each."""
    lengths = [1, NEW // 8, NEW // 4, NEW // 2, 3 * NEW // 4, NEW]
    seconds = []
    for length in lengths:
        ids = torch.zeros((1, min(length, core.context)), dtype=torch.int64)
        runs = []
        for _ in range(3):
            began = time.perf_counter()
            core(ids)
            runs.append(time.perf_counter() - began)
        seconds.append(min(runs))
    return float(np.trapezoid(seconds, lengths))


def main() -> None:
    where = common.device_argument(__doc__)
    torch.manual_seed(0)
    device = resolve(where)
    slow = device.kind == "cpu"
    copied = copy_rate(device)
    result: dict[str, Any] = {"copy_GB_per_second": round(copied / 1e9, 1)}
    for name, config in MODELS.items():
        core = GPT(config).eval().to(device.torch_device)
        engine, _ = engines.choose("gpt", core, 1, device)
        plain, bare = Plain(core, device), picking()
        large = config.parameters() > 50_000_000
        times = best(
            {
                "plain": (plain, 1, bare),
                "auto": (engine, 1, bare),
                "auto, filters": (engines.choose("gpt", core, 1, device)[0], 1, picking(0.8, 40, 0.95)),
            },
            4 if large and slow else 60,
        )
        for texts in (16,) if slow else (16, 64):
            many, _ = engines.choose("gpt", core, texts, device)
            times |= best({f"auto, {texts} texts": (many, texts, bare)}, 2 if large and slow else 30)
        weights = 4 * config.parameters()
        if config.position == "learned":
            weights -= 4 * config.context * config.channels  # one row of the position table is read
        result[name] = {
            "engine": engine.name,
            "tokens_per_second": {key: round(1 / value, 1) for key, value in times.items()},
            "times_plain": round(times["plain"] / times["auto"], 1),
            "filters_cost_percent": round(100 * (times["auto, filters"] / times["auto"] - 1), 1),
            "weights_GB_per_second": round(weights / times["auto"] / 1e9, 1),
            "share_of_copy": round(weights / times["auto"] / copied, 2),
        }
        if large and slow:
            result[name]["times_no_cache"] = round(no_cache(core) / (NEW * times["auto"]), 1)
    common.report(result, where)


if __name__ == "__main__":
    main()
