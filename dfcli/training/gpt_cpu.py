"""The default recipe's GPT in training on a CPU: the blocks' forward and backward pass as compiled functions (numba).

With 64 to 128 channels PyTorch's operations are so short that starting them, and taking their results through memory,
takes most of the time. Here a thread takes whole sequences, each through all blocks, `BLOCK` positions at a time, which
stay in the nearest caches; so no more threads work than a batch has rows. Embeddings, head and loss stay PyTorch's. The
core's own `forward` is the reference: logits and gradients agree to 1e-5 (tests). Gradients of weights are summed in
the order of the pieces, so that the same number of threads gives the same bits.

Attention is that of the queries and keys that RMSNorm made, whose scores are at most sqrt(D): exp of them needs no
maximum taken off. Its gradient passes the rotation, which keeps lengths and angles, before that of the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy import uintp
from torch import Tensor, nn

from dfcli.cores.gpt import GPT
from dfcli.system.compiled import Compiled, inner
from dfcli.system.events import OnEvent
from dfcli.system.vectors import (
    COLUMNS,
    ONE,
    TWO,
    ZERO,
    Pieces,
    any_order,
    copy,
    dot,
    exp,
    fill,
    norm,
    norm_back,
    product,
    rotate,
)

BLOCK = 64  # positions of the products with weights
QUERIES = 16  # positions of attention: of a block of queries all keys up to its last are multiplied


@inner
def _transposed(out, o, o_row, x, i, x_row, rows, columns):
    """out[o + c o_row + r] = x[i + r x_row + c]"""
    for r in range(rows):
        for c in range(columns):
            out[uintp(o + c * o_row + r)] = x[uintp(i + r * x_row + c)]


@any_order
def _exp_sum(x, i, n, factor):
    """x[i : i + n] = exp(factor * x), and its sum."""
    total = ZERO
    for k in range(n):
        e = exp(factor * x[uintp(i + k)])
        x[uintp(i + k)] = e
        total += e
    return total


def whole(n):
    """n rounded up to whole columns of a product."""
    return (n + COLUMNS - 1) // COLUMNS * COLUMNS


def apart(width):
    """Floats from the beginning of a row to that of the next, for `width` floats: an odd number of cache lines, so that
    rows lie in all the sets of the nearest cache. Rows of 128 floats would share 8 of its 64 sets."""
    return ((width + COLUMNS - 1) // COLUMNS | 1) * COLUMNS


_whole, _apart = inner(whole), inner(apart)


def gpt_forward(
    piece, pieces, flags, way, positions, T, heads, cos, sin, qkv_weight, projection, expansion, contraction,
    x, h1, scale1, qkv, qk_scales, shares, y, h2, scale2, r, out, out_scale,
):  # fmt: skip
    """One piece of the forward pass, all arrays flat. N = B T positions, L blocks, C channels, H heads of D.

    An array with a star has rows that begin `_apart` from each other.
    positions int64 [N]: how far each is from its document's start; cos, sin [T, D / 2]; weights as [inputs, outputs]:
    qkv_weight* [L, C, 3 C], projection* [L, C, C], expansion* [L, C, 4 C], contraction* [L, 4 C, C].
    In: x [N, C]. Out: the norms' outputs and scales h1* [L, N, C], scale1 [L, N], h2*, scale2, out [N, C],
    out_scale [N]; qkv* [L, N, 3 C], queries and keys normed and turned; qk_scales [L, N, 2 H]; attention's shares
    [L, N, H, T in whole columns]; its output y* [L, N, C]; r* = relu of the MLP's inside [L, N, 4 C].
    """
    N = positions.size
    if N == 0:
        return
    C, F, Tp, L, B = x.size // N, 4 * (x.size // N), _whole(T), scale1.size // N, N // T
    D, Cs, Qs, Fs, Ts = C // heads, _apart(C), _apart(3 * C), _apart(F), _apart(T)
    stream, keys = np.empty(T * Cs, np.float32), np.zeros(heads * D * Ts, np.float32)
    inside = np.empty(BLOCK * Fs, np.float32)
    factor = np.float32(1 / np.sqrt(D))
    for b in range(piece * B // pieces, (piece + 1) * B // pieces):
        for t in range(T):
            copy(stream, t * Cs, x, (b * T + t) * C, C)
        for layer in range(L):
            first = layer * N + b * T  # of the sequence's positions, in what is kept of all layers
            for t0 in range(0, T, BLOCK):
                n, row = min(BLOCK, T - t0), first + t0
                for t in range(n):
                    scale1[uintp(row + t)] = norm(h1, (row + t) * Cs, stream, (t0 + t) * Cs, C)
                fill(qkv, row * Qs, n * Qs, ZERO)
                product(qkv, row * Qs, Qs, h1, row * Cs, Cs, 1, qkv_weight, layer * C * Qs, Qs, n, 3 * C, C)
                for t in range(n):
                    for part in range(2 * heads):
                        i = (row + t) * Qs + part * D
                        qk_scales[uintp((row + t) * 2 * heads + part)] = norm(qkv, i, qkv, i, D)
                        rotate(qkv, i, D, cos, sin, (t0 + t) * (D // 2), ONE)
                for head in range(heads):
                    k = row * Qs + C + head * D
                    _transposed(keys, head * D * Ts + t0, Ts, qkv, k, Qs, n, D)
                fill(y, row * Cs, n * Cs, ZERO)
                for head in range(heads):
                    for q0 in range(t0, t0 + n, QUERIES):
                        m = min(QUERIES, t0 + n - q0)
                        many, s = q0 + m, ((first + q0) * heads + head) * Tp
                        for t in range(m):
                            fill(shares, s + t * heads * Tp, Tp, ZERO)
                        q = (first + q0) * Qs + head * D
                        product(shares, s, heads * Tp, qkv, q, Qs, 1, keys, head * D * Ts, Ts, m, _whole(many), D)
                        for t in range(q0, q0 + m):
                            s = ((first + t) * heads + head) * Tp
                            begin = t - min(t, positions[uintp(b * T + t)])
                            share = ONE / _exp_sum(shares, s + begin, t + 1 - begin, factor)
                            fill(shares, s, begin, ZERO)
                            for k in range(begin, t + 1):
                                shares[uintp(s + k)] *= share
                            fill(shares, s + t + 1, Tp - t - 1, ZERO)
                        s, v = ((first + q0) * heads + head) * Tp, first * Qs + 2 * C + head * D
                        product(y, (first + q0) * Cs + head * D, Cs, shares, s, heads * Tp, 1, qkv, v, Qs, m, D, many)
                product(stream, t0 * Cs, Cs, y, row * Cs, Cs, 1, projection, layer * C * Cs, Cs, n, C, C)
                for t in range(n):
                    scale2[uintp(row + t)] = norm(h2, (row + t) * Cs, stream, (t0 + t) * Cs, C)
                fill(inside, 0, n * Fs, ZERO)
                product(inside, 0, Fs, h2, row * Cs, Cs, 1, expansion, layer * C * Fs, Fs, n, F, C)
                for i in range(n * Fs):
                    value = inside[uintp(i)]
                    value = ZERO if value < ZERO else value
                    r[uintp(row * Fs + i)] = value
                    inside[uintp(i)] = value * value
                product(stream, t0 * Cs, Cs, inside, 0, Fs, 1, contraction, layer * F * Cs, Cs, n, C, F)
        for t in range(T):
            out_scale[uintp(b * T + t)] = norm(out, (b * T + t) * C, stream, t * Cs, C)


def gpt_backward(
    piece, pieces, flags, way, positions, T, heads, cos, sin, qkv_weight, projection, expansion, contraction,
    h1, scale1, qkv, qk_scales, shares, y, h2, scale2, r, out, out_scale,
    d_out, dx, d_qkv_weight, d_projection, d_expansion, d_contraction,
):  # fmt: skip
    """One piece of the backward pass, from the gradient with respect to `out`.

    Weights lie as PyTorch's, [outputs, inputs], with a star. In: d_out [N, C]. Out: dx [N, C]; added to, zeros at
    first: for each piece, the weights' gradients.
    """
    N = positions.size
    if N == 0:
        return
    C, F, Tp, L, B = dx.size // N, 4 * (dx.size // N), _whole(T), scale1.size // N, N // T
    D, Cs, Qs, Fs, Ts = C // heads, _apart(C), _apart(3 * C), _apart(F), _apart(T)
    factor = np.float32(1 / np.sqrt(D))
    stream, dy, d_qkv = np.empty(T * Cs, np.float32), np.empty(T * Cs, np.float32), np.empty(T * Qs, np.float32)
    d_inside, inside = np.empty(BLOCK * Fs, np.float32), np.empty(BLOCK * Fs, np.float32)
    values, d_shares = np.zeros(D * Ts, np.float32), np.empty(QUERIES * Ts, np.float32)
    dh = np.empty(BLOCK * Cs, np.float32)
    for b in range(piece * B // pieces, (piece + 1) * B // pieces):
        fill(stream, 0, T * Cs, ZERO)  # the gradient with respect to what the blocks add to
        for t in range(T):
            i = (b * T + t) * C
            norm_back(stream, t * Cs, d_out, i, out, i, out_scale[uintp(b * T + t)], C)
        for layer in range(L - 1, -1, -1):
            first, own = layer * N + b * T, piece * L + layer
            fill(dy, 0, T * Cs, ZERO)
            for t0 in range(0, T, BLOCK):
                n, row, at = min(BLOCK, T - t0), first + t0, t0 * Cs
                fill(d_inside, 0, n * Fs, ZERO)
                product(d_inside, 0, Fs, stream, at, Cs, 1, contraction, layer * C * Fs, Fs, n, F, C)
                for i in range(n * Fs):
                    value = r[uintp(row * Fs + i)]
                    inside[uintp(i)] = value * value
                    d_inside[uintp(i)] *= TWO * value
                product(d_contraction, own * C * F, F, stream, at, 1, Cs, inside, 0, Fs, C, F, n)
                product(d_expansion, own * C * F, C, d_inside, 0, 1, Fs, h2, row * Cs, Cs, F, C, n)
                fill(dh, 0, n * Cs, ZERO)
                product(dh, 0, Cs, d_inside, 0, Fs, 1, expansion, layer * F * Cs, Cs, n, C, F)
                for t in range(n):
                    norm_back(stream, at + t * Cs, dh, t * Cs, h2, (row + t) * Cs, scale2[uintp(row + t)], C)
                product(d_projection, own * C * C, C, stream, at, 1, Cs, y, row * Cs, Cs, C, C, n)
                product(dy, at, Cs, stream, at, Cs, 1, projection, layer * C * Cs, Cs, n, C, C)
            fill(d_qkv, 0, T * Qs, ZERO)
            for head in range(heads):
                q, k, v = head * D, C + head * D, 2 * C + head * D  # within a row of qkv
                _transposed(values, 0, Ts, qkv, first * Qs + v, Qs, T, D)
                for q0 in range(0, T, QUERIES):
                    m = min(QUERIES, T - q0)
                    many, s = q0 + m, ((first + q0) * heads + head) * Tp
                    fill(d_shares, 0, m * Ts, ZERO)
                    product(d_shares, 0, Ts, dy, q0 * Cs + q, Cs, 1, values, 0, Ts, m, _whole(many), D)
                    for t in range(m):
                        share = s + t * heads * Tp
                        mean = dot(d_shares, t * Ts, shares, share, many)
                        for j in range(many):
                            change = d_shares[uintp(t * Ts + j)] - mean
                            d_shares[uintp(t * Ts + j)] = shares[uintp(share + j)] * change * factor
                    query, key = (first + q0) * Qs + q, first * Qs + k
                    product(d_qkv, q0 * Qs + q, Qs, d_shares, 0, Ts, 1, qkv, key, Qs, m, D, many)
                    product(d_qkv, k, Qs, d_shares, 0, 1, Ts, qkv, query, Qs, many, D, m)
                    product(d_qkv, v, Qs, shares, s, 1, heads * Tp, dy, q0 * Cs + q, Cs, many, D, m)
            for t in range(T):
                for part in range(2 * heads):
                    i, j = t * Qs + part * D, (first + t) * Qs + part * D
                    scale = qk_scales[uintp((first + t) * 2 * heads + part)]
                    mean = dot(d_qkv, i, qkv, j, D) / np.float32(D)
                    for k in range(D):
                        d_qkv[uintp(i + k)] = scale * (d_qkv[uintp(i + k)] - qkv[uintp(j + k)] * mean)
                    rotate(d_qkv, i, D, cos, sin, t * (D // 2), -ONE)
            for t0 in range(0, T, BLOCK):
                n, row = min(BLOCK, T - t0), first + t0
                product(d_qkv_weight, own * 3 * C * C, C, d_qkv, t0 * Qs, 1, Qs, h1, row * Cs, Cs, 3 * C, C, n)
                fill(dh, 0, n * Cs, ZERO)
                product(dh, 0, Cs, d_qkv, t0 * Qs, Qs, 1, qkv_weight, layer * 3 * C * Cs, Cs, n, C, 3 * C)
                for t in range(n):
                    scale = scale1[uintp(row + t)]
                    norm_back(stream, (t0 + t) * Cs, dh, t * Cs, h1, (row + t) * Cs, scale, C)
        for t in range(T):
            copy(dx, (b * T + t) * C, stream, t * Cs, C)


_forward, _backward = (Compiled(function, [__file__]) for function in (gpt_forward, gpt_backward))


def _spread(weights: Tensor) -> Tensor:
    """weights [L, M, N], their rows begin `apart` from each other -> [L, M, apart(N)]"""
    rows = weights.new_empty(*weights.shape[:-1], apart(weights.shape[-1]))
    rows[..., : weights.shape[-1]] = weights
    return rows


class _Blocks(torch.autograd.Function):
    """All blocks and the last norm. x [B, T, C] -> [B, T, C]"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, qkv_weight: Tensor, projection: Tensor,
        expansion: Tensor, contraction: Tensor, heads: int, pieces: Pieces,
    ) -> Tensor:  # fmt: skip
        (B, T, C), L = x.shape, len(qkv_weight)
        N, Tp, Cs = B * T, whole(T), apart(C)
        widths = Cs, 1, apart(3 * C), 2 * heads, heads * Tp, Cs, Cs, 1, apart(4 * C)
        kept = [torch.empty(L, N, width) for width in widths] + [torch.empty(B, T, C), torch.empty(N)]
        weights = qkv_weight, projection, expansion, contraction
        fixed = positions, T, heads, cos, sin
        pieces.run(_forward, *fixed, *(_spread(w.mT) for w in weights), x, *kept)
        ctx.save_for_backward(positions, cos, sin, *weights, *kept)
        ctx.others = T, heads, pieces
        return kept[-2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        positions, cos, sin, *saved = ctx.saved_tensors
        T, heads, pieces = ctx.others
        weights, kept = saved[:4], saved[4:]
        dx = torch.empty(gradients[0].shape)
        sums = [torch.zeros(pieces.count, *weight.shape) for weight in weights]
        spread = map(_spread, weights)
        pieces.run(_backward, positions, T, heads, cos, sin, *spread, *kept, gradients[0].contiguous(), dx, *sums)
        return dx, None, None, None, *(each.sum(0) for each in sums), None, None


def build(core: nn.Module, threads: int, on_event: OnEvent) -> Callable[..., Tensor]:
    """`core.forward`, for a core that fits (see `fast`), by compiled functions on so many threads. Raises what numba
    raises where it cannot compile."""
    assert isinstance(core, GPT)
    pieces, blocks = Pieces(threads), core.blocks
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
    pieces.load(on_event, *((f, (none, 1, 1, *[nothing] * n)) for f, n in ((_forward, 18), (_backward, 23))))

    def forward(ids: Tensor, positions: Tensor | None = None, last_only: bool = False) -> Tensor:
        T = ids.shape[1]
        if last_only:
            return core(ids, positions, last_only)
        x = core._embed(ids, ids[:, :0], positions)
        if positions is None:
            positions = torch.arange(T).expand(ids.shape)
        x = _Blocks.apply(
            x.contiguous(),
            positions.contiguous(),
            core.cos[:T],
            core.sin[:T],
            torch.stack([block.attention.qkv.weight for block in blocks]),
            torch.stack([block.attention.projection.weight for block in blocks]),
            torch.stack([block.mlp.expansion.weight for block in blocks]),
            torch.stack([block.mlp.projection.weight for block in blocks]),
            core.config.heads,
            pieces,
        )
        return core.head(x)

    return forward
