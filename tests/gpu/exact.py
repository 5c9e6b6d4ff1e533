"""Parts that compare results: a CPU's with the device's, a kernel's with the plain step's."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.gpu.common import Note, Where

STEPS = 20
LARGEST = (
    60e6  # parameters: a CPU trains more of them too slowly for this script, so larger models lose layers, down to one
)
KERNELS = Path(__file__).parents[1] / "kernels"


def agree(where: Where, note: Note) -> None:
    """Logits, gradients and 20 updates in float32 on both; then the updates in the device's training precision."""
    from dfcli.training.presets import PRESETS

    shapes = {f"{kind} {name}": entry for kind, table in PRESETS.items() for name, entry in table.items()}
    shapes["gpt default"] = {
        "core": "gpt", "vocab_size": 65, "recipe": {"optimizer": "muon", "lr": 0.02},
        "config": {"position": "rotary", "norm": "rmsnorm", "activation": "relu2", "bias": False, "qkv_bias": False,
                   "qk_norm": True, "tied_head": False, "init": "zero", "ngrams": 6},
    }  # fmt: skip
    shapes["wavenet default"] = {
        "core": "wavenet", "vocab_size": 256, "recipe": {"optimizer": "muon", "lr": 0.02},
        "config": {"cycles": 2, "residual": 64, "norm": "rmsnorm", "init": "zero"},
    }  # fmt: skip
    worst = {"logits": 0.0, "gradients": 0.0, "loss": 0.0, "loss_in_precision": 0.0}
    small_first = sorted(shapes.items(), key=lambda shape: size(shape[1]))
    for done, (name, entry) in enumerate(small_first, 1):
        figures = compare(entry, where)
        for key in worst:
            worst[key] = max(worst[key], figures[key])
        note(**{name: figures})
        for key, most in (("logits", 1e-3), ("gradients", 1e-3), ("loss", 5e-3), ("loss_in_precision", 5e-2)):
            note.check(figures[key] < most, f"{name}: {key} differ by {figures[key]:.2g}")
        text = ", ".join(f"{key.replace('_', ' ')} {value:.1e}" for key, value in worst.items())
        note(says={"": f"{done} of {len(shapes)} shapes; largest difference: {text}"})


def size(entry: dict[str, Any]) -> int:
    """Parameters of a shape."""
    from dfcli import cores

    return cores.config(entry["core"], {"vocab_size": entry["vocab_size"]} | entry["config"]).parameters()


def compare(entry: dict[str, Any], where: Where) -> dict[str, Any]:
    """How far the device is from the CPU for one shape."""
    import torch

    from dfcli import cores
    from dfcli.system.device import resolve

    device = resolve(where.device)
    config, changed = scaled(cores.config(entry["core"], {"vocab_size": entry["vocab_size"]} | entry["config"]), where)
    torch.manual_seed(0)
    here = cores.build(entry["core"], asdict(config))
    if getattr(config, "init", "") == "zero":  # all gradients but the head's would be zero
        with torch.no_grad():
            for p in here.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
    there, rounded = (copy.deepcopy(here).to(device.torch_device) for _ in range(2))
    batch = ids_and_targets(config, quick=where.quick)
    logits, grads = {}, {}
    for place, core in (("cpu", here), ("device", there)):
        out = core(*on(core, batch[:-1]))
        loss_of(out, batch[-1]).backward()
        logits[place] = out.detach().cpu()
        grads[place] = torch.cat([p.grad.to_dense().flatten().cpu() for p in core.parameters() if p.grad is not None])
    losses = [losses_of(core, entry, batch, None) for core in (here, there)]
    losses.append(losses_of(rounded, entry, batch, device))
    return {
        "changed": changed, "parameters": config.parameters(),
        "logits": apart(logits["device"], logits["cpu"]), "gradients": apart(grads["device"], grads["cpu"]),
        "loss": abs(losses[1] - losses[0]), "loss_in_precision": abs(losses[2] - losses[0]), "losses": losses,
    }  # fmt: skip


def scaled(config: Any, where: Where) -> tuple[Any, dict[str, Any]]:
    """The config without dropout, small enough for a CPU, and what that changed."""
    changed: dict[str, Any] = {}
    if hasattr(config, "heads"):
        while replace(config, **changed).parameters() > LARGEST and changed.get("layers", config.layers) > 1:
            changed["layers"] = changed.get("layers", config.layers) - 1
        if where.quick:
            changed = {"layers": 1, "channels": 16 * config.heads, "vocab_size": 64, "context": 16}
        changed |= {name: 0.0 for name in ("dropout", "ngram_dropout") if getattr(config, name)}
    elif where.quick and hasattr(config, "residual"):
        changed = {"cycles": 1, "dilations": config.dilations[:3], "residual": 16, "skip": 16, "head": 16}
    return replace(config, **changed), changed


def ids_and_targets(config: Any, quick: bool) -> list[Any]:
    """Arguments of `forward`, and targets: a CPU batch of random ids."""
    import torch

    rows, length = (2, 16) if quick else (4, 128) if hasattr(config, "heads") else (2, 512)
    if hasattr(config, "levels"):  # the lecture's WaveNet reads whole trees
        length = 2**config.levels
    elif hasattr(config, "heads"):
        length = min(length, config.context)
    ids, targets = torch.randint(config.vocab_size, (2, rows, length), generator=torch.Generator().manual_seed(1))
    arguments: list[Any] = [ids, None, False]
    labels, series = getattr(config, "labels", ()), getattr(config, "series", 0)
    if labels or series:
        from dfcli.cores.wavenet import Condition

        arguments.append(
            Condition(
                torch.stack([torch.arange(4) % count for count in labels], 1) if labels else None,
                torch.randn(4, series) if series else None,
                torch.arange(length)[None].expand(rows, -1) % 4,
            )
        )
    return [*arguments, targets]


def on(core: Any, values: list[Any]) -> list[Any]:
    """Tensors, alone or in tuples, on the core's device."""
    import torch

    where = next(core.parameters()).device

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(where)
        return type(value)(*map(move, value)) if isinstance(value, tuple) else value

    return [move(value) for value in values]


def loss_of(logits: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device).flatten())


def losses_of(core: Any, entry: dict[str, Any], batch: list[Any], device: Any) -> float:
    """The loss after 20 updates of the preset's optimiser on one batch; with `device`, in its training precision."""
    from contextlib import nullcontext

    from dfcli.training.optim import Optimizer
    from dfcli.training.settings import Recipe, change

    recipe = change(Recipe(), entry["recipe"] | {"steps": STEPS})
    optimizer, arguments = Optimizer(core, recipe), on(core, batch[:-1])
    core.zero_grad()
    for _ in range(STEPS):
        with device.autocast() if device else nullcontext():
            loss = loss_of(core(*arguments), batch[-1])
        loss.backward()
        optimizer.step(0.1)
    return loss_of(core(*arguments), batch[-1]).item()


def apart(found: Any, expected: Any) -> float:
    """‖found - expected‖ / ‖expected‖; infinite where a number is not finite."""
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    return distance if distance == distance else float("inf")


def kernels(where: Where, note: Note) -> None:
    """The tests of the GPU's kernels, on the GPU; on a CPU the step that the graph replays."""
    files = ["test_cuda_graph.py", "test_cuda_gpt.py", *(["interpreted_wavenet.py"] if where.on_gpu else [])]
    says = {}
    for file in files:
        line = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--timeout", "85", str(KERNELS / file)]
        if not where.on_gpu:
            line += ["-k", "cpu and (long_chunks or shape)"] if where.quick else ["-k", "cpu"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        told = where.out / file.replace(".py", ".txt")  # has a line for each test that ended, also if time runs out
        with open(told, "w") as output:
            done = subprocess.run(line, stdout=output, stderr=subprocess.STDOUT, env=environment)
        last = told.read_text().strip().splitlines()[-1]
        counts = dict(reversed(found) for found in re.findall(r"(\d+) (passed|failed|skipped|error)", last))
        says[file] = f"{file}: " + (", ".join(f"{n} {word}" for word, n in counts.items()) or "nothing ran")
        note(**{file: counts}, says=says)
        note.check(done.returncode == 0 and "passed" in counts, f"{file}: pytest ended with {done.returncode}")
