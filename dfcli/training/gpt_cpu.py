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


@inner
def _whole(n):
    """n rounded up to whole columns of a product."""
    return (n + COLUMNS - 1) // COLUMNS * COLUMNS


def gpt_forward(
    piece, pieces, flags, way, positions, T, heads, cos, sin, qkv_weight, projection, expansion, contraction,
    x, h1, scale1, qkv, qk_scales, shares, y, h2, scale2, r, out, out_scale,
):  # fmt: skip
    """One piece of the forward pass, all arrays flat. N = B T positions, L blocks, C channels, H heads of D.

    positions int64 [N]: how far each is from its document's start; cos, sin [T, D / 2]; weights as [inputs, outputs]:
    qkv_weight [L, C, 3 C], projection [L, C, C], expansion [L, C, 4 C], contraction [L, 4 C, C].
    In: x [N, C], overwritten. Out: the norms' outputs and scales h1 [L, N, C], scale1 [L, N], h2, scale2, out [N, C],
    out_scale [N]; qkv [L, N, 3 C], queries and keys normed and turned; qk_scales [L, N, 2 H]; attention's shares
    [L, N, H, T in whole columns]; its output y [L, N, C]; r = relu of the MLP's inside [L, N, 4 C].
    """
    N = positions.size
    if N == 0:
        return
    C, Tp, F = x.size // N, _whole(T), 4 * (x.size // N)
    L, D, B = h1.size // x.size, x.size // N // heads, N // T
    keys, inside = np.zeros(heads * D * Tp, np.float32), np.empty(BLOCK * F, np.float32)
    factor = np.float32(1 / np.sqrt(D))
    for b in range(piece * B // pieces, (piece + 1) * B // pieces):
        for layer in range(L):
            first = layer * N + b * T  # of the sequence's positions, in what is kept of all layers
            for t0 in range(0, T, BLOCK):
                n = min(BLOCK, T - t0)
                row, at = first + t0, b * T + t0
                for t in range(n):
                    scale1[uintp(row + t)] = norm(h1, (row + t) * C, x, (at + t) * C, C)
                fill(qkv, row * 3 * C, n * 3 * C, ZERO)
                product(qkv, row * 3 * C, 3 * C, h1, row * C, C, 1, qkv_weight, layer * 3 * C * C, 3 * C, n, 3 * C, C)
                for t in range(n):
                    for part in range(2 * heads):
                        i = (row + t) * 3 * C + part * D
                        qk_scales[uintp((row + t) * 2 * heads + part)] = norm(qkv, i, qkv, i, D)
                        rotate(qkv, i, D, cos, sin, (t0 + t) * (D // 2), ONE)
                for head in range(heads):
                    k = row * 3 * C + C + head * D
                    _transposed(keys, head * D * Tp + t0, Tp, qkv, k, 3 * C, n, D)
                fill(y, row * C, n * C, ZERO)
                for head in range(heads):
                    for q0 in range(t0, t0 + n, QUERIES):
                        m = min(QUERIES, t0 + n - q0)
                        many, s = q0 + m, ((first + q0) * heads + head) * Tp
                        for t in range(m):
                            fill(shares, s + t * heads * Tp, Tp, ZERO)
                        q = (first + q0) * 3 * C + head * D
                        product(shares, s, heads * Tp, qkv, q, 3 * C, 1, keys, head * D * Tp, Tp, m, _whole(many), D)
                        for t in range(q0, q0 + m):
                            s = ((first + t) * heads + head) * Tp
                            begin = t - min(t, positions[uintp(b * T + t)])
                            share = ONE / _exp_sum(shares, s + begin, t + 1 - begin, factor)
                            fill(shares, s, begin, ZERO)
                            for k in range(begin, t + 1):
                                shares[uintp(s + k)] *= share
                            fill(shares, s + t + 1, Tp - t - 1, ZERO)
                        s, v = ((first + q0) * heads + head) * Tp, first * 3 * C + 2 * C + head * D
                        product(y, (first + q0) * C + head * D, C, shares, s, heads * Tp, 1, qkv, v, 3 * C, m, D, many)
                product(x, at * C, C, y, row * C, C, 1, projection, layer * C * C, C, n, C, C)
                for t in range(n):
                    scale2[uintp(row + t)] = norm(h2, (row + t) * C, x, (at + t) * C, C)
                fill(r, row * F, n * F, ZERO)
                product(r, row * F, F, h2, row * C, C, 1, expansion, layer * C * F, F, n, F, C)
                for i in range(n * F):
                    value = r[uintp(row * F + i)]
                    value = ZERO if value < ZERO else value
                    r[uintp(row * F + i)] = value
                    inside[uintp(i)] = value * value
                product(x, at * C, C, inside, 0, F, 1, contraction, layer * C * F, C, n, C, F)
        for t in range(b * T, (b + 1) * T):
            out_scale[uintp(t)] = norm(out, t * C, x, t * C, C)


def gpt_backward(
    piece, pieces, flags, way, positions, T, heads, cos, sin, qkv_weight, projection, expansion, contraction,
    h1, scale1, qkv, qk_scales, shares, y, h2, scale2, r, out, out_scale,
    d_out, dx, d_qkv_weight, d_projection, d_expansion, d_contraction,
):  # fmt: skip
    """One piece of the backward pass, from the gradient with respect to `out`.

    Weights lie as PyTorch's, [outputs, inputs]. In: d_out [N, C]. Added to, zeros at first: dx [N, C] and, for each
    piece, the weights' gradients.
    """
    N = positions.size
    if N == 0:
        return
    C, Tp, F = dx.size // N, _whole(T), 4 * (dx.size // N)
    L, D, B = h1.size // dx.size, dx.size // N // heads, N // T
    factor = np.float32(1 / np.sqrt(D))
    values, d_qkv, dy = np.zeros(D * Tp, np.float32), np.empty(T * 3 * C, np.float32), np.empty(T * C, np.float32)
    d_inside, inside = np.empty(BLOCK * F, np.float32), np.empty(BLOCK * F, np.float32)
    dh, d_shares = np.empty(BLOCK * C, np.float32), np.empty(QUERIES * Tp, np.float32)
    for b in range(piece * B // pieces, (piece + 1) * B // pieces):
        for t in range(b * T, (b + 1) * T):
            norm_back(dx, t * C, d_out, t * C, out, t * C, out_scale[uintp(t)], C)
        for layer in range(L - 1, -1, -1):
            first, own = layer * N + b * T, piece * L + layer
            fill(dy, 0, T * C, ZERO)
            for t0 in range(0, T, BLOCK):
                n = min(BLOCK, T - t0)
                row, at = first + t0, b * T + t0
                fill(d_inside, 0, n * F, ZERO)
                product(d_inside, 0, F, dx, at * C, C, 1, contraction, layer * C * F, F, n, F, C)
                for i in range(n * F):
                    value = r[uintp(row * F + i)]
                    inside[uintp(i)] = value * value
                    d_inside[uintp(i)] *= TWO * value
                product(d_contraction, own * C * F, F, dx, at * C, 1, C, inside, 0, F, C, F, n)
                product(d_expansion, own * C * F, C, d_inside, 0, 1, F, h2, row * C, C, F, C, n)
                fill(dh, 0, n * C, ZERO)
                product(dh, 0, C, d_inside, 0, F, 1, expansion, layer * C * F, C, n, C, F)
                for t in range(n):
                    scale = scale2[uintp(row + t)]
                    norm_back(dx, (at + t) * C, dh, t * C, h2, (row + t) * C, scale, C)
                product(d_projection, own * C * C, C, dx, at * C, 1, C, y, row * C, C, C, C, n)
                product(dy, t0 * C, C, dx, at * C, C, 1, projection, layer * C * C, C, n, C, C)
            fill(d_qkv, 0, T * 3 * C, ZERO)
            for head in range(heads):
                q, k, v = head * D, C + head * D, 2 * C + head * D  # within a row of qkv
                _transposed(values, 0, Tp, qkv, first * 3 * C + v, 3 * C, T, D)
                for q0 in range(0, T, QUERIES):
                    m = min(QUERIES, T - q0)
                    many, s = q0 + m, ((first + q0) * heads + head) * Tp
                    fill(d_shares, 0, m * Tp, ZERO)
                    product(d_shares, 0, Tp, dy, q0 * C + q, C, 1, values, 0, Tp, m, _whole(many), D)
                    for t in range(m):
                        share = s + t * heads * Tp
                        mean = dot(d_shares, t * Tp, shares, share, many)
                        for j in range(many):
                            change = d_shares[uintp(t * Tp + j)] - mean
                            d_shares[uintp(t * Tp + j)] = shares[uintp(share + j)] * change * factor
                    query, key = (first + q0) * 3 * C + q, first * 3 * C + k
                    product(d_qkv, q0 * 3 * C + q, 3 * C, d_shares, 0, Tp, 1, qkv, key, 3 * C, m, D, many)
                    product(d_qkv, k, 3 * C, d_shares, 0, 1, Tp, qkv, query, 3 * C, many, D, m)
                    product(d_qkv, v, 3 * C, shares, s, 1, heads * Tp, dy, q0 * C + q, C, many, D, m)
            for t in range(T):
                for part in range(2 * heads):
                    i, j = t * 3 * C + part * D, (first + t) * 3 * C + part * D
                    scale = qk_scales[uintp((first + t) * 2 * heads + part)]
                    mean = dot(d_qkv, i, qkv, j, D) / np.float32(D)
                    for k in range(D):
                        d_qkv[uintp(i + k)] = scale * (d_qkv[uintp(i + k)] - qkv[uintp(j + k)] * mean)
                    rotate(d_qkv, i, D, cos, sin, t * (D // 2), -ONE)
            for t0 in range(0, T, BLOCK):
                n = min(BLOCK, T - t0)
                row, at = first + t0, b * T + t0
                product(d_qkv_weight, own * 3 * C * C, C, d_qkv, t0 * 3 * C, 1, 3 * C, h1, row * C, C, 3 * C, C, n)
                fill(dh, 0, n * C, ZERO)
                product(dh, 0, C, d_qkv, t0 * 3 * C, 3 * C, 1, qkv_weight, layer * 3 * C * C, C, n, C, 3 * C)
                for t in range(n):
                    scale = scale1[uintp(row + t)]
                    norm_back(dx, (at + t) * C, dh, t * C, h1, (row + t) * C, scale, C)


_forward, _backward = (Compiled(function, [__file__]) for function in (gpt_forward, gpt_backward))


class _Blocks(torch.autograd.Function):
    """All blocks and the last norm. x [B, T, C] -> [B, T, C]"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, qkv_weight: Tensor, projection: Tensor,
        expansion: Tensor, contraction: Tensor, heads: int, pieces: Pieces,
    ) -> Tensor:  # fmt: skip
        (B, T, C), L = x.shape, len(qkv_weight)
        N, Tp = B * T, -(-T // COLUMNS) * COLUMNS
        widths = C, 1, 3 * C, 2 * heads, heads * Tp, C, C, 1, 4 * C
        kept = [torch.empty(L, N, width) for width in widths] + [torch.empty(B, T, C), torch.empty(N)]
        weights = qkv_weight, projection, expansion, contraction
        fixed = positions, T, heads, cos, sin
        pieces.run(_forward, *fixed, *(w.mT.contiguous() for w in weights), x.clone(), *kept)
        ctx.save_for_backward(positions, cos, sin, *weights, *kept)
        ctx.others = T, heads, pieces
        return kept[-2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        positions, cos, sin, *saved = ctx.saved_tensors
        T, heads, pieces = ctx.others
        dx = torch.zeros_like(gradients[0], memory_format=torch.contiguous_format)
        sums = [torch.zeros(pieces.count, *weight.shape) for weight in saved[:4]]
        pieces.run(_backward, positions, T, heads, cos, sin, *saved, gradients[0].contiguous(), dx, *sums)
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
