"""Kernels compute what they know, and leave the rest to PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from dfcli import cores
from dfcli.cores.gpt import GPTConfig
from dfcli.cores.wavenet import WaveNetConfig
from dfcli.kernels import gpt_sample, gpt_train, wavenet_sample, wavenet_train
from dfcli.kernels.known import FIELDS, RMS, unknown
from dfcli.kernels.threads import WorkerPool
from dfcli.system.device import resolve
from dfcli.system.events import ignore


@dataclass(frozen=True)
class LaterGPT(GPTConfig):
    sparkle: int = 0


@dataclass(frozen=True)
class LaterWaveNet(WaveNetConfig):
    sparkle: int = 0


@pytest.mark.parametrize("kind", [GPTConfig, WaveNetConfig])
def test_every_field_of_today_is_known(kind: type) -> None:
    assert set(FIELDS[kind]) == {field.name for field in fields(kind)}


def test_a_field_or_a_value_that_a_core_learns_later_is_left_to_pytorch() -> None:
    gpt, device = {"vocab_size": 60, "context": 32, "layers": 1, "heads": 2, "channels": 32}, resolve("cpu")
    assert gpt_train.supports(LaterGPT(**gpt)) is gpt_sample.supports(LaterGPT(**gpt), device) is None
    later = LaterGPT(**gpt, sparkle=1)
    reason = "the kernels do not know sparkle=1"
    assert gpt_train.supports(later) == gpt_sample.supports(later, device) == reason
    wavenet = LaterWaveNet(dilations=(1, 2), cycles=1, residual=16, skip=16, head=16, sparkle=1)
    assert wavenet_train.supports(wavenet) == wavenet_sample.supports(wavenet, device) == reason
    norm = GPTConfig(**gpt)
    object.__setattr__(norm, "norm", "tanhnorm")
    assert unknown(norm) == "the kernels do not know norm=tanhnorm"


GPT = {"vocab_size": 60, "context": 32, "layers": 1, "heads": 2, "channels": 32}
WAVENET = {"dilations": (1, 2), "cycles": 1, "residual": 16, "skip": 16, "head": 16}


@pytest.mark.parametrize(
    ("name", "values", "kernels"),
    [("gpt", GPT, (gpt_train, gpt_sample)), ("wavenet", WAVENET, (wavenet_train, wavenet_sample))],
)
def test_a_norm_that_only_the_table_knows_is_not_computed_as_another(
    name: str, values: dict[str, Any], kernels: tuple[Any, Any]
) -> None:
    core, (train, sample) = cores.build(name, values).eval(), kernels
    assert set(RMS[type(core.config)]) == set(FIELDS[type(core.config)]["norm"])
    object.__setattr__(core.config, "norm", "tanhnorm")
    with pytest.raises(KeyError, match="tanhnorm"):
        sample.build(core, resolve("cpu"))
    with pytest.raises(KeyError, match="tanhnorm"):
        train.build(core, WorkerPool(1), ignore)
