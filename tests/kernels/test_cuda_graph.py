"""A training pass as one CUDA graph: the gradients of the pass without one. Without a GPU a stand-in replays it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
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
from tests.generation.engine import NO_CUDA, gpu

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
        return gpu()
    monkeypatch.setattr(graph, "Replayed", StandIn)
    return NO_CUDA


def backend(device: Device, first: Batch | None = None, **recipe: Any) -> TorchBackend:
    torch.manual_seed(0)
    core = cores.GPT(CONFIG).to(device.torch_device)
    made = TorchBackend(core.train(), change(Recipe(), recipe), device)
    made.sparse = False
    made.warm_up(lambda: first or batch(0), told.append)
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
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_documents_in_one_row(device: Device) -> None:
    """Their positions are an argument of the graph: other documents, the same graph."""

    def parted(seed: int) -> Batch:
        one = batch(seed)
        return replace(one, positions=(torch.arange(16) % (seed + 3)).expand(3, -1).contiguous())

    graphed, plain = (backend(device, parted(0), compile=how) for how in ("auto", "off"))
    for seed in (1, 5):
        assert graphed._graph.fits(graphed._arguments(*tensors(parted(seed), device), 1))
        found, expected = (passes(made, device, [parted(seed)]) for made in (graphed, plain))
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_conditions_whose_number_of_rows_changes(device: Device) -> None:
    """They are padded to one number; a batch with more is computed without the graph."""
    config = cores.WaveNetConfig(11, (1, 2), 1, residual=8, skip=8, head=8, labels=(3,), condition=4, series=2)

    def told(seed: int, rows: int) -> Batch:
        torch.manual_seed(seed)
        parts = torch.randint(3, (rows, 1)), torch.randn(rows, 2), torch.randint(rows, (3, 16))
        return replace(batch(seed), condition=cores.Condition(*parts))

    made, device = [], replace(device, precision="float32")  # in bfloat16 a product of more rows rounds otherwise
    for how in ("auto", "off"):
        torch.manual_seed(0)
        core = cores.WaveNet(config).to(device.torch_device).train()
        made.append(TorchBackend(core, change(Recipe(), {"compile": how}), device))
        made[-1].warm_up(lambda: told(0, 8), print)
    for seed, rows in ((1, 8), (2, 5), (3, 10), (4, 13), (5, 1)):
        arguments = made[0]._arguments(*tensors(told(seed, rows), device), 1)
        assert made[0]._graph.fits(arguments) == (rows <= 10)
        found, expected = (passes(each, device, [told(seed, rows)]) for each in made)
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


def test_the_buffers_of_batch_norm_are_those_of_the_passes(device: Device) -> None:
    config = cores.config("charwavenet", {"vocab_size": 11, "levels": 2, "embedding": 4, "hidden": 8})
    ends = []
    for how in ("auto", "off"):
        torch.manual_seed(0)
        core = cores.build("charwavenet", asdict(config)).to(device.torch_device).train()
        made = TorchBackend(core, change(Recipe(), {"compile": how, "packing": "last"}), device)
        ids = torch.randint(11, (6, 4), generator=torch.Generator().manual_seed(1))
        one = Batch(ids, ids, None)
        made.warm_up(lambda one=one: one, told.append)
        for _ in range(2):
            made.backward(*tensors(one, device), 6)
        ends.append([buffer.float().clone() for buffer in core.buffers()])
    torch.testing.assert_close(ends[0], ends[1])


def test_after_a_failed_recording_all_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 leaves the stream and the generator as if it were still recording."""
    done: list[object] = []

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    class Generator:
        def clone_state(self) -> str:
            return "before"

        def graphsafe_set_state(self, state: object) -> None:
            done.append(state)

    @contextmanager
    def recording(_: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("the capture was invalidated")

    current = Stream()
    for name, value in {
        "current_stream": lambda: current, "Stream": Stream, "stream": lambda _: nullcontext(), "graph": recording,
        "current_device": lambda: 0, "default_generators": [Generator()], "CUDAGraph": object,
        "set_stream": done.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    calls: list[None] = []

    def waits() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graph.recorded(waits)
    assert done == [current, "before"]


def test_dropout_goes_on_after_a_failed_recording() -> None:
    x = torch.ones(100, device=gpu().torch_device)

    def waits() -> Tensor:
        return torch.nn.functional.dropout(x, 0.5) * torch.nn.functional.dropout(x, 0.5).sum().item()

    with pytest.raises(RuntimeError):
        graph.recorded(waits)
    torch.cuda.manual_seed(0)
    assert 0 < int((torch.nn.functional.dropout(x, 0.5) == 0).sum()) < 100


def test_what_cannot_be_recorded_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "Replayed", fails)
    told.clear()
    made = backend(device)
    assert "without a CUDA graph, which is slower (RuntimeError: CUDA error" in str(told[0])
    assert passes(made, device, [batch(1)])[1]
