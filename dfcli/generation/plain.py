"""The plain engine: the core's own `prefill` and `step`, id by id. The reference for the fast ones, and it
runs everywhere."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.errors import DfError
from dfcli.generation.sampling import Filters, pick
from dfcli.system.device import Device

POSITIONS = 8192  # of all sequences together that are read at once: what lies between the layers must fit into memory


def pieces(ids: NDArray[np.int64]) -> tuple[Tensor, ...]:
    """ids [B, T] cut into pieces [B, t] that can be read at once."""
    return torch.from_numpy(ids).split(max(1, POSITIONS // len(ids)), dim=1)


class Plain:
    """`engines.Engine` for any core, float32, on any device. The core must be in eval mode and on the
    device."""

    name, reason = "plain", "the core's own step"

    def __init__(self, core: nn.Module, device: Device) -> None:
        self._core = cast(Any, core)  # a core has init_state, prefill and step, which nn.Module's type does not tell
        self._device = device.torch_device
        self._state: Any = None
        self._logits = np.empty((0, 0), np.float32)  # [B, V]

    @torch.inference_mode()
    def start(self, batch: int) -> None:
        self._state = self._core.init_state(batch)

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64]) -> None:
        for piece in pieces(ids):
            self._read(self._core.prefill(piece.to(self._device), self._state))

    @torch.inference_mode()
    def generate(self, uniforms: NDArray[np.float64], filters: Filters) -> NDArray[np.int64]:
        picked = np.empty(uniforms.shape, np.int64)
        for j in range(uniforms.shape[1]):
            ids = picked[:, j] = pick(self._logits, filters, uniforms[:, j])
            self._read(self._core.step(torch.from_numpy(ids).to(self._device), self._state))
        if not np.isfinite(self._logits).all():  # a look a chunk: weights that were loaded are known to be finite
            raise DfError(
                "the model's output is not finite", "its training may have diverged: try an earlier `--checkpoint`"
            )
        return picked

    def _read(self, result: tuple[Tensor, Any]) -> None:
        logits, self._state = result
        self._logits = logits.float().cpu().numpy()
