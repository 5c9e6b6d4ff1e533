"""The models: pure modules over token ids. A core imports nothing of the rest and touches no file.

Every core promises the same: `forward(ids [B, T]) -> logits [B, T, V]` that is causal; `init_state`, `prefill` and
`step` that give the same logits id by id; `context`, proven by perturbation; and a frozen config with `parameters()`
and `flops_per_token()` that rebuilds it."""

from __future__ import annotations

from typing import Any

from .charwavenet import CharWaveNet, CharWaveNetConfig
from .gpt import GPT, GPTConfig
from .wavenet import Condition as Condition
from .wavenet import WaveNet, WaveNetConfig

Core = GPT | WaveNet | CharWaveNet
CoreConfig = GPTConfig | WaveNetConfig | CharWaveNetConfig

CORES: dict[str, tuple[Any, Any]] = {
    "gpt": (GPTConfig, GPT),
    "wavenet": (WaveNetConfig, WaveNet),
    "charwavenet": (CharWaveNetConfig, CharWaveNet),
}


def config(name: str, values: dict[str, Any]) -> CoreConfig:
    """The config of core `name` from plain values. Raises ValueError on an unknown core, field or a bad value."""
    if name not in CORES:
        raise ValueError(f"no core is called {name!r}; there are {', '.join(CORES)}")
    try:
        return CORES[name][0](**values)
    except TypeError as error:
        raise ValueError(f"bad config of core {name!r}: {error}") from None


def build(name: str, values: dict[str, Any]) -> Core:
    """A freshly initialised core on torch's default device. Raises ValueError as `config` does."""
    checked = config(name, values)
    return CORES[name][1](checked)
