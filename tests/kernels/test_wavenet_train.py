"""The compiled layers give the core's logits and gradients, whatever the shape and however many threads share them."""

from __future__ import annotations

import platform
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dfcli.cores import Condition, WaveNet, WaveNetConfig
from dfcli.data.batches import IGNORED
from dfcli.kernels.threads import WorkerPool
from dfcli.kernels.wavenet_train import build
from dfcli.system.events import ignore
from dfcli.training.memory import estimate as memory_bytes
from dfcli.training.settings import Recipe
from tests.generation.engine import cpu
from tests.kernels import passes

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64 processors")

SMALL = {"vocab_size": 20, "dilations": (1, 2, 4), "cycles": 2, "residual": 16, "skip": 32, "head": 16}
CASES: list[tuple[dict[str, Any], int, int, int]] = [  # config, sequences, positions, threads
    ({"norm": "rmsnorm"}, 1, 300, 2),
    ({}, 2, 65, 1),
    ({"norm": "rmsnorm", "kernel": 3, "residual": 48}, 3, 41, 2),
    ({"kernel": 1}, 2, 10, 2),
    ({"norm": "rmsnorm", "dilations": (1, 100, 7), "cycles": 1}, 2, 64, 3),
    ({"vocab_size": 300, "head": 48, "skip": 16}, 1, 70, 2),
    ({"norm": "rmsnorm"}, 1, 1, 4),
    ({"norm": "rmsnorm"}, 37, 20, 2),  # more sequences than slots
]
DEVICE = cpu(2)
CONDITIONS: dict[str, Any] = {"labels": (3, 2), "condition": 8, "series": 5}


def model(seed: int = 0, **config: Any) -> WaveNet:
    torch.manual_seed(seed)
    return WaveNet(WaveNetConfig(**SMALL | config))


def rows(B: int, T: int) -> Condition:
    """Seven condition rows, which change every 9 positions."""
    labels = torch.stack([torch.randint(3, (7,)), torch.randint(2, (7,))], 1)
    return Condition(labels, torch.randn(7, 5), (torch.arange(T) // 9 + torch.arange(B)[:, None]) % 7)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(("config", "B", "T", "threads"), CASES)
def test_loss_and_gradients_are_the_cores(
    config: dict[str, Any], B: int, T: int, threads: int, documents: bool, told: bool
) -> None:
    core = model(**config | (CONDITIONS if told else {}))
    condition = rows(B, T) if told else None
    ids = torch.randint(20, (B, T))
    positions = passes.starts(B, T) if documents else None
    targets = torch.randint(core.config.vocab_size, (B, T)).masked_fill(torch.rand(B, T) < 0.1, IGNORED)
    expected = passes.one(core, passes.plain(core), ids, targets, positions, condition)
    found = passes.one(core, build(core, WorkerPool(threads), ignore), ids, targets, positions, condition)
    passes.assert_alike(found, expected, 1e-5)


@passes.needs_amx
@pytest.mark.parametrize(("config", "B", "T", "threads"), CASES)
def test_in_bfloat16_they_are_near(config: dict[str, Any], B: int, T: int, threads: int) -> None:
    core = model(**CONDITIONS | {"residual": 32, "skip": 64, "head": 96} | {"kernel": config.get("kernel", 2)})
    ids, condition = torch.randint(20, (B, T)), rows(B, T)
    given = ids, ids, passes.starts(B, T), condition
    kernel = build(core, WorkerPool(threads), ignore, "bfloat16")
    found, expected, autocast = (passes.one(core, each, *given) for each in (kernel, *passes.both(core)))
    passes.assert_rounded(found, expected, autocast)
    passes.assert_alike(found, passes.one(core, kernel, *given), 0)


@pytest.mark.parametrize("sequences", [1, 4, 40])
def test_the_memory_estimate_is_what_a_pass_takes(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the largest tensors that it makes: right within a tenth."""
    core = model(norm="rmsnorm", residual=32, skip=64, head=128)
    backward, ids = build(core, WorkerPool(2), ignore), torch.randint(20, (sequences, 4096))
    made: list[int] = []

    def watched(make: Any) -> Any:
        def watch(*size: Any, **others: Any) -> torch.Tensor:
            tensor = make(*size, **others)
            made.append(tensor.nbytes)
            return tensor

        return watch

    monkeypatch.setattr(torch, "empty", watched(torch.empty))
    monkeypatch.setattr(torch, "zeros", watched(torch.zeros))
    backward(ids, ids, None, None, 1)
    estimate = memory_bytes("wavenet", core.config, Recipe(batch_size=sequences, window=4096, optimizer="sgd"), DEVICE)
    assert 0.9 < estimate / sum(made) < 1.1


def test_large_sums_and_what_is_not_a_number() -> None:
    core, ids = model(), torch.randint(20, (1, 40))
    with torch.no_grad():
        core.layers[0].dilated.weight.mul_(300)  # tanh and sigmoid saturate
    backward = build(core, WorkerPool(2), ignore)
    expected, found = passes.one(core, passes.plain(core), ids, ids), passes.one(core, backward, ids, ids)
    passes.assert_alike(found, expected, 1e-4)
    with torch.no_grad():
        core.layers[1].dilated.weight[3, 3] = torch.nan
    assert passes.one(core, backward, ids, ids)[0].isnan()


def test_the_same_bits_every_time() -> None:
    core = model(norm="rmsnorm")
    backward = build(core, WorkerPool(2), ignore)
    for B, T in ((1, 500), (9, 100)):  # threads that meet, and threads that take slots
        ids = torch.randint(20, (B, T))
        passes.assert_same_bits(core, backward, ids, ids)


def test_more_threads_than_cores_do_not_wait_for_each_other_in_vain() -> None:
    core, ids = model(dilations=(1, 2, 4, 8, 16), cycles=4), torch.randint(20, (1, 2048))
    backward = build(core, WorkerPool(12), ignore)
    passes.one(core, backward, ids, ids)
    began = time.perf_counter()
    passes.one(core, backward, ids, ids)
    assert time.perf_counter() - began < 5


def test_nobody_waits_for_a_piece_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal between the starts of two workers, or a thread that the system refuses."""
    core, ids = model(), torch.randint(20, (1, 200))
    submit, calls = ThreadPoolExecutor.submit, iter(range(100))

    def refuse(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return submit(*arguments)

    backward = build(core, WorkerPool(2), ignore)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    with pytest.raises(KeyboardInterrupt):
        backward(ids, ids, None, None, 1)
    monkeypatch.undo()
    expected, found = (
        passes.one(core, passes.plain(core), ids, ids),
        passes.one(core, backward, ids, ids),
    )  # its thread is free again
    passes.assert_alike(found, expected, 1e-5)
