"""The plain engine: the core's own `prefill` and `step`, id by id. It runs everywhere, and is the reference for the
compiled ones."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores import Condition
from dfcli.cores.protocols import Picking, prefill
from dfcli.generation.sampling import pick
from dfcli.system.device import Device


class Plain:
    """`Engine` for any core, float32, on any device. The core must be in eval mode and on the device."""

    name, reason = "plain", "the core's own step"

    def __init__(self, core: nn.Module, device: Device) -> None:
        self._core = cast(Any, core)  # a core has init_state and step, which nn.Module's type does not tell
        self._device = device.torch_device
        self._state: Any = None
        self._logits = np.empty((0, 0), np.float32)  # [B, V]

    @torch.inference_mode()
    def start(self, batch: int) -> None:
        self._state = self._core.init_state(batch)

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64], condition: Condition | None = None) -> None:
        moved = condition and condition.to(self._device)
        self._read(prefill(self._core, torch.from_numpy(ids).to(self._device), self._state, moved))

    @torch.inference_mode()
    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None = None
    ) -> NDArray[np.int64]:
        picked = np.empty(uniforms.shape, np.int64)
        rows = condition and condition.to(self._device)
        for j in range(uniforms.shape[1]):
            ids = picked[:, j] = pick(self._logits, picking, uniforms[:, j])
            row = () if rows is None else (rows._replace(index=rows.index[:, j]),)
            self._read(self._core.step(torch.from_numpy(ids).to(self._device), self._state, *row))
        return picked

    def finite(self) -> bool:
        return bool(np.isfinite(self._logits).all())

    def _read(self, result: tuple[Tensor, Any]) -> None:
        logits, self._state = result
        self._logits = logits.float().cpu().numpy()
