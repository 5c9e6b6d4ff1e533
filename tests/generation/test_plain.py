"""The plain engine makes what the model's full forward and `pick` make, and `choose` says what runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dfcli import kernels
from dfcli.cores import GPT, CharWaveNet, CharWaveNetConfig, GPTConfig, WaveNet, WaveNetConfig, protocols
from dfcli.cores.protocols import Picking
from dfcli.errors import UsageError
from dfcli.generation import engines
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice, pick
from tests.generation.engine import cpu, picking, start

V = 12
CORES = {
    "gpt": lambda: GPT(GPTConfig(V, context=32, layers=2, heads=2, channels=16, init="torch")),
    "wavenet": lambda: WaveNet(WaveNetConfig(V, dilations=(1, 2, 4), cycles=2, residual=8, skip=8, head=8)),
    "charwavenet": lambda: CharWaveNet(CharWaveNetConfig(V)),
}


def build(name: str) -> Any:
    torch.manual_seed(2)
    return CORES[name]().eval()


def begin(core: Any, opening: list[list[int]]) -> Plain:
    return start(Plain(core, cpu()), opening)


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("filters", [picking(), picking(0), picking(1.5, 6, 0.9, 0.02)])
@torch.no_grad()
def test_it_makes_what_the_definition_makes(name: str, filters: Picking) -> None:
    core, opening = build(name), [[1, 2, 3], [4, 5, 6]]
    uniforms = Dice(9, range(2)).draw(20)
    made = begin(core, opening).generate(uniforms, filters)
    ids = torch.tensor(opening)
    for roll in uniforms.T:
        picked = pick(core(ids)[:, -1].numpy(), filters, roll)
        ids = torch.cat([ids, torch.from_numpy(picked)[:, None]], dim=1)
    assert made.dtype == np.int64
    assert made.tolist() == ids[:, 3:].tolist()


@pytest.mark.parametrize("name", CORES)
def test_where_the_chunks_are_cut_changes_nothing(name: str) -> None:
    uniforms = Dice(9, range(2)).draw(60)  # beyond the GPT's context
    whole = begin(build(name), [[1], [2]]).generate(uniforms, picking())
    engine = begin(build(name), [[1], [2]])
    parts = [engine.generate(part, picking()) for part in np.split(uniforms, [1, 8, 9, 40], axis=1)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("name", CORES)
def test_an_opening_read_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = np.random.default_rng(1).integers(V, size=(2, 25)).tolist()
    uniforms = Dice(9, range(2)).draw(20)
    whole = begin(build(name), opening).generate(uniforms, picking())
    for positions in (1, 6, 49):
        monkeypatch.setattr(protocols, "CHUNK", positions)
        assert np.array_equal(begin(build(name), opening).generate(uniforms, picking()), whole)


def test_a_start_forgets_what_was_before() -> None:
    engine = begin(build("wavenet"), [[1, 2]])
    first = engine.generate(Dice(1, [0]).draw(30), picking())
    engine.start(3)
    engine.prefill(np.array([[1, 2]] * 3))
    again = engine.generate(np.repeat(Dice(1, [0]).draw(30), 3, axis=0), picking())
    assert np.array_equal(again, np.repeat(first, 3, axis=0))


def test_a_broken_model_is_told() -> None:
    core = build("gpt")
    torch.nn.init.constant_(core.blocks[0].mlp.projection.bias, float("nan"))
    engine = begin(core, [[1]])
    engine.generate(Dice(1, [0]).draw(3), picking())
    assert not engine.finite()


def test_a_broken_numba_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba.py").write_text("raise OSError('could not load libllvmlite.so')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "numba" or name.startswith("dfcli.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name, value in vars(kernels).items() if isinstance(value, ModuleType)]:
        monkeypatch.delattr(kernels, name)  # `from dfcli.kernels import` finds an imported module here first
    for name in ("gpt", "wavenet"):
        engine, why = engines.choose(name, build(name), 1, cpu())
        assert engine.name == "plain"
        assert why == "the compiled engine does not work here (OSError: could not load libllvmlite.so)"


class Fake:
    """A kernel's module and its engine: for models of up to 1,000 parameters."""

    name, reason = "fake", "the fastest here"

    def supports(self, config: Any, device: Any) -> str | None:
        return None if config.layers < 3 else "a model of this size is faster without it"

    def build(self, core: Any, device: Any, exact: bool, on_event: Any) -> Any:
        return self


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(core_name: str, kind: str) -> Any:
        if core_name == "wavenet":
            raise ModuleNotFoundError("No module named 'numba'")
        return Fake() if core_name == "gpt" else None

    monkeypatch.setattr(engines, "_kernel", kernel)
    core, device = build("gpt"), cpu()
    for engine, name, reason in [
        ("auto", "fake", "the fastest here"), ("fast", "fake", "asked for"), ("plain", "plain", "asked for"),
    ]:  # fmt: skip
        chosen, why = engines.choose("gpt", core, 1, device, engine)
        assert (chosen.name, why) == (name, reason)
    deep = GPT(GPTConfig(V, context=8, layers=3, heads=1, channels=4))
    chosen, why = engines.choose("gpt", deep, 1, device)
    assert (chosen.name, why) == ("plain", "a model of this size is faster without it")
    chosen, why = engines.choose("wavenet", core, 1, device)
    assert chosen.name == "plain"
    assert why == "the compiled engine does not work here (ModuleNotFoundError: No module named 'numba')"
    chosen, why = engines.choose("charwavenet", core, 1, device)
    assert (chosen.name, why) == ("plain", "there is no compiled engine for the character-level WaveNet on cpu")
    with pytest.raises(UsageError, match="no fast engine runs this model here: the compiled engine does not work"):
        engines.choose("wavenet", core, 1, device, "fast")
    with pytest.raises(UsageError, match="there is no engine 'turbo'"):
        engines.choose("gpt", core, 1, device, "turbo")
