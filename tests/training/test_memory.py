"""How much memory an evaluation takes, how many processes share the weights of a model, and which sentence says that it
does not fit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfcli
from dfcli import cores
from dfcli.errors import DfError, UsageError
from dfcli.evaluation.sweep import _nats, longest_window
from dfcli.system.device import Device
from dfcli.training import memory
from dfcli.training.plan import check_shared
from dfcli.training.settings import Recipe

CONFIG = cores.GPTConfig(65, context=64, layers=8, heads=8, channels=512)
RECIPE = Recipe(steps=1, batch_size=8, window=64, compile="off")


def processes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for name, value in zip(names, (0, 0, count, count, 1), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_weights_are_shared_where_one_device_is_too_small_and_a_part_fits(monkeypatch: pytest.MonkeyPatch) -> None:

    gpu = Device(torch.device("cuda", 0), "cuda", "Test GPU", "bfloat16", "", 1)
    whole = memory.estimate("gpt", CONFIG, RECIPE, gpu)
    parts = [memory.estimate("gpt", CONFIG, RECIPE, gpu, count) for count in (1, 2, 4, 8)]
    assert parts[0] == whole
    assert parts == sorted(parts, reverse=True)
    weights = memory.RESERVED * 16 * CONFIG.parameters()
    assert whole - parts[1] < weights / 2  # some are gathered, and autocast copies them
    evaluation = memory.RESERVED * memory._evaluation(CONFIG, RECIPE, gpu)  # is not shared
    assert parts[3] - evaluation < 0.6 * weights

    def told(count: int, share: float) -> tuple[int, str]:
        processes(monkeypatch, count)
        monkeypatch.setattr(Device, "memory_bytes", lambda self: (0, int(evaluation + share * weights)))
        shards, choices = memory.shards("gpt", CONFIG, RECIPE, gpu)
        return shards, " ".join(choice.value for choice in choices)

    assert told(1, 0.9) == (1, "")
    assert told(2, 1.2) == (1, "")  # each process has them whole
    assert told(2, 0.9) == (2, "in 2 parts")
    assert told(2, 0.5) == (1, "")  # and is refused
    assert told(8, 0.6) == (8, "in 8 parts")
    assert memory.shards("wavenet", cores.WaveNetConfig(256), RECIPE, gpu) == (1, [])


class Live(TorchDispatchMode):
    """The most bytes, in `most`, of tensors that operations have made and that are alive at one time. Autocast's copies
    of `weights` are left out."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(tensors: Any) -> list[Any]:
            return [x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)]

        made, given = func(*args, **(kwargs or {})), {storage._cdata for storage in storages(args)}
        for storage in storages(made):
            place, copy = storage._cdata, func is torch.ops.aten._to_copy.default and given & self.weights
            if place not in given and place not in self.alive and not copy:
                self.alive[place] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, place)
        self.most = max(self.most, sum(self.alive.values()))
        return made


ROTARY = {"position": "rotary", "norm": "rmsnorm", "activation": "relu2", "qk_norm": True, "tied_head": False}
WAVENET = {"dilations": (1, 2, 4, 8, 16, 32), "cycles": 3, "residual": 64, "skip": 128, "head": 256}
EVALUATED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {"vocab_size": 65, "context": 256, "layers": 2, "heads": 4, "channels": 128}),
    "modern": ("gpt", {"vocab_size": 65, "context": 256, "layers": 2, "heads": 4, "channels": 128, **ROTARY}),
    "many ids": ("gpt", {"vocab_size": 5000, "context": 256, "layers": 2, "heads": 4, "channels": 128}),
    "wavenet": ("wavenet", WAVENET),
    "long windows": ("wavenet", {"dilations": (1, 5000), "cycles": 3, "residual": 32, "skip": 32, "head": 32}),
    "labels": ("wavenet", WAVENET | {"labels": (3,), "condition": 8, "norm": "rmsnorm"}),
    "mel": ("wavenet", WAVENET | {"series": 20}),
    "charwavenet": ("charwavenet", {"vocab_size": 27, "levels": 3, "hidden": 128}),
}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_takes_what_is_planned(name: str, precision: str) -> None:
    """Against the bytes of a forward pass and its loss over as many positions as the sweep gives to one pass. Autocast
    chooses the same types on a CPU as on a GPU."""
    core = cores.build(*EVALUATED[name]).eval()
    config: Any = core.config
    gpu = Device(torch.device("cuda", 0), "cuda", "Test GPU", precision, "", 1)
    recipe = Recipe(steps=1, batch_size=1, window=64, eval_tokens=65_536)
    length = longest_window(config, recipe.eval_tokens)
    rows = max(1, memory.evaluated_together(config, recipe, gpu) // length)
    ids, told = torch.zeros((rows, length), dtype=torch.int64), {}
    if getattr(config, "row", 0):
        labels = torch.zeros((1, len(config.labels)), dtype=torch.int64) if config.labels else None
        series = torch.zeros((1, config.series)) if config.series else None
        told = {"condition": cores.Condition(labels, series, ids)}
    autocast = torch.autocast("cpu", torch.bfloat16, precision == "bfloat16")
    with Live(core.parameters()) as live, torch.no_grad(), autocast:
        _nats(core(ids, **told), ids)
    assert 1 <= memory._evaluation(config, recipe, gpu) / live.most < 1.6


def test_a_model_that_fits_no_device_is_refused_with_what_would_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = dfcli.plan("gpt", steps=1, device="cpu", overrides={"layers": "8", "heads": "8", "channels": "512"})
    monkeypatch.setattr(Device, "memory_bytes", lambda self: (2**20, int(0.9 * 16 * made.parameters)))
    assert "train it on 2 such machines with torchrun" in memory.advice(made)
    monkeypatch.setattr(Device, "memory_bytes", lambda self: (2**20, 2**20))
    with pytest.raises(DfError, match="of memory") as caught:
        memory.check_fits(made)
    assert "choose a smaller model" in caught.value.hint
    assert "torchrun" not in caught.value.hint


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 9.05 GB)",
    ],
)
def test_every_allocator_s_failure_is_told_with_what_to_lower(said: str) -> None:
    made = dfcli.plan("gpt", steps=1, device="cpu", overrides={"layers": "1", "channels": "32", "heads": "2"})
    with pytest.raises(DfError, match="there is not enough memory") as caught, memory.explained(made):
        raise RuntimeError(said)
    assert "--batch-size" in caught.value.hint


def test_processes_that_cannot_share_a_training_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dfcli.plan("gpt", steps=1, device="cpu", overrides={"layers": "1", "channels": "32", "heads": "2"})
    processes(monkeypatch, 2)
    apple = replace(made, device=replace(made.device, kind="mps"))
    with pytest.raises(UsageError, match="cannot connect processes on an Apple GPU"):
        check_shared(apple)
    with pytest.raises(UsageError, match="normalises over all rows"):
        check_shared(replace(made, core="charwavenet"))
    rows = replace(made, recipe=replace(made.recipe, batch_size=3))
    with pytest.raises(UsageError, match="2 processes cannot share 3 sequences equally"):
        check_shared(rows)
