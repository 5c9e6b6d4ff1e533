"""A training pass as one CUDA graph: the gradients of the pass without one. Without a GPU a stand-in replays it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dfcli import cores
from dfcli.data.batches import Batch
from dfcli.kernels.cuda import graph
from dfcli.system.device import Device
from dfcli.training.backend import TorchBackend, tensors
from dfcli.training.settings import Recipe, change
from tests.generation.engine import CUDA, NO_CUDA

CONFIG = cores.GPTConfig(11, context=16, layers=2, heads=2, channels=32, dropout=0.1)


class StandIn(graph.Replayed):
    """Calls the function again, and keeps what it returns in the same memory, as a graph does."""

    def __init__(self, function: Callable[..., list[Tensor]], example: Sequence[Tensor | None]) -> None:
        self._inputs = [None if x is None else x.clone() for x in example]
        self._function, self._result = function, [x.clone() for x in function(*self._inputs)]
        self._graph: Any = self

    def replay(self) -> None:
        parameters = list(self._function.__self__._core.parameters())  # pyright: ignore[reportFunctionMemberAccess]
        before = [p.grad for p in parameters]
        for mine, new in zip(self._result, self._function(*self._inputs), strict=True):
            mine.copy_(new)
        for p, grad in zip(parameters, before, strict=True):  # a graph runs no Python
            p.grad = grad


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        return CUDA
    monkeypatch.setattr(graph, "Replayed", StandIn)
    return NO_CUDA


def backend(device: Device, seed: int = 0, **recipe: Any) -> TorchBackend:
    torch.manual_seed(seed)
    core = cores.GPT(CONFIG).to(device.torch_device)
    made = TorchBackend(core.train(), change(Recipe(), recipe), device)
    made.sparse = False
    made.warm_up(lambda: batch(0), told.append)
    return made


told: list[object] = []


def batch(seed: int, rows: int = 3) -> Batch:
    ids = torch.randint(11, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)


def passes(made: TorchBackend, device: Device, batches: list[Batch]) -> tuple[list[float], list[Tensor]]:
    """The losses of these micro-batches of one step, and the gradients of all together."""
    made._core.zero_grad()
    torch.manual_seed(5)  # dropout
    losses = [made.backward(*tensors(each, device), 100).item() for each in batches]
    return losses, [p.grad.clone() for p in made._core.parameters() if p.grad is not None]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_and_gradients_are_those_of_the_pass(accumulate: int, device: Device) -> None:
    graphed, plain = (backend(device, compile=how, accumulate=accumulate) for how in ("auto", "off"))
    assert graphed._graph is not None
    assert plain._graph is None
    assert all(p.grad is None for p in graphed._core.parameters())
    with device.repeatable():
        for first in (1, 10):  # a replay after a replay
            batches = [batch(first + i) for i in range(accumulate)]
            found, expected = passes(graphed, device, batches), passes(plain, device, batches)
            assert found[0] == pytest.approx(expected[0], rel=1e-6)
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_a_batch_of_another_shape_is_not_replayed(device: Device) -> None:
    graphed, plain = (backend(device, compile=how) for how in ("auto", "off"))
    found, expected = (passes(made, device, [batch(1, rows=2)]) for made in (graphed, plain))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_what_cannot_be_recorded_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "Replayed", fails)
    told.clear()
    made = backend(device)
    assert "without a CUDA graph, which is slower (RuntimeError: CUDA error" in str(told[0])
    assert passes(made, device, [batch(1)])[1]
