"""The plain engine makes what the model's full forward and `pick` make, and `choose` says what runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfcli.cores import GPT, CharWaveNet, CharWaveNetConfig, GPTConfig, WaveNet, WaveNetConfig
from dfcli.errors import DfError, UsageError
from dfcli.generation import engines, plain
from dfcli.generation.plain import Plain
from dfcli.generation.sampling import Dice, Filters, pick
from tests.generation.engine import cpu, start

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
@pytest.mark.parametrize("filters", [Filters(), Filters(0), Filters(1.5, 6, 0.9, 0.02)])
@torch.no_grad()
def test_it_makes_what_the_definition_makes(name: str, filters: Filters) -> None:
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
    whole = begin(build(name), [[1], [2]]).generate(uniforms, Filters())
    engine = begin(build(name), [[1], [2]])
    parts = [engine.generate(part, Filters()) for part in np.split(uniforms, [1, 8, 9, 40], axis=1)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("name", CORES)
def test_an_opening_read_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = np.random.default_rng(1).integers(V, size=(2, 25)).tolist()
    uniforms = Dice(9, range(2)).draw(20)
    whole = begin(build(name), opening).generate(uniforms, Filters())
    for positions in (1, 6, 49):
        monkeypatch.setattr(plain, "POSITIONS", positions)
        assert np.array_equal(begin(build(name), opening).generate(uniforms, Filters()), whole)


def test_a_start_forgets_what_was_before() -> None:
    engine = begin(build("wavenet"), [[1, 2]])
    first = engine.generate(Dice(1, [0]).draw(30), Filters())
    engine.start(3)
    engine.prefill(np.array([[1, 2]] * 3))
    again = engine.generate(np.repeat(Dice(1, [0]).draw(30), 3, axis=0), Filters())
    assert np.array_equal(again, np.repeat(first, 3, axis=0))


def test_a_broken_model_is_told() -> None:
    core = build("gpt")
    torch.nn.init.constant_(core.blocks[0].mlp.projection.bias, float("nan"))
    with pytest.raises(DfError, match="not finite"):
        begin(core, [[1]]).generate(Dice(1, [0]).draw(3), Filters())


def test_a_broken_numba_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba.py").write_text("raise OSError('could not load libllvmlite.so')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (
        "numba",
        *(f"dfcli.kernels.{part}" for part in ("compile", "ops", "pick", "gpt_sample", "wavenet_sample")),
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("gpt", "wavenet"):
        engine, why = engines.choose(name, build(name), 1, cpu())
        assert engine.name == "plain"
        assert why.endswith(f"{name}_sample cannot be imported (OSError: could not load libllvmlite.so)")


class Fake:
    name, reason = "fake", "the fastest here"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with a fast engine for GPTs."""

    class Module:
        @staticmethod
        def build(core: Any, batch: int, device: Any, exact: bool, on_event: Any) -> Any:
            if batch > 4:
                raise engines.Unavailable("a batch of this size is faster without it")
            return Fake()

    def find(name: str) -> Any:
        if name == "missing":
            raise ModuleNotFoundError("no", name="numba")
        return Module

    monkeypatch.setattr(engines, "FAST", {("gpt", "cpu"): "there", ("wavenet", "cpu"): "missing"})
    monkeypatch.setattr(engines.importlib, "import_module", find)
    return Module


@pytest.mark.usefixtures("fast")
def test_choose() -> None:
    core, device = build("gpt"), cpu()
    for engine, batch, name, reason in [
        ("auto", 1, "fake", "fastest"), ("fast", 4, "fake", "asked for"), ("plain", 1, "plain", "asked for"),
        ("auto", 5, "plain", "faster without it"),
    ]:  # fmt: skip
        chosen, why = engines.choose("gpt", core, batch, device, engine)
        assert chosen.name == name
        assert reason in why
    chosen, why = engines.choose("wavenet", core, 1, device)
    assert (chosen.name, why) == ("plain", "numba cannot be imported")
    chosen, why = engines.choose("charwavenet", core, 1, device)
    assert (chosen.name, why) == ("plain", "there is no fast engine for charwavenet on cpu")
    with pytest.raises(UsageError, match="numba cannot be imported"):
        engines.choose("wavenet", core, 1, device, "fast")
    with pytest.raises(UsageError, match="there is no engine 'turbo'"):
        engines.choose("gpt", core, 1, device, "turbo")
