"""The compiled WaveNet step against the core's own: logits, picks, many clips, rounded weights, and what goes wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfcli.codecs import MuLaw
from dfcli.cores import Condition, WaveNet, WaveNetConfig, protocols
from dfcli.cores.protocols import Picking
from dfcli.generation import engines
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice
from dfcli.kernels import wavenet_sample
from tests.generation.engine import cpu, picking, start
from tests.generation.rounding import rounded

VARIANTS = {
    "plain": {},
    "paper shape": {"dilations": (1, 2, 4, 8, 16), "residual": 64, "skip": 256, "head": 256, "vocab_size": 256},
    "odd widths and dilations": {"residual": 33, "skip": 40, "head": 70, "dilations": (1, 3, 12, 11, 7)},
    "kernel 3": {"kernel": 3},
    "kernel 1": {"kernel": 1},
    "norm": {"norm": "rmsnorm", "residual": 40},
    "no bias": {"bias": False},
    "embedding and decoder": {"embedding": 20, "decoder": 30},
    "one layer": {"dilations": (2,), "cycles": 1},
    "1,024 levels": {"vocab_size": 1024},
    "conditions": {"labels": (3, 2), "condition": 8, "series": 5, "bias": False, "residual": 33},
}


def build(**values: Any) -> WaveNet:
    torch.manual_seed(3)
    small: dict[str, Any] = {
        "vocab_size": 12, "dilations": (1, 2, 4, 16), "cycles": 2, "residual": 32, "skip": 32, "head": 32
    }  # fmt: skip
    core = WaveNet(WaveNetConfig(**small | values)).eval()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter *= 2  # so that the logits are as large as a trained model's
    return core


def logits(engine: Any) -> np.ndarray:
    """[B, at least V], of a compiled engine."""
    if hasattr(engine, "parts"):
        return np.concatenate([part.logits for part in engine.parts])
    return engine._state.logits[: engine._batch].cpu().numpy()


def told(core: WaveNet, clips: int, begin: int, end: int) -> Condition | None:
    """For a model with conditions, rows that change every second position, and differ from clip to clip."""
    config, generator = core.config, torch.Generator().manual_seed(1)
    if not config.row:
        return None
    labels = torch.stack([torch.randint(names, (7,), generator=generator) for names in config.labels], 1)
    index = (torch.arange(begin, end) // 2 + torch.arange(clips)[:, None]) % 7
    return Condition(labels, torch.randn(7, config.series, generator=generator), index).to(core.table.weight.device)


def compare(core: WaveNet, fast: Any, plain: Any, opening: list[list[int]], samples: int) -> None:
    """Asserts that an engine does what the plain one does, sample by sample: `logits(fast)` are its logits."""
    for engine in (fast, plain):
        engine.start(len(opening))
        engine.prefill(np.array(opening, np.int64), told(core, len(opening), 0, len(opening[0])))
    for place, uniforms in enumerate(np.split(Dice(9, range(len(opening))).draw(samples), samples, axis=1)):
        condition = told(core, len(opening), len(opening[0]) + place, len(opening[0]) + place + 1)
        expected = plain.generate(uniforms, picking(), condition)
        np.testing.assert_array_equal(fast.generate(uniforms, picking(), condition), expected)
        np.testing.assert_allclose(logits(fast)[:, : core.config.vocab_size], plain._logits, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_picks_are_the_plain_steps(variant: str) -> None:
    core = build(**VARIANTS[variant])
    compare(core, wavenet_sample.build(core, cpu(2)), Plain(core, cpu()), [[1, 2, 3], [4, 5, 6], [1, 1, 1]], 70)


@pytest.mark.parametrize("variant", ["plain", "conditions"])
def test_where_the_chunks_are_cut_changes_nothing(variant: str) -> None:
    core, uniforms, made = build(**VARIANTS[variant]), Dice(9, range(2)).draw(60), []
    engine = wavenet_sample.build(core, cpu())
    for cuts in ([0, 60], [0, 1, 8, 13, 40, 60]):
        engine.start(2)
        engine.prefill(np.array([[1, 2], [2, 3]]), told(core, 2, 0, 2))
        parts = [engine.generate(uniforms[:, a:b], picking(), told(core, 2, 2 + a, 2 + b)) for a, b in pairwise(cuts)]
        made.append(np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_clips_do_not_touch_each_other(threads: int) -> None:
    core, opening = build(), [[clip, 3, 5, 7] for clip in range(5)]
    uniforms = Dice(2, range(5)).draw(50)
    together = start(wavenet_sample.build(core, cpu(threads)), opening).generate(uniforms, picking())
    for clip in range(5):
        alone = start(wavenet_sample.build(core, cpu()), opening[clip : clip + 1])
        np.testing.assert_array_equal(alone.generate(uniforms[clip : clip + 1], picking())[0], together[clip])


def test_a_long_opening_is_the_same_as_its_end() -> None:
    core = build()
    opening = np.random.default_rng(0).integers(0, 12, (1, 3 * core.context))
    uniforms = Dice(0, [0]).draw(40)
    made = [
        start(wavenet_sample.build(core, cpu()), part.tolist()).generate(uniforms, picking())
        for part in (opening, opening[:, -core.context :])
    ]
    np.testing.assert_array_equal(*made)


def test_an_opening_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds a piece of a long opening, not all of it."""
    core = build()
    opening = np.random.default_rng(1).integers(0, 12, (2, core.context)).tolist()
    uniforms = Dice(9, range(2)).draw(40)
    whole = start(wavenet_sample.build(core, cpu()), opening).generate(uniforms, picking())
    for positions in (1, 6, 49):
        monkeypatch.setattr(protocols, "CHUNK", positions)
        made = start(wavenet_sample.build(core, cpu()), opening).generate(uniforms, picking())
        np.testing.assert_array_equal(made, whole)


@pytest.fixture(scope="module")
def song() -> np.ndarray:
    """Ids of 6 s at 4 kHz: notes of two harmonics that fade, and a little noise."""
    rng = np.random.default_rng(5)
    time = np.arange(800) / 4000
    notes = [
        0.5 * np.exp(-6 * time) * (np.sin(2 * np.pi * pitch * time) + 0.4 * np.sin(4 * np.pi * pitch * time))
        for pitch in rng.uniform(100, 500, 30)
    ]
    sound = np.concatenate(notes) + 0.003 * rng.standard_normal(30 * 800)
    return MuLaw(4000).encode(np.clip(sound, -1, 1).astype(np.float32)).astype(np.int64)


@pytest.fixture(scope="module")
def trained(song: np.ndarray) -> WaveNet:
    """A model that has learned something of the song."""
    torch.manual_seed(0)
    config = WaveNetConfig(256, dilations=(1, 2, 4, 8, 16, 32), cycles=2, residual=32, skip=64, head=64)
    core = WaveNet(config)
    optimizer = torch.optim.Adam(core.parameters(), 4e-3)
    rng = np.random.default_rng(1)
    for _ in range(60):
        starts = rng.integers(0, len(song) - 257, 4)
        batch = torch.from_numpy(np.stack([song[begin : begin + 257] for begin in starts]))
        loss = bits(core, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 6.5  # bits; 8 is what knows nothing
    return core.eval()


def bits(core: WaveNet, ids: torch.Tensor) -> torch.Tensor:
    """Bits a sample over ids [B, T]."""
    return F.cross_entropy(core(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) / np.log(2)


@pytest.mark.parametrize(
    ("seed", "filters"), [(0, picking()), (1, picking(0.9, 50)), (2, picking(1, None, 0.95, 0.01))]
)
def test_a_thousand_samples_of_a_trained_model(trained: WaveNet, seed: int, filters: Picking) -> None:
    uniforms = Dice(seed, [0]).draw(1000)
    fast = start(wavenet_sample.build(trained, cpu()), [[128]]).generate(uniforms, filters)
    plain = start(Plain(trained, cpu()), [[128]]).generate(uniforms, filters)
    np.testing.assert_array_equal(fast, plain)


def test_rounding_the_weights_costs_no_bits(
    trained: WaveNet, song: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wavenet_sample, "ROUNDED", 0)
    coarse, ids = rounded(trained), torch.from_numpy(song[None, :3000])
    with torch.inference_mode():
        exact, ours = bits(trained, ids).item(), bits(coarse, ids).item()
    assert exact < 6.5
    assert abs(ours - exact) < 0.01
    opening = [song[:500].tolist()]
    engine = start(wavenet_sample.build(trained, cpu(), exact=False), opening)
    assert engine.name == "numba-bfloat16"
    plain = start(Plain(coarse, cpu()), opening)
    for lane in engine.parts:  # the opening is read by the core itself, with its own weights
        queues = lane._state.queues.reshape(-1, 32)
        queues[:] = np.concatenate([queue[0].numpy() for queue in plain._state.queues])
        lane.logits[:] = plain._logits
    for uniforms in np.split(Dice(0, [0]).draw(30), 30, axis=1):
        np.testing.assert_array_equal(engine.generate(uniforms, picking()), plain.generate(uniforms, picking()))
        np.testing.assert_allclose(logits(engine), plain._logits, atol=1e-4)


def test_weights_are_rounded_whatever_the_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that fill a tile stand beside weights in a pair."""
    monkeypatch.setattr(wavenet_sample, "ROUNDED", 0)
    core = build(residual=33, skip=40, head=70, vocab_size=65)
    engine = start(wavenet_sample.build(core, cpu(), exact=False), [[1, 2, 3]])
    plain = start(Plain(core, cpu()), [[1, 2, 3]])
    uniforms = Dice(9, [0]).draw(1)
    np.testing.assert_array_equal(engine.generate(uniforms, picking()), plain.generate(uniforms, picking()))
    np.testing.assert_allclose(logits(engine)[:, :65], plain._logits, atol=0.02)


@pytest.mark.parametrize(("exact", "name"), [(True, "numba"), (False, "numba-bfloat16")])
def test_only_large_weights_are_rounded_and_only_unless_exactness_is_asked_for(exact: bool, name: str) -> None:
    paper = WaveNet(WaveNetConfig()).eval()
    engine, reason = engines.choose("wavenet", paper, 1, cpu(), "fast" if exact else "auto")
    assert engine.name == name
    assert ("bfloat16" in reason) != exact
    assert wavenet_sample.build(build(), cpu(), exact).name == "numba"


def test_a_model_that_diverged_is_told() -> None:
    core = build()
    torch.nn.init.constant_(core.layers[1].residual.bias, float("nan"))
    engine = start(wavenet_sample.build(core, cpu()), [[1]])
    engine.generate(Dice(1, [0]).draw(3), picking())
    assert not engine.finite()


def test_without_numba_the_plain_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such processor\nand where it was met")

    monkeypatch.setattr(wavenet_sample._exact, "load", broken)
    engine, reason = engines.choose("wavenet", build(), 1, cpu())
    assert engine.name == "plain"
    assert reason == "the compiled engine does not work here (RuntimeError: no such processor)"


def test_a_conditioned_model_is_tried_out_with_a_condition() -> None:
    """A GPU's engine is tried before it is used; without a condition that failed, and the plain engine took over."""
    told = build(labels=(3, 2), condition=4, series=2)
    for core in (build(), told):
        engines._try_out(Plain(core, cpu()), 2, core.config)
