"""How many processes share the weights of a model, and which sentence says that it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dfcli
from dfcli import cores
from dfcli.errors import DfError, UsageError
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
    evaluation = (
        memory.RESERVED * 8192 * (48 * CONFIG.channels + 12 * CONFIG.vocab_size)
    )  # 8,192 positions, which are not shared
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
