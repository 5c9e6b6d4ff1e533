"""WaveNet's layers in training on a CPU: their forward and backward pass as compiled functions (numba).

With 32 channels the products of a layer take less time than what surrounds them: a dozen PyTorch operations that each
send megabytes through memory. Here a layer takes `BLOCK` positions at a time, which stay in the nearest cache from its
input to its output, its part of the skips included. The head stays PyTorch's. The core's own `forward` is the
reference: logits and gradients agree to 1e-5 (tests).

Positions are flat: N = B T of them, rows behind each other, since a position knows how far it is from its document's
start and nothing looks beyond that. Each thread has a piece of them and passes through all layers; threads meet between
layers, as a tap may lie in another's piece. Gradients of weights are summed in the order of the pieces, so that the
same number of threads gives the same bits.

What is kept for the backward pass: of each layer its input h (and the norm's scale), its gate z = tanh(a) sigmoid(b),
and sigmoid(b); tanh(a) is their quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy import uintp
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores.wavenet import WaveNet
from dfcli.system.compiled import Compiled, inner
from dfcli.system.events import OnEvent
from dfcli.system.vectors import (
    COLUMNS,
    ONE,
    TWO,
    ZERO,
    Pieces,
    add,
    apart,
    clamp,
    copy,
    exp,
    fill,
    meet,
    norm,
    norm_back,
    packed_product,
    product,
)
from dfcli.training.loss import cross_entropy

BLOCK = 64  # positions

_apart = inner(apart)


@inner
def _own(piece, pieces, N):
    """The positions of a piece, of whole blocks: begin, end."""
    size = (-(-N // pieces) + BLOCK - 1) // BLOCK * BLOCK
    return min(N, piece * size), min(N, (piece + 1) * size)


@inner
def _shifted(out, x, o, t, by, positions, n, C):
    """n rows of x [N, C], which begins at x[o], from row t + by on; by < 0 is the past, by > 0 the future. Rows of
    another document read zero."""
    for r in range(n):
        late, row = t + r + max(by, 0), t + r + by
        if late < positions.size and positions[uintp(late)] >= abs(by):
            copy(out, r * C, x, o + row * C, C)
        else:
            fill(out, r * C, C, ZERO)


@inner
def _norm(h, o, scales, s, x, i, R, normed):
    """What a layer reads of x, and the norm's scale."""
    if normed:
        scales[uintp(s)] = norm(h, o, x, i, R)
    else:
        copy(h, o, x, i, R)


@inner
def _gate(gates, sigmoids, i, sums, a, R):
    """gates[i : i + R] = tanh of the R sums that begin at a, times the sigmoid of the R after them, which is kept."""
    for k in range(R):
        e = exp(-TWO * clamp(sums[uintp(a + k)], np.float32(10)))
        sigmoid = ONE / (ONE + exp(-clamp(sums[uintp(a + R + k)], np.float32(40))))
        gates[uintp(i + k)] = (ONE - e) / (ONE + e) * sigmoid
        sigmoids[uintp(i + k)] = sigmoid


@inner
def _gate_back(d_sums, a, dz, d, gates, sigmoids, i, R):
    """The gradient of `_gate`: of the 2 R sums that begin at a."""
    for k in range(R):
        change, sigmoid, gate = dz[uintp(d + k)], sigmoids[uintp(i + k)], gates[uintp(i + k)]
        tanh = gate / sigmoid
        d_sums[uintp(a + k)] = change * sigmoid * (ONE - tanh * tanh)
        d_sums[uintp(a + R + k)] = change * gate * (ONE - sigmoid)


def wavenet_forward(
    piece, pieces, flags, way, positions, dilations, taps, normed, dilated, gate_bias, residual, residual_bias, skip,
    skip_bias, x, h, scales, gates, sigmoids, skips,
):  # fmt: skip
    """One piece of the forward pass, all arrays flat. L layers, R residual and S skip channels, K taps.

    positions int64 [N]; dilations [L]; weights [inputs, outputs], as `_packed` gives them: dilated [L, K, R, 2 R],
    residual [L - 1, R, R], skip [L, R, S]. In: x [N, R], overwritten. Out: h [L, N, R], scales [L, N], gates and
    sigmoids [L, N, R], skips [N, S], whose rows begin `apart`.
    """
    N, L = positions.size, dilations.size
    if N == 0:
        return
    R, S = x.size // N, skip_bias.size
    Ss, (begin, end) = _apart(S), _own(piece, pieces, N)
    sums, past = np.empty(BLOCK * 2 * R, np.float32), np.empty(BLOCK * R, np.float32)
    for t in range(begin, end):
        _norm(h, t * R, scales, t, x, t * R, R, normed)
        copy(skips, t * Ss, skip_bias, 0, S)
    for layer in range(L):
        if not meet(flags, piece, pieces, layer + 1, way):
            return
        first = layer * N * R
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for r in range(n):
                copy(sums, r * 2 * R, gate_bias, layer * 2 * R, 2 * R)
            for tap in range(taps):
                back, w = (taps - 1 - tap) * dilations[layer], (layer * taps + tap) * R * 2 * R
                if back == 0:
                    packed_product(sums, 0, 2 * R, h, first + t * R, R, 1, dilated, w, n, 2 * R, R)
                else:
                    _shifted(past, h, first, t, -back, positions, n, R)
                    packed_product(sums, 0, 2 * R, past, 0, R, 1, dilated, w, n, 2 * R, R)
            for r in range(n):
                _gate(gates, sigmoids, first + (t + r) * R, sums, r * 2 * R, R)
            packed_product(skips, t * Ss, Ss, gates, first + t * R, R, 1, skip, layer * R * S, n, S, R)
            if layer + 1 < L:
                for r in range(n):
                    add(x, (t + r) * R, residual_bias, layer * R, R)
                packed_product(x, t * R, R, gates, first + t * R, R, 1, residual, layer * R * R, n, R, R)
                for r in range(t, t + n):
                    _norm(h, first + (N + r) * R, scales, (layer + 1) * N + r, x, r * R, R, normed)


def wavenet_backward(
    piece, pieces, flags, way, positions, dilations, taps, normed, dilated, residual, skip, h, scales, gates, sigmoids,
    d_skips, dx, d_sums, d_dilated, d_gate_bias, d_residual, d_residual_bias, d_skip,
):  # fmt: skip
    """One piece of the backward pass, all arrays flat, from the gradient with respect to the skips.

    Weights [outputs, inputs], as `_packed` gives them: dilated [L, K, 2 R, R], residual [L - 1, R, R], skip [L, S, R].
    In: d_skips [N, S], whose rows begin `apart`. Added to, zeros at first: dx [N, R] and, for each piece, the weights'
    gradients, as PyTorch's weights lie: d_dilated [L, 2 R, K R], d_gate_bias [L, 2 R], d_residual [L - 1, R, R],
    d_residual_bias [L - 1, R], d_skip [S, L R]. Scratch: d_sums [2, N, 2 R], of which one half may still be read by
    others when the next layer fills the other.
    """
    N, L = positions.size, dilations.size
    if N == 0:
        return
    R, S, Ss = dx.size // N, skip.size // (L * (dx.size // N)), d_skips.size // N
    begin, end = _own(piece, pieces, N)
    dz, dh, past = np.empty(BLOCK * R, np.float32), np.empty(BLOCK * R, np.float32), np.empty(BLOCK * R, np.float32)
    future = np.empty(BLOCK * 2 * R, np.float32)
    for layer in range(L - 1, -1, -1):
        first, sums = layer * N * R, layer % 2 * N * 2 * R
        own, own_residual = piece * L + layer, piece * (L - 1) + layer
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            z = first + t * R
            fill(dz, 0, n * R, ZERO)
            packed_product(dz, 0, R, d_skips, t * Ss, Ss, 1, skip, layer * S * R, n, R, S)
            product(d_skip, (piece * S * L + layer) * R, L * R, d_skips, t * Ss, 1, Ss, gates, z, R, S, R, n)
            if layer + 1 < L:
                packed_product(dz, 0, R, dx, t * R, R, 1, residual, layer * R * R, n, R, R)
                product(d_residual, own_residual * R * R, R, dx, t * R, 1, R, gates, z, R, R, R, n)
                for r in range(t, t + n):
                    add(d_residual_bias, own_residual * R, dx, r * R, R)
            for r in range(n):
                _gate_back(d_sums, sums + (t + r) * 2 * R, dz, r * R, gates, sigmoids, first + (t + r) * R, R)
            for r in range(t, t + n):
                add(d_gate_bias, own * 2 * R, d_sums, sums + r * 2 * R, 2 * R)
            for tap in range(taps):
                back, w, d = (taps - 1 - tap) * dilations[layer], own * 2 * R * taps * R + tap * R, sums + t * 2 * R
                if back == 0:
                    product(d_dilated, w, taps * R, d_sums, d, 1, 2 * R, h, first + t * R, R, 2 * R, R, n)
                else:
                    _shifted(past, h, first, t, -back, positions, n, R)
                    product(d_dilated, w, taps * R, d_sums, d, 1, 2 * R, past, 0, R, 2 * R, R, n)
        if not meet(flags, piece, pieces, L - layer, way):
            return
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            fill(dh, 0, n * R, ZERO)
            for tap in range(taps):
                back, w = (taps - 1 - tap) * dilations[layer], (layer * taps + tap) * 2 * R * R
                if back == 0:
                    packed_product(dh, 0, R, d_sums, sums + t * 2 * R, 2 * R, 1, dilated, w, n, R, 2 * R)
                else:
                    _shifted(future, d_sums, sums, t, back, positions, n, 2 * R)
                    packed_product(dh, 0, R, future, 0, 2 * R, 1, dilated, w, n, R, 2 * R)
            for r in range(n):
                if normed:
                    s, scale = first + (t + r) * R, scales[uintp(layer * N + t + r)]
                    norm_back(dx, (t + r) * R, dh, r * R, h, s, scale, R)
                else:
                    add(dx, (t + r) * R, dh, r * R, R)


_forward, _backward = (Compiled(function, [__file__]) for function in (wavenet_forward, wavenet_backward))


def _packed(matrices: Tensor) -> Tensor:
    """Matrices [..., K, N] as `vectors.pack` puts each."""
    return matrices.unflatten(-1, (-1, COLUMNS)).transpose(-3, -2).contiguous()


class _Layers(torch.autograd.Function):
    """All layers, to the sum of their skips. x [B, T, R] -> [B, T, S]"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, dilated: Tensor, gate_bias: Tensor, residual: Tensor,
        residual_bias: Tensor, skip: Tensor, skip_bias: Tensor, dilations: NDArray[np.int64], taps: int, normed: bool,
        pieces: Pieces,
    ) -> Tensor:  # fmt: skip
        (B, T, R), L, S = x.shape, len(dilations), len(skip)
        h, scales, gates, sigmoids = (torch.empty(L, B * T, width) for width in (R, 1, R, R))
        skips = torch.empty(B, T, apart(S))
        inputs_first = dilated.unflatten(2, (taps, R)).permute(0, 2, 3, 1)
        pieces.run(
            _forward, positions, dilations, taps, normed, _packed(inputs_first), gate_bias, _packed(residual.mT),
            residual_bias, _packed(skip.T.unflatten(0, (L, R))), skip_bias, x.clone(), h, scales, gates, sigmoids,
            skips,
        )  # fmt: skip
        ctx.save_for_backward(positions, dilated, residual, skip, h, scales, gates, sigmoids)
        ctx.others = dilations, taps, normed, pieces
        return skips[..., :S]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        positions, dilated, residual, skip, h, scales, gates, sigmoids = ctx.saved_tensors
        dilations, taps, normed, pieces = ctx.others
        (B, T), (_, N, R) = positions.shape, h.shape
        d_skips = torch.empty(B, T, apart(len(skip)))
        d_skips[..., : len(skip)] = gradients[0]
        outputs_first = dilated.unflatten(2, (taps, R)).transpose(1, 2)
        dx, d_sums = torch.zeros(B, T, R), torch.empty(2, N, 2 * R)
        shapes = dilated.shape, dilated.shape[:2], residual.shape, residual.shape[:2], skip.shape
        sums = [torch.zeros(pieces.count, *shape) for shape in shapes]
        pieces.run(
            _backward, positions, dilations, taps, normed, _packed(outputs_first), _packed(residual),
            _packed(skip.unflatten(1, (-1, R)).transpose(0, 1)), h, scales, gates, sigmoids, d_skips, dx, d_sums, *sums,
        )  # fmt: skip
        d_weights = (each.sum(0) for each in sums)
        return dx, None, *d_weights, gradients[0].sum((0, 1)), None, None, None, None


def build(core: nn.Module, pieces: Pieces, on_event: OnEvent) -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor]:
    """What `fast.Backward` says, for a core that fits. Raises what numba raises where it cannot compile."""
    assert isinstance(core, WaveNet)
    layers = core.layers
    dilations = np.array(core.config.all_dilations)
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
    taps, normed = core.config.kernel, core.config.norm == "rmsnorm"
    pieces.load(
        on_event, *((f, (none, none, taps, normed, *[nothing] * n)) for f, n in ((_forward, 12), (_backward, 15)))
    )

    def backward(ids: Tensor, targets: Tensor, positions: Tensor | None, count: int) -> Tensor:
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
        skips = _Layers.apply(
            core.entry(core.table(ids)),
            positions.contiguous(),
            torch.stack([layer.dilated.weight for layer in layers]),
            torch.stack([layer.dilated.bias for layer in layers]),
            torch.stack([layer.residual.weight for layer in layers[:-1]]),
            torch.stack([layer.residual.bias for layer in layers[:-1]]),
            core.skip.weight,
            core.skip.bias,
            dilations,
            taps,
            normed,
            pieces,
        )
        loss = cross_entropy(core._head(skips), targets)
        (loss / max(1, count)).backward()
        return loss.detach()

    return backward
