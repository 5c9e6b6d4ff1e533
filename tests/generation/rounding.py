"""A WaveNet with the weights that its engine makes of it when it rounds them."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfcli.cores import WaveNet
from dfcli.kernels import gemm


def rounded(core: WaveNet) -> WaveNet:
    """A copy of `core`, whose widths are whole tiles, with its matrices rounded as `gemm.to_bfloat16` rounds them."""
    core = copy.deepcopy(core)
    config = core.config
    assert not config.decoder
    assert all(size % gemm.TILE == 0 for size in (config.residual, config.skip, config.head, config.vocab_size))
    with torch.no_grad():
        for layer in core.layers:
            taps = layer.dilated.weight.view(2 * config.residual, config.kernel, config.residual)
            for tap in range(config.kernel):
                _round(taps[:, tap])
            _round(layer.residual.weight)
        for linear in (core.skip, core.head1, core.head2):
            _round(linear.weight)
    return core


def _round(matrix: Tensor) -> None:
    N, K = matrix.shape
    tiles = from_bfloat16(gemm.to_bfloat16(gemm.tiles(matrix.numpy())))
    matrix.copy_(torch.from_numpy(untiled(tiles, N, K)))


def from_bfloat16(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The float32 tiles that `gemm.multiply` makes of such words."""
    pairs = words.reshape(-1, 1, gemm.WIDTH)
    return np.concatenate([pairs << 16, pairs], axis=1).view(np.float32).ravel()


def untiled(tiles: np.ndarray, N: int, K: int) -> np.ndarray:
    return tiles.reshape(-1, K, gemm.TILE).swapaxes(1, 2).reshape(N, K)
