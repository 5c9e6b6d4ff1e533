"""What the GPU's graph replays, run on the CPU without one: the static step and its pick against the plain engine's.
Where there is a GPU, the graph itself too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dfcli.cores.protocols import Picking
from dfcli.generation import engines
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice
from dfcli.generation.sampling import pick as reference
from dfcli.kernels.cuda import gpt as gpt_cuda
from dfcli.system.device import Device
from dfcli.system.events import Note
from tests.generation.engine import NO_CUDA, cpu, gpu, picking, start
from tests.kernels.test_gpt_sample import VARIANTS, V, build


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The CPU, where the step runs as it is, or a GPU, where its graph does."""
    if request.param == "cuda":
        return gpu()
    monkeypatch.setattr(gpt_cuda.Graphed, "_captured", lambda self, advance: advance)
    monkeypatch.setattr(gpt_cuda, "SPAN", 4)  # several spans in a small context
    return cpu()


def fast(core: Any, device: Device, opening: list[list[int]]) -> Any:
    return start(gpt_cuda.Graphed(core.to(device.torch_device), device), opening)


@pytest.mark.parametrize("many", [1, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_picks_are_the_plain_steps(
    variant: str, many: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt_cuda, "MANY", many)
    core = build(**VARIANTS[variant])
    opening = [[1, 2, 3][: core.context], [4, 5, 6][: core.context]]
    ours, plain = fast(core, device, opening), start(Plain(core, device), opening)
    for uniforms in np.split(Dice(9, range(2)).draw(60), 60, axis=1):  # beyond the context, more than once
        np.testing.assert_array_equal(ours.generate(uniforms, picking()), plain.generate(uniforms, picking()))
        np.testing.assert_allclose(ours._next.cpu().numpy(), plain._logits, atol=1e-4)


@pytest.mark.parametrize("filters", [picking(), picking(0), picking(0.8, 20), picking(1, None, 0.9, 0.01)])
def test_long_chunks_wherever_they_are_cut(filters: Picking, device: Device) -> None:
    core, opening, uniforms = build(), [[1, 2], [3, 4]], Dice(4, range(2)).draw(200)
    ours = fast(core, device, opening)
    made = np.concatenate([ours.generate(part, filters) for part in np.split(uniforms, [1, 9, 23, 90], 1)], 1)
    np.testing.assert_array_equal(made, start(Plain(core, device), opening).generate(uniforms, filters))


@pytest.mark.parametrize(
    "filters",
    [
        picking(), picking(0), picking(0.7, 5), picking(1.3, None, 0.9), picking(0.8, 40, 0.8, 0.05), picking(1, 1),
        picking(1, None, 1e-9), picking(1, None, None, 0.3), picking(1e-30), picking(1e30),
    ],
)  # fmt: skip
def test_pick_is_the_pick_of_sampling(filters: Picking) -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((300, V))).astype(np.float32)
    logits[::3] = logits[::3].round()  # with many equal ones
    logits[::7, 1] = -np.inf
    uniforms = rng.random(len(logits))
    uniforms[::10] = 0
    ours = gpt_cuda.pick(torch.from_numpy(logits), filters, torch.from_numpy(uniforms))
    np.testing.assert_array_equal(ours.numpy(), reference(logits, filters, uniforms))


def test_a_capture_tries_the_step_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU's part only this can be tried without one: a capture that fails, first and later."""
    tried: list[None] = []

    def fails(*_: Any, **__: Any) -> None:
        tried.append(None)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(gpt_cuda, "recorded", fails)
    core = build()
    with pytest.raises(RuntimeError, match="not permitted"):
        fast(core, cpu(), [[1]]).generate(Dice(0, [0]).draw(1), picking())
    engine, reason = engines.choose("gpt", core, 1, NO_CUDA)
    assert engine.name == "plain"
    assert (
        reason
        == "the compiled engine does not work here (RuntimeError: operation not permitted when stream is capturing)"
    )
    told: list[Any] = []
    late = gpt_cuda.Graphed(core, cpu(), told.append)
    late._proven = True
    uniforms = Dice(0, [0]).draw(20)
    made = start(late, [[1]]).generate(uniforms, picking())
    np.testing.assert_array_equal(made, start(Plain(core, cpu()), [[1]]).generate(uniforms, picking()))
    assert [type(event) for event in told] == [Note]
    assert len(tried) == 3


def test_a_model_that_diverged_is_told(device: Device) -> None:
    core = build()
    torch.nn.init.constant_(core.blocks[0].mlp.projection.bias, float("nan"))
    engine = fast(core, device, [[1]])
    engine.generate(Dice(1, [0]).draw(3), picking())
    assert not engine.finite()
