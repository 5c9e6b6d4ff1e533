"""Parts about the device's limits: its statistics, the estimate of memory, memory that runs out."""

from __future__ import annotations

import threading
import time
from typing import Any

from tests.gpu.common import Note, Where, nvidia_smi

QUERY = "memory.used,memory.total,utilization.gpu,temperature.gpu,power.draw"


def statistics(where: Where, note: Note) -> None:
    """The figures of the live view while the device works, and those of nvidia-smi at the same time."""
    import torch

    from dfcli.system.device import resolve
    from dfcli.system.stats import Sampler

    device = resolve(where.device)
    done = threading.Event()

    def busy() -> None:
        a = torch.randn(256 if where.quick else 4096, 256 if where.quick else 4096, device=device.torch_device)
        while not done.is_set():
            a @ a
            device.synchronize()

    worker = threading.Thread(target=busy)
    worker.start()
    with Sampler(device) as sampler:
        time.sleep(1.5 if where.quick else 5)
        seen = sampler.latest
        said = []
        if where.on_gpu:
            uuid = torch.cuda.get_device_properties(device.torch_device).uuid
            said = nvidia_smi(QUERY, "-i", f"GPU-{uuid}")
    done.set()
    worker.join()
    note(live_view=vars(seen), nvidia_smi=said)
    note.check(seen.memory_total is not None, "the memory of the machine is unknown")
    if where.on_gpu:
        megabytes = [x and x / 2**20 for x in (seen.gpu_memory_used, seen.gpu_memory_total)]
        ours = [*megabytes, seen.gpu_percent, seen.gpu_temperature, seen.gpu_power_watts]
        shares = (0.05, 0.01, 0.2, 0.1, 0.3)
        for name, mine, theirs, share in zip(QUERY.split(","), ours, said, shares, strict=True):
            if mine is None or not theirs.replace(".", "").isdigit():  # "[N/A]" for some figures of some GPUs
                note.check(mine is None or not theirs, f"{name}: nvidia-smi says {theirs}, the live view {mine}")
                continue
            near = abs(mine - float(theirs)) <= share * max(10.0, float(theirs))
            note.check(near, f"{name}: the live view says {mine:.0f}, nvidia-smi {theirs}")
        note.check(seen.gpu_name is not None, "NVML does not know this GPU")
        note(says={"": f"{seen.gpu_name}: {seen.gpu_percent} % (nvidia-smi {said[2]} %), "
                       f"{(seen.gpu_memory_used or 0) / 2**20:,.0f} MiB ({said[0]} MiB)"})  # fmt: skip


def memory(where: Where, note: Note) -> None:
    """Three steps of each shape: the peak against what the plan said."""
    import torch

    import dfcli
    from dfcli.system.device import resolve

    data, _ = where.text()
    shapes: dict[str, tuple[str, int, dict[str, str]]] = {
        "nano": ("gpt", 64, {"layers": "6", "heads": "6", "channels": "384", "context": "256"}),
        "dropout": ("gpt", 64, {"layers": "6", "heads": "6", "channels": "384", "context": "256", "dropout": "0.2"}),
        "124M": ("gpt", 12, {"layers": "12", "heads": "12", "channels": "768", "context": "1024", "ngrams": "1"}),
        "wavenet": ("wavenet", 16, {"cycles": "3", "residual": "64", "window": "4096"}),
        "wide wavenet": ("wavenet", 8, {"cycles": "3", "residual": "128", "window": "8192"}),
    }
    if where.quick:
        shapes = {"nano": ("gpt", 8, {"layers": "1", "heads": "2", "channels": "32", "context": "64"})}
    says: dict[str, str] = {}
    for name, (kind, rows, overrides) in shapes.items():
        settings: dict[str, Any] = {
            "steps": 3, "batch_size": rows, "device": where.device,
            "overrides": overrides | ({} if where.on_gpu else {"compile": "off"}) | {"eval_tokens": "1000"},
        }  # fmt: skip
        planned = dfcli.plan(kind, data, **settings).memory
        if where.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dfcli.train(kind, data, **settings)
        device = resolve(where.device)
        peak = torch.cuda.max_memory_reserved(device.torch_device) if where.on_gpu else None
        note(**{name: {"planned": planned, "peak": peak}})
        if peak:
            note.check(0.8 < planned / peak < 2, f"{name}: planned {planned / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
            says[name] = f"{name}: {planned / 1e9:.2f} GB planned, {peak / 1e9:.2f} GB measured"
            note(says=says)


def out_of_memory(where: Where, note: Note) -> None:
    """A training that does not fit into the memory that is left."""
    import psutil
    import torch

    import dfcli
    from dfcli.errors import DfError
    from dfcli.system.device import resolve

    data, _ = where.text()
    device = resolve(where.device)
    taken = None
    if where.on_gpu:
        free, _ = device.memory_bytes()
        taken = torch.empty(free - 2**30, dtype=torch.uint8, device=device.torch_device)
    elif device.kind == "cpu":
        import resource

        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))
    try:
        shape = {"layers": "8", "heads": "8", "channels": "512", "context": "256", "ngrams": "1", "compile": "off"}
        dfcli.train("gpt", data, steps=2, batch_size=128, device=where.device, overrides=shape)
        note.check(device.kind == "mps", "the training fitted into 1 GB")
    except DfError as error:
        note.check("memory" in error.message and bool(error.hint), f"it said: {error.message}")
        note(sentence=error.message, hint=error.hint, says={"": error.message})
    del taken
