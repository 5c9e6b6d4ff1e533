"""The sweep equals its definition: one target at a time, each with the context that its window gives it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfcli.cores import GPT, CharWaveNet, CharWaveNetConfig, GPTConfig, WaveNet, WaveNetConfig
from dfcli.errors import DfError, UsageError
from dfcli.evaluation import sweep as room
from dfcli.evaluation.sweep import longest_window, sweep
from dfcli.system.device import resolve
from dfcli.system.events import Progress
from tests.evaluation.memory import dataset, sequences

V = 11


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def gpt(context: int = 8) -> GPT:
    config = GPTConfig(V, context=context, layers=2, heads=2, channels=16, dropout=0.5, init="torch")
    return GPT(config).eval()


def wavenet() -> WaveNet:  # sees 1 + 2 * 7 = 15 ids
    return WaveNet(WaveNetConfig(V, dilations=(1, 2, 4), cycles=2, residual=8, skip=8, head=8)).eval()


def texts(lengths: list[int]) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(1, V, length).tolist() for length in lengths]


def data(kind: str, lead: int = 1) -> Any:
    if kind == "running":
        return dataset(V, texts([101]))
    if kind == "several":
        return dataset(V, texts([30, 1, 7, 45, 2]))
    return dataset(V, texts([5, 30, 1, 12, 26, 3]), boundary=0, lines=kind == "lines", lead=lead)


@torch.no_grad()
def by_definition(core: Any, data: Any, window: int | None, stride: int = 1) -> tuple[float, int]:
    """Summed loss and targets, one forward pass a target. Without a window all that came before is given."""
    nats, tokens = 0.0, 0
    for inputs, targets, first in sequences(data):
        for place in range(first, len(inputs)):
            begin = 0
            if window is not None and place >= window:
                begin = stride * math.ceil((place - window + 1) / stride)
            logits = core(torch.tensor([inputs[begin : place + 1]]))[0, -1]
            nats += float(F.cross_entropy(logits.double(), torch.tensor(targets[place])))
            tokens += 1
    return nats, tokens


@pytest.mark.parametrize("kind", ["running", "several", "documents", "lines"])
@pytest.mark.parametrize("stride", [None, 8, 5, 3, 1])
def test_gpt(kind: str, stride: int | None) -> None:
    core, held = gpt(), data(kind)
    found = sweep(core, held, "val", resolve("cpu"), stride=stride)
    nats, tokens = by_definition(core, held, 8, stride or 8)
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.context, found.stride) == (8, stride or 8)
    assert found.mean == found.nats / tokens


@pytest.mark.parametrize("kind", ["running", "several", "documents", "lines"])
@pytest.mark.parametrize("chunk", [1, 4, 20, 1000])
def test_wavenet_sees_its_whole_receptive_field(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_chunk", lambda context, limit: chunk)
    core, held = wavenet(), data(kind)
    found = sweep(core, held, "val", resolve("cpu"))
    nats, tokens = by_definition(core, held, None)
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.context, found.stride) == (15, 1)


@pytest.mark.parametrize("lead", [2, 3, 8])
@pytest.mark.parametrize("kind", ["documents", "lines"])
def test_further_boundaries_are_read_and_not_scored(lead: int, kind: str) -> None:
    held = data(kind, lead)
    for core, window in ((gpt(), 8), (wavenet(), None), (CharWaveNet(CharWaveNetConfig(V)).eval(), None)):
        found = sweep(core, held, "val", resolve("cpu"))
        nats, tokens = by_definition(core, held, window, 8)
        assert found.tokens == tokens == sum(len(t) + (kind == "lines") for t in texts([5, 30, 1, 12, 26, 3]))
        assert found.nats == pytest.approx(nats, rel=1e-5)


def test_few_positions_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    core, held = gpt(), data("lines")
    whole = sweep(core, held, "val", resolve("cpu"))
    for positions in (1, 10, 40):
        monkeypatch.setattr(room, "positions_at_once", lambda vocab_size, device, positions=positions: positions)
        monkeypatch.setattr(room, "_BLOCK", 3)
        found = sweep(core, held, "val", resolve("cpu"))
        assert found.tokens == whole.tokens
        assert found.nats == pytest.approx(whole.nats, rel=1e-6)


def test_batches_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "positions_at_once", lambda vocab_size, device: 20)
    core, seen = gpt(), []
    core.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    sweep(core, data("lines"), "val", resolve("cpu"))
    assert max(seen) <= 20


@pytest.mark.parametrize("limit", [None, 400])
@pytest.mark.parametrize("make", [gpt, wavenet])
def test_a_window_that_is_longer_than_the_bound_goes_alone(make: Any, limit: int | None) -> None:
    core, seen = make(), []
    core.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    sweep(core, dataset(V, texts([20_000])), "val", resolve("cpu"), limit=limit, most=5)
    assert max(seen) == longest_window(core.config, limit) > 5


def test_it_repeats_itself_and_leaves_the_model_as_it_was() -> None:
    core, held = gpt().train(), data("running")
    before = torch.get_rng_state()
    first = sweep(core, held, "val", resolve("cpu"))  # with dropout it could not repeat itself
    assert sweep(core, held, "val", resolve("cpu")) == first
    assert core.training
    assert torch.equal(before, torch.get_rng_state())
    loss = core(torch.zeros((1, 4), dtype=torch.int64)).sum()
    loss.backward()  # nothing of inference mode is left


def test_a_model_that_fails_is_put_back() -> None:
    core = gpt().train()
    with pytest.raises(IndexError):
        sweep(core, dataset(200, [[150, 160, 170]]), "val", resolve("cpu"))
    assert core.training


@pytest.mark.parametrize("kind", ["running", "lines"])
@pytest.mark.parametrize("make", [gpt, wavenet])
def test_a_limit_is_kept_roughly_and_repeats_itself(kind: str, make: Any) -> None:
    core = make()
    held = dataset(V, texts([12] * 300), boundary=0, lines=True) if kind == "lines" else dataset(V, texts([3000]))
    found = sweep(core, held, "val", resolve("cpu"), limit=400)
    assert 350 <= found.tokens <= 470
    assert sweep(core, held, "val", resolve("cpu"), limit=400) == found
    whole = sweep(core, held, "val", resolve("cpu"))
    assert sweep(core, held, "val", resolve("cpu"), limit=10**9) == whole
    assert sweep(core, held, "val", resolve("cpu"), limit=1).tokens >= 1
    assert found.mean == pytest.approx(whole.mean, rel=0.05)


def test_a_limit_spreads_over_the_split() -> None:
    core, seen = gpt(), []
    core.register_forward_hook(lambda module, args, out: seen.extend(args[0][:, 0].tolist()))
    ids = [0] * 400 + [1] * 400 + [2] * 400 + [3] * 401
    sweep(core, dataset(V, [ids]), "val", resolve("cpu"), limit=64)
    assert [seen.count(part) for part in range(4)] == [2, 2, 2, 2]


def test_what_cannot_be_swept() -> None:
    core = gpt()
    for stride in (0, -1, 9):
        with pytest.raises(UsageError, match="from 1 to the context of 8"):
            sweep(core, data("running"), "val", resolve("cpu"), stride=stride)
    for held in (dataset(V, [[3]]), dataset(V, [[], []], boundary=0)):
        with pytest.raises(DfError, match="nothing to predict"):
            sweep(core, held, "val", resolve("cpu"))
    # an empty line has its end to predict
    assert sweep(core, dataset(V, [[], []], boundary=0, lines=True), "val", resolve("cpu")).tokens == 2


def test_progress_ends_at_the_number_of_targets() -> None:
    events: list[Any] = []
    for limit in (None, 4):
        found = sweep(gpt(), data("lines"), "val", resolve("cpu"), limit=limit, on_event=events.append)
        assert events[-1] == Progress("evaluation", found.tokens, found.tokens, "tokens")


def test_chunks_of_long_recordings() -> None:
    assert room._chunk(15, None) == 8192
    assert room._chunk(4093, None) == 3 * 4093  # the overlap is a quarter of the work
    assert room._chunk(4093, 20_000) == 4093
    assert room._chunk(15, 20_000) == 2500
