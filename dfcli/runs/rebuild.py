"""From the description of a core in `run.json` back to the core, without drawing the initial weights that a
checkpoint replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfcli import cores
from dfcli.errors import CorruptError
from dfcli.system.files import DAMAGED

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Which tensors a core has."""

    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """(dtype, shape) of each tensor, tied ones once, under the first of their names."""
    names: dict[str, str]
    """Every name of the state dict, and the one that its tensor is kept under."""


class Blueprint:
    """A core as `source` describes it: {"name": ..., "config": {...}}. CorruptError where no core can be that."""

    def __init__(self, description: dict[str, Any], source: Path) -> None:
        self.description, self.source = description, source
        config = self._described(cores.config)
        self.vocab_size = config.vocab_size
        self.parameters = config.parameters()  # by its formula: nothing is allocated

    @cached_property
    def layout(self) -> Layout:
        """Its tensors. Takes address space for them, but not memory."""
        # The meta device would take neither, but to learn the shape of a range it imports torch's compiler: seconds.
        tensors = self._unfilled().state_dict(keep_vars=True)
        kept: dict[int, str] = {}
        names = {name: kept.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        kinds = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in kept.values()}
        return Layout(kinds, names)

    def build(self, weights: Mapping[str, Tensor]) -> cores.Core:
        """The core with these weights, on the CPU. Torch's random state is left as it is."""
        core = self._unfilled()
        core.load_state_dict(weights)
        return core

    def _unfilled(self) -> cores.Core:
        with _Unfilled():
            return self._described(cores.build)

    def _described(self, make: Callable[[str, dict[str, Any]], T]) -> T:
        try:
            return make(self.description["name"], self.description["config"])
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
            raise CorruptError(f"{self.source} describes a core that cannot be: {error}", DAMAGED) from error


class _Unfilled(TorchFunctionMode):
    """Within it parameters are not initialised: they stay memory that was never touched."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func.__name__ in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
