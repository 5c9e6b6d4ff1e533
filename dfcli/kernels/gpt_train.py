"""GPT in training on a CPU: loss and gradients by one compiled function.

In small models PyTorch's operations are so short that starting them, and taking their results through memory, takes
most of the time. Here a thread takes whole sequences, each forward and backward before the next, so that what is
kept between stays in its caches. The core's own `forward` is the reference: loss and gradients agree to 1e-5;
with products in bfloat16 they are as close as PyTorch's autocast (tests).

Sequences are divided into groups, each with gradients of its own that are summed in the order of the groups. So the
same number of threads gives the same bits, whichever thread takes a group.

A norm's gain and bias are multiplied into the linear layer behind it (`_Linears`), so that norms here have none.
Dropout is a hash of the step's seed and the element's number (`dropped`).

Arrays are flat. C channels, 3 C of queries, keys and values, F = 4 C in the MLP, V ids, T positions. In the arrays that
belong to a sequence, and in transposed ones, rows lie `row_stride` floats apart: Cs, Qs, Fs, Vs, Ts.
Weights, gradients, attention weights, and what is given and returned, have no such gaps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import uintp
from torch import Tensor, nn

from dfcli.cores.gpt import GPT, GPTConfig, NGrams, Norm
from dfcli.cores.protocols import Pass
from dfcli.kernels.compile import Compiled, inner, unsupported_cpu
from dfcli.kernels.gemm import (
    AMX,
    COLUMNS,
    SIDE,
    end_rounding,
    linear,
    outer,
    pack,
    pack_pairs,
    prefetch,
    product,
    round_up,
    rounding,
    row_stride,
    transposed,
)
from dfcli.kernels.known import RMS, unknown
from dfcli.kernels.ops import (
    ACTIVATIONS,
    ONE,
    ZERO,
    activate,
    activate_back,
    add,
    add_rows,
    add_times,
    copy,
    cross_entropy,
    dot,
    dropped,
    exp_sum,
    fill,
    largest,
    layer_norm,
    layer_norm_back,
    norm,
    norm_back,
    rotate,
    set_rows,
)
from dfcli.kernels.threads import WorkerPool, barrier, take
from dfcli.system.events import OnEvent

# Channels. In float32 PyTorch is as fast with 192, and a fifth faster with 384; in bfloat16 it is as fast with 512.
WIDEST = {"float32": 128, "bfloat16": 384}
LONGEST = 512  # positions: the attention weights are kept, T x T for each head
MOST_TABLES = 7  # a GPT has no more: for 2 to 8 ids
BLOCK = 128  # positions of the products with weights, which come from memory once a block
QUERIES = 16  # positions of attention: of a block of queries all keys up to its last are multiplied


class _Shape(NamedTuple):
    """Sizes and kinds."""

    T: int
    V: int
    L: int
    H: int
    C: int
    biased: bool  # whether any layer has a bias, or a norm, which becomes one
    rms: bool  # RMSNorm, otherwise LayerNorm
    qk_norm: bool
    rotary: bool
    activation: int  # its place in ACTIVATIONS
    dropout: float
    embedding_dropout: float
    seed: int  # of dropout
    bfloat16: bool  # products with weights, and of their gradients; else all are in float32


class _Places(NamedTuple):
    """Where each kind begins among the flat weights, and among a group's gradients. As PyTorch's, of all layers."""

    tokens: int  # [V, C]
    head: int  # [V, C]
    head_bias: int  # [V]
    qkv: int  # [L, 3 C, C]
    qkv_bias: int  # [L, 3 C]
    projection: int  # [L, C, C]
    projection_bias: int  # [L, C]
    expansion: int  # [L, F, C]
    expansion_bias: int  # [L, F]
    contraction: int  # [L, C, F]
    contraction_bias: int  # [L, C]
    total: int


class _Batch(NamedTuple):
    """N = B T positions, and what every worker reads."""

    ids: Any  # int64 [N]
    targets: Any  # int64 [N], negative: not scored
    positions: Any  # int64 [N]: how far each is from its document's start
    per_target: Any  # float32: what the gradients are multiplied by
    weights: Any  # [total]
    learned: Any  # [context, C]: position embeddings, or nothing
    cos: Any  # [T, D / 2], or nothing
    sin: Any


class _Tables(NamedTuple):
    """The n-gram tables, K of them, and their gradients: which rows were read, in order and each once."""

    tables: Any  # a tuple of MOST_TABLES arrays
    sizes: Any  # int64 [K]: rows of each
    noise: Any  # [K, N]: what dropout multiplies n-grams by, or nothing
    rows: Any  # int64 [K, N]: scratch
    places: Any  # int64 [K, N]: scratch
    counts: Any  # int64 [K]: out, how many rows were read
    found: Any  # int64 [K, N]: out, which
    grads: Any  # [K, N, C]: out, theirs


class _Out(NamedTuple):
    nats: Any  # float64 [groups]: the cross-entropy, summed
    grads: Any  # [groups, total]: the sum is in the first
    dx: Any  # [N, C]: with respect to the embeddings


class _Panels(NamedTuple):
    """The weights as products take them: forward [inputs, outputs], back [outputs, inputs]."""

    head: Any
    head_back: Any
    qkv: Any
    qkv_back: Any
    projection: Any
    projection_back: Any
    expansion: Any
    expansion_back: Any
    contraction: Any
    contraction_back: Any


class _Kept(NamedTuple):
    """What the backward pass needs of one sequence."""

    h1: Any  # [L, T, Cs]: outputs of the norms before attention, and scales
    scale1: Any  # [L, T]
    h2: Any  # [L, T, Cs]: before the MLP
    scale2: Any
    qkv: Any  # [L, T, Qs]: queries and keys normed and turned
    qk_scales: Any  # [L, T, 2 H]
    attention: Any  # [L, T, H, Tp]: attention weights
    y: Any  # [L, T, Cs]: attention's output
    inside: Any  # [L, T, Fs]: in the MLP, before the activation
    out: Any  # [T, Cs]: of the last norm
    out_scale: Any


class _Scratch(NamedTuple):
    rounding: Any
    stream: Any  # [T, Cs]: the residual stream, then the gradient with respect to it
    branch: Any  # [BLOCK, Cs]: what a branch adds to it, and its gradient
    dy: Any  # [T, Cs]
    d_qkv: Any  # [T, Qs]
    active: Any  # [BLOCK, Fs]
    d_inside: Any  # [BLOCK, Fs]
    dh: Any  # [BLOCK, Cs]
    logits: Any  # [BLOCK, Vs]
    keys: Any  # [H D, Ts]
    values: Any  # [D, Ts]
    d_attention: Any  # [QUERIES, Ts]
    dropped: Any  # [QUERIES, Ts]


# ---- memory of a worker


@inner
def _both(rounding, forward, back, batch, begin, layer, outputs, inputs):
    """A layer's weight, [outputs, inputs] among all of its kind, packed both ways."""
    o = layer * outputs * inputs
    if rounding.on:
        pack_pairs(rounding, forward.view(np.uint32), o, batch.weights, begin + o, 1, inputs, inputs, outputs)
        pack_pairs(rounding, back.view(np.uint32), o, batch.weights, begin + o, inputs, 1, outputs, inputs)
    else:
        pack(forward, o, batch.weights, begin + o, 1, inputs, inputs, outputs)
        pack(back, o, batch.weights, begin + o, inputs, 1, outputs, inputs)


@inner
def _panels(s, at, batch, rounding):
    C, F, L = s.C, 4 * s.C, s.L

    def matrices(outputs, inputs):
        return np.empty(L * outputs * inputs, np.float32)

    panels = _Panels(
        np.zeros(C * round_up(s.V), np.float32), np.empty(round_up(s.V) * C, np.float32),
        matrices(3 * C, C), matrices(3 * C, C), matrices(C, C), matrices(C, C),
        matrices(F, C), matrices(F, C), matrices(C, F), matrices(C, F),
    )  # fmt: skip
    _both(rounding, panels.head, panels.head_back, batch, at.head, 0, s.V, C)
    for layer in range(L):
        _both(rounding, panels.qkv, panels.qkv_back, batch, at.qkv, layer, 3 * C, C)
        _both(rounding, panels.projection, panels.projection_back, batch, at.projection, layer, C, C)
        _both(rounding, panels.expansion, panels.expansion_back, batch, at.expansion, layer, F, C)
        _both(rounding, panels.contraction, panels.contraction_back, batch, at.contraction, layer, C, F)
    return panels


@inner
def _kept(s):
    rows, Cs, Qs, Fs = s.L * s.T, row_stride(s.C), row_stride(3 * s.C), row_stride(4 * s.C)

    def floats(size):
        return np.empty(size, np.float32)

    return _Kept(
        floats(rows * Cs), floats(rows), floats(rows * Cs), floats(rows), floats(rows * Qs), floats(rows * 2 * s.H),
        floats(rows * s.H * round_up(s.T)), floats(rows * Cs), floats(rows * Fs), floats(s.T * Cs), floats(s.T),
    )  # fmt: skip


@inner
def _scratch(s, rounding):
    Cs, Qs, Fs, Ts = row_stride(s.C), row_stride(3 * s.C), row_stride(4 * s.C), row_stride(s.T)

    def floats(size):
        return np.zeros(size, np.float32)

    return _Scratch(
        rounding, floats(s.T * Cs), floats(BLOCK * Cs), floats(s.T * Cs), floats(s.T * Qs), floats(BLOCK * Fs),
        floats(BLOCK * Fs), floats(BLOCK * Cs), floats(BLOCK * row_stride(s.V)), floats(s.C * Ts),
        floats(s.C // s.H * Ts), floats(QUERIES * Ts), floats(QUERIES * Ts),
    )  # fmt: skip


# ---- operations


@inner
def _norms(s, out, o, scales, row, x, i, n):
    """The norm of n rows: out[o:] and x[i:], of rows Cs apart, and their scales[row:]."""
    Cs = row_stride(s.C)
    for t in range(n):
        if s.rms:
            scales[uintp(row + t)] = norm(out, o + t * Cs, x, i + t * Cs, s.C)
        else:
            scales[uintp(row + t)] = layer_norm(out, o + t * Cs, x, i + t * Cs, s.C)


@inner
def _norms_back(s, dx, d, dy, y, i, scales, row, n):
    """The gradient of `_norms`, added to dx[d:], from dy[0:] and what the norms gave y[i:]."""
    Cs = row_stride(s.C)
    for t in range(n):
        if s.rms:
            norm_back(dx, d + t * Cs, dy, t * Cs, y, i + t * Cs, scales[uintp(row + t)], s.C)
        else:
            layer_norm_back(dx, d + t * Cs, dy, t * Cs, y, i + t * Cs, scales[uintp(row + t)], s.C)


@inner
def _drop_rows(s, out, o, x, i, n, number, stream, p):
    """Dropout of n rows of C, Cs apart, that belong to the positions `number`, ... of the batch."""
    Cs = row_stride(s.C)
    for t in range(n):
        dropped(out, o + t * Cs, x, i + t * Cs, s.C, s.seed, stream, (number + t) * s.C, p)


@inner
def _branch(s, work, layer, kind, b, t0, n, weights, bias, x, i, panels):
    """stream += dropout(x[i:] times a layer's weights + bias), for n positions from t0 on: the end of a branch."""
    C, Cs, stream, branch = s.C, row_stride(s.C), work.stream, work.branch
    inputs = panels.size // (s.L * C)
    if s.dropout == 0:
        for t in range(n if s.biased else 0):
            add(stream, (t0 + t) * Cs, weights, bias + layer * C, C)
        linear(work.rounding, stream, t0 * Cs, Cs, x, i, row_stride(inputs), panels, layer * C * inputs, (n, C, inputs))
        return
    set_rows(branch, 0, Cs, weights, bias + layer * C, n, C)
    linear(work.rounding, branch, 0, Cs, x, i, row_stride(inputs), panels, layer * C * inputs, (n, C, inputs))
    _drop_rows(s, branch, 0, branch, 0, n, b * s.T + t0, 3 * layer + kind, s.dropout)
    for t in range(n):
        add(stream, (t0 + t) * Cs, branch, t * Cs, C)


@inner
def _branch_back(s, work, layer, kind, b, t0, n):
    """The gradient with respect to what `_branch` multiplies: an array and the place of its n rows."""
    if s.dropout == 0:
        return work.stream, t0 * row_stride(s.C)
    number = b * s.T + t0
    _drop_rows(s, work.branch, 0, work.stream, t0 * row_stride(s.C), n, number, 3 * layer + kind, s.dropout)
    return work.branch, 0


@inner
def _bias_gradient(s, grads, place, x, i, x_row, n, width):
    """The gradient of a layer's bias, added, from that of its n outputs."""
    if s.biased:
        add_rows(grads, place, x, i, x_row, n, width)


@inner
def _embed(s, b, batch, tables, stream):
    """The embeddings of sequence b's tokens, positions and n-grams (`cores.gpt.NGrams`)."""
    N, C, K, Cs = batch.ids.size, s.C, tables.sizes.size, row_stride(s.C)
    ids, positions, noise, rows = batch.ids, batch.positions, tables.noise, tables.rows
    for n in range(b * s.T, (b + 1) * s.T):
        back, number = min(n - b * s.T, positions[uintp(n)]), ids[uintp(n)]
        for k in range(K):
            number = number * s.V + (ids[uintp(n - 1 - k)] if back > k else 0)
            row = number % tables.sizes[uintp(k)]
            rows[uintp(k * N + n)] = row
            prefetch(tables.tables[k], row * C, C)
    for t in range(s.T):
        n = b * s.T + t
        copy(stream, t * Cs, batch.weights, ids[uintp(n)] * C, C)
        if not s.rotary:
            add(stream, t * Cs, batch.learned, positions[uintp(n)] * C, C)
        for k in range(K):
            factor = noise[uintp(k * N + n)] if noise.size else ONE
            add_times(stream, t * Cs, factor, tables.tables[k], rows[uintp(k * N + n)] * C, C)
    if s.embedding_dropout > 0:
        _drop_rows(s, stream, 0, stream, 0, s.T, b * s.T, 0, s.embedding_dropout)


@inner
def _embed_back(s, at, b, batch, out, own, stream):
    """The gradients of the tokens' embeddings, at out.grads[own:], and out.dx."""
    Cs = row_stride(s.C)
    if s.embedding_dropout > 0:
        _drop_rows(s, stream, 0, stream, 0, s.T, b * s.T, 0, s.embedding_dropout)
    for t in range(s.T):
        n = b * s.T + t
        add(out.grads, own + at.tokens + batch.ids[uintp(n)] * s.C, stream, t * Cs, s.C)
        copy(out.dx, n * s.C, stream, t * Cs, s.C)


@inner
def _table_gradients(k, C, dx, tables):
    """Of table k the rows that were read, in order and each once, with their gradients."""
    rows, places, noise, grads = tables.rows, tables.places, tables.noise, tables.grads
    N = dx.size // C
    for n in range(N):
        places[uintp(k * N + n)] = rows[uintp(k * N + n)] * N + n
    places[k * N : (k + 1) * N].sort()
    count, last = k * N, -1
    for j in range(k * N, (k + 1) * N):
        row = places[uintp(j)] // N
        n = places[uintp(j)] - row * N
        if row != last:
            tables.found[uintp(count)], last = row, row
            fill(grads, count * C, C, ZERO)
            count += 1
        factor = noise[uintp(k * N + n)] if noise.size else ONE
        add_times(grads, (count - 1) * C, factor, dx, n * C, C)
    tables.counts[uintp(k)] = count - k * N


@inner
def _attend(s, b, layer, h, q0, batch, kept, work):
    """Attention of head h and QUERIES queries from q0 on, added to kept.y; and the attention weights, which sum to 1
    over the keys of their document. work.keys [C, T]."""
    C, T, H, D = s.C, s.T, s.H, s.C // s.H
    Cs, Qs, Ts, Tp = row_stride(C), row_stride(3 * C), row_stride(T), round_up(T)
    attention, qkv, positions = kept.attention, kept.qkv, batch.positions
    m, factor = min(QUERIES, T - q0), np.float32(1 / np.sqrt(D))
    count, row, first = q0 + m, H * Tp, layer * T  # keys from `low` to `count` are seen
    low = (q0 - min(q0, positions[uintp(b * T + q0)])) // COLUMNS * COLUMNS
    begin, query, value = ((first + q0) * H + h) * Tp, (first + q0) * Qs + h * D, first * Qs + 2 * C + h * D
    for t in range(m):
        fill(attention, begin + t * row, Tp, ZERO)
    keys = h * D * Ts + low
    product(attention, begin + low, row, qkv, query, Qs, 1, work.keys, keys, Ts, (m, round_up(count) - low, D))
    for t in range(m):
        i, last = begin + t * row, q0 + t
        earliest = last - min(last, positions[uintp(b * T + last)])
        n = last + 1 - earliest
        # Scores of normed queries and keys are at most sqrt(D): exp of them needs no maximum taken off.
        most = ZERO if s.qk_norm else largest(attention, i + earliest, n)
        one = ONE / exp_sum(attention, i + earliest, n, factor, most)
        fill(attention, i, earliest, ZERO)
        for k in range(earliest, last + 1):
            attention[uintp(i + k)] *= one
        fill(attention, i + last + 1, Tp - last - 1, ZERO)
    y = (first + q0) * Cs + h * D
    if s.dropout > 0:
        _drop_attention(s, b, layer, h, q0, work.dropped, Ts, attention, begin, row)
        product(kept.y, y, Cs, work.dropped, low, Ts, 1, qkv, value + low * Qs, Qs, (m, D, count - low))
    else:
        product(kept.y, y, Cs, attention, begin + low, row, 1, qkv, value + low * Qs, Qs, (m, D, count - low))


@inner
def _drop_attention(s, b, layer, h, q0, out, o_row, x, i, x_row):
    """Dropout of the attention weights of QUERIES queries, or of their gradients."""
    m = min(QUERIES, s.T - q0)
    for t in range(m):
        first = ((b * s.T + q0 + t) * s.H + h) * s.T
        dropped(out, t * o_row, x, i + t * x_row, q0 + m, s.seed, 3 * layer + 1, first, s.dropout)


@inner
def _attend_back(s, b, layer, h, q0, batch, kept, work):
    """The gradient of `_attend`, added to that of its queries, keys and values. work.values [D, T] of head h."""
    C, T, H, D = s.C, s.T, s.H, s.C // s.H
    Cs, Qs, Ts, Tp = row_stride(C), row_stride(3 * C), row_stride(T), round_up(T)
    attention, qkv, dy, d_qkv, change = kept.attention, kept.qkv, work.dy, work.d_qkv, work.d_attention
    m, factor = min(QUERIES, T - q0), np.float32(1 / np.sqrt(D))
    count, row, first = q0 + m, H * Tp, layer * T
    low = (q0 - min(q0, batch.positions[uintp(b * T + q0)])) // COLUMNS * COLUMNS
    q, k, v = h * D, C + h * D, 2 * C + h * D  # within a row of qkv
    begin = ((first + q0) * H + h) * Tp
    fill(change, 0, m * Ts, ZERO)
    product(change, low, Ts, dy, q0 * Cs + q, Cs, 1, work.values, low, Ts, (m, round_up(count) - low, D))
    if s.dropout > 0:
        _drop_attention(s, b, layer, h, q0, change, Ts, change, 0, Ts)
        _drop_attention(s, b, layer, h, q0, work.dropped, Ts, attention, begin, row)
        product(d_qkv, low * Qs + v, Qs, work.dropped, low, 1, Ts, dy, q0 * Cs + q, Cs, (count - low, D, m))
    else:
        product(d_qkv, low * Qs + v, Qs, attention, begin + low, 1, row, dy, q0 * Cs + q, Cs, (count - low, D, m))
    for t in range(m):
        i = begin + t * row
        mean = dot(change, t * Ts + low, attention, i + low, count - low)
        for j in range(low, count):
            change[uintp(t * Ts + j)] = attention[uintp(i + j)] * (change[uintp(t * Ts + j)] - mean) * factor
    product(d_qkv, q0 * Qs + q, Qs, change, low, Ts, 1, qkv, (first + low) * Qs + k, Qs, (m, D, count - low))
    product(d_qkv, low * Qs + k, Qs, change, low, 1, Ts, qkv, (first + q0) * Qs + q, Qs, (count - low, D, m))


@inner
def _place_queries(s, layer, t0, n, batch, kept):
    """Norm and turn the queries and keys of n positions."""
    D, Qs = s.C // s.H, row_stride(3 * s.C)
    qkv, scales, cos, sin = kept.qkv, kept.qk_scales, batch.cos, batch.sin
    for t in range(t0, t0 + n):
        for part in range(2 * s.H):
            i = (layer * s.T + t) * Qs + part * D
            if s.qk_norm:
                scales[uintp((layer * s.T + t) * 2 * s.H + part)] = norm(qkv, i, qkv, i, D)
            if s.rotary:
                rotate(qkv, i, D, cos, sin, t * (D // 2) % cos.size, ONE)


@inner
def _place_queries_back(s, layer, batch, kept, d_qkv):
    """The gradient of `_place_queries`, in place. That of the norm first: a rotation keeps lengths and angles."""
    D, Qs = s.C // s.H, row_stride(3 * s.C)
    qkv, scales, cos, sin = kept.qkv, kept.qk_scales, batch.cos, batch.sin
    for t in range(s.T):
        for part in range(2 * s.H):
            i, j = t * Qs + part * D, (layer * s.T + t) * Qs + part * D
            if s.qk_norm:
                scale = scales[uintp((layer * s.T + t) * 2 * s.H + part)]
                mean = dot(d_qkv, i, qkv, j, D) / np.float32(D)
                for k in range(D):
                    d_qkv[uintp(i + k)] = scale * (d_qkv[uintp(i + k)] - qkv[uintp(j + k)] * mean)
            if s.rotary:
                rotate(d_qkv, i, D, cos, sin, t * (D // 2) % cos.size, -ONE)


# ---- layers


@inner
def _attention(s, at, b, layer, batch, panels, kept, work):
    """stream + dropout(attention(norm(stream)))"""
    C, T, D = s.C, s.T, s.C // s.H
    Cs, Qs, Ts, first = row_stride(C), row_stride(3 * C), row_stride(T), layer * T
    stream, weights = work.stream, batch.weights
    for t0 in range(0, T, BLOCK):
        n, row = min(BLOCK, T - t0), first + t0
        _norms(s, kept.h1, row * Cs, kept.scale1, row, stream, t0 * Cs, n)
        set_rows(kept.qkv, row * Qs, Qs, weights, at.qkv_bias + layer * 3 * C, n, 3 * C)
        linear(
            work.rounding, kept.qkv, row * Qs, Qs, kept.h1, row * Cs, Cs, panels.qkv, layer * 3 * C * C, (n, 3 * C, C)
        )
        _place_queries(s, layer, t0, n, batch, kept)
        fill(kept.y, row * Cs, n * Cs, ZERO)
        for h in range(s.H):
            transposed(work.keys, h * D * Ts + t0, Ts, kept.qkv, row * Qs + C + h * D, Qs, n, D)
            for q0 in range(t0, t0 + n, QUERIES):
                _attend(s, b, layer, h, q0, batch, kept, work)
        _branch(s, work, layer, 2, b, t0, n, weights, at.projection_bias, kept.y, row * Cs, panels.projection)


@inner
def _attention_back(s, at, b, layer, batch, panels, kept, work, grads, own):
    """The gradient of `_attention`: of its weights at grads[own:], and work.stream."""
    C, T, D = s.C, s.T, s.C // s.H
    Cs, Qs, Ts, first = row_stride(C), row_stride(3 * C), row_stride(T), layer * T
    stream, dh, dy, d_qkv = work.stream, work.dh, work.dy, work.d_qkv
    fill(dy, 0, T * Cs, ZERO)
    for t0 in range(0, T, BLOCK):
        n, row = min(BLOCK, T - t0), first + t0
        branch, i = _branch_back(s, work, layer, 2, b, t0, n)
        _bias_gradient(s, grads, own + at.projection_bias + layer * C, branch, i, Cs, n, C)
        place = own + at.projection + layer * C * C
        outer(work.rounding, grads, place, C, branch, i, Cs, kept.y, row * Cs, Cs, (C, C, n))
        linear(work.rounding, dy, t0 * Cs, Cs, branch, i, Cs, panels.projection_back, layer * C * C, (n, C, C))
    fill(d_qkv, 0, T * Qs, ZERO)
    for h in range(s.H):
        transposed(work.values, 0, Ts, kept.qkv, first * Qs + 2 * C + h * D, Qs, T, D)
        for q0 in range(0, T, QUERIES):
            _attend_back(s, b, layer, h, q0, batch, kept, work)
    _place_queries_back(s, layer, batch, kept, d_qkv)
    for t0 in range(0, T, BLOCK):
        n, row = min(BLOCK, T - t0), first + t0
        _bias_gradient(s, grads, own + at.qkv_bias + layer * 3 * C, d_qkv, t0 * Qs, Qs, n, 3 * C)
        place = own + at.qkv + layer * 3 * C * C
        outer(work.rounding, grads, place, C, d_qkv, t0 * Qs, Qs, kept.h1, row * Cs, Cs, (3 * C, C, n))
        fill(dh, 0, n * Cs, ZERO)
        linear(work.rounding, dh, 0, Cs, d_qkv, t0 * Qs, Qs, panels.qkv_back, layer * 3 * C * C, (n, C, 3 * C))
        _norms_back(s, stream, t0 * Cs, dh, kept.h1, row * Cs, kept.scale1, row, n)


@inner
def _mlp(s, at, b, layer, batch, panels, kept, work):
    """stream + dropout(mlp(norm(stream)))"""
    C, F, T, Cs, Fs = s.C, 4 * s.C, s.T, row_stride(s.C), row_stride(4 * s.C)
    weights = batch.weights
    for t0 in range(0, T, BLOCK):
        n, row = min(BLOCK, T - t0), layer * T + t0
        _norms(s, kept.h2, row * Cs, kept.scale2, row, work.stream, t0 * Cs, n)
        set_rows(kept.inside, row * Fs, Fs, weights, at.expansion_bias + layer * F, n, F)
        linear(
            work.rounding, kept.inside, row * Fs, Fs, kept.h2, row * Cs, Cs, panels.expansion, layer * C * F, (n, F, C)
        )
        for t in range(n):
            activate(work.active, t * Fs, kept.inside, (row + t) * Fs, F, s.activation)
        _branch(s, work, layer, 3, b, t0, n, weights, at.contraction_bias, work.active, 0, panels.contraction)


@inner
def _mlp_back(s, at, b, layer, panels, kept, work, grads, own):
    """The gradient of `_mlp`: of its weights at grads[own:], and work.stream."""
    C, F, T, Cs, Fs = s.C, 4 * s.C, s.T, row_stride(s.C), row_stride(4 * s.C)
    stream, active, d_inside, dh = work.stream, work.active, work.d_inside, work.dh
    for t0 in range(0, T, BLOCK):
        n, row = min(BLOCK, T - t0), layer * T + t0
        branch, i = _branch_back(s, work, layer, 3, b, t0, n)
        _bias_gradient(s, grads, own + at.contraction_bias + layer * C, branch, i, Cs, n, C)
        fill(d_inside, 0, n * Fs, ZERO)
        linear(work.rounding, d_inside, 0, Fs, branch, i, Cs, panels.contraction_back, layer * C * F, (n, F, C))
        for t in range(n):
            activate_back(d_inside, t * Fs, active, t * Fs, kept.inside, (row + t) * Fs, F, s.activation)
        place = own + at.contraction + layer * C * F
        outer(work.rounding, grads, place, F, branch, i, Cs, active, 0, Fs, (C, F, n))
        _bias_gradient(s, grads, own + at.expansion_bias + layer * F, d_inside, 0, Fs, n, F)
        place = own + at.expansion + layer * F * C
        outer(work.rounding, grads, place, C, d_inside, 0, Fs, kept.h2, row * Cs, Cs, (F, C, n))
        fill(dh, 0, n * Cs, ZERO)
        linear(work.rounding, dh, 0, Cs, d_inside, 0, Fs, panels.expansion_back, layer * C * F, (n, C, F))
        _norms_back(s, stream, t0 * Cs, dh, kept.h2, row * Cs, kept.scale2, row, n)


@inner
def _head(s, at, b, batch, panels, kept, work, grads, own):
    """The last norm, the head and the loss, forward and backward: the cross-entropy in nats. From here on work.stream
    is the gradient with respect to the residual stream."""
    C, V, T, Cs, Vs = s.C, s.V, s.T, row_stride(s.C), row_stride(s.V)
    out, logits, stream, dh, nats = kept.out, work.logits, work.stream, work.dh, 0.0
    for t0 in range(0, T, BLOCK):
        n, i = min(BLOCK, T - t0), t0 * Cs
        _norms(s, out, i, kept.out_scale, t0, stream, i, n)
        fill(logits, 0, n * Vs, ZERO)
        set_rows(logits, 0, Vs, batch.weights, at.head_bias, n, V)
        linear(work.rounding, logits, 0, Vs, out, i, Cs, panels.head, 0, (n, round_up(V), C))
        for t in range(n):
            target = batch.targets[uintp(b * T + t0 + t)]
            if target < 0:
                fill(logits, t * Vs, V, ZERO)
            else:
                nats += cross_entropy(logits, t * Vs, V, target, batch.per_target)
        _bias_gradient(s, grads, own + at.head_bias, logits, 0, Vs, n, V)
        outer(work.rounding, grads, own + at.head, C, logits, 0, Vs, out, i, Cs, (V, C, n))
        fill(dh, 0, n * Cs, ZERO)
        linear(work.rounding, dh, 0, Cs, logits, 0, Vs, panels.head_back, 0, (n, C, V))
        fill(stream, i, n * Cs, ZERO)
        _norms_back(s, stream, i, dh, out, i, kept.out_scale, t0, n)
    return nats


def gpt_step(worker, workers, flags, yielder, s, at, batch, tables, out):
    """One worker's loss and gradients: see the NamedTuples above."""
    N, groups, total = batch.ids.size, out.nats.size, at.total
    if N == 0:
        return
    B, grads = N // s.T, out.grads
    rounded = rounding(s.bfloat16, BLOCK, max(4 * s.C, s.V))
    panels, kept, work = _panels(s, at, batch, rounded), _kept(s), _scratch(s, rounded)
    group = take(flags, workers, 0)
    while group < groups:
        own, nats = group * total, 0.0
        fill(grads, own, total, ZERO)
        for b in range(group * B // groups, (group + 1) * B // groups):
            _embed(s, b, batch, tables, work.stream)
            for layer in range(s.L):
                _attention(s, at, b, layer, batch, panels, kept, work)
                _mlp(s, at, b, layer, batch, panels, kept, work)
            nats += _head(s, at, b, batch, panels, kept, work, grads, own)
            for layer in range(s.L - 1, -1, -1):
                _mlp_back(s, at, b, layer, panels, kept, work, grads, own)
                _attention_back(s, at, b, layer, batch, panels, kept, work, grads, own)
            _embed_back(s, at, b, batch, out, own, work.stream)
        out.nats[uintp(group)] = nats
        group = take(flags, workers, 0)
    end_rounding(rounded)
    if not barrier(flags, worker, workers, 1, yielder):
        return
    begin, end = worker * total // workers, (worker + 1) * total // workers
    for other in range(1, groups):
        add(grads, begin, grads, other * total + begin, end - begin)
    k = take(flags, workers, 1)
    while k < tables.sizes.size:
        _table_gradients(k, s.C, out.dx, tables)
        k = take(flags, workers, 1)


_step = Compiled(gpt_step, [__file__])


def supports(c: GPTConfig, precision: str = "float32") -> str | None:
    """None where `build` takes a model of this config on a CPU of this precision, else the reason, a clause."""
    widest = WIDEST[precision if rounds(c) else "float32"]
    if reason := unknown(c):
        return reason
    if c.channels // c.heads % COLUMNS:
        return f"the GPT kernel needs a multiple of {COLUMNS} channels a head"
    if c.channels > widest or c.context > LONGEST:
        return f"the GPT kernel is for at most {widest} channels and a context of {LONGEST}; beyond, PyTorch is as fast"
    return unsupported_cpu()


def rounds(c: GPTConfig) -> bool:
    """Whether `build` can take products in bfloat16 for a model of this config, on this processor."""
    return AMX and c.channels % SIDE == 0


class _Linears:
    """The linear layers of one kind, [L, outputs, inputs], each with the gain and bias of the norm before it multiplied
    in: W (g x + b) + c = (W g) x + (W b + c)."""

    def __init__(self, linears: list[nn.Linear], norms: list[Norm] | None = None) -> None:
        self.linears = linears
        self.norms: list[Any] = [] if norms is None or norms[0].weight is None else norms
        self.biased = linears[0].bias is not None
        self.shifted = bool(self.norms) and self.norms[0].bias is not None
        self.sizes = [len(linears) * linears[0].weight.numel(), len(linears) * len(linears[0].weight)]

    def fold(self, weights: Tensor, biases: Tensor) -> None:
        """Write the weights and biases of all layers, with the norms' gains and biases multiplied in, to `weights`
        (flat, of [L, outputs, inputs]) and `biases` (flat, of [L, outputs])."""
        L, (outputs, inputs) = len(self.linears), self.linears[0].weight.shape
        weights, biases = weights.view(L, outputs, inputs), biases.view(L, outputs)
        torch.stack([linear.weight for linear in self.linears], out=weights)
        if self.biased:
            torch.stack([linear.bias for linear in self.linears], out=biases)
        else:
            biases.zero_()
        if self.shifted:
            shifts = torch.stack([each.bias for each in self.norms])
            biases += (weights @ shifts[..., None])[..., 0]
        for weight, norm_before in zip(weights, self.norms, strict=False):
            weight *= norm_before.weight

    def gradients(self, weights: Tensor, biases: Tensor) -> list[tuple[Any, Tensor]]:
        """The gradients of the parameters, from those of the folded weights and biases. Overwrites `weights`."""
        L, (outputs, inputs) = len(self.linears), self.linears[0].weight.shape
        weights, biases = weights.view(L, outputs, inputs), biases.view(L, outputs)
        found: list[tuple[Any, Tensor]] = []
        if self.biased:
            found += [(x.bias, grad) for x, grad in zip(self.linears, biases, strict=True)]
        for x, norm_before, grad, bias in zip(self.linears, self.norms, weights, biases, strict=False):
            found.append((norm_before.weight, (grad * x.weight).sum(0)))
            grad *= norm_before.weight
            if norm_before.bias is not None:
                found.append((norm_before.bias, x.weight.T @ bias))
                grad.addr_(bias, norm_before.bias)
        return found + [(x.weight, grad) for x, grad in zip(self.linears, weights, strict=True)]


def _noise(ngrams: NGrams, ids: Tensor) -> Tensor:
    """What dropout multiplies the n-grams of ids [B, T] by: [tables, B, T, 1], or nothing where there is none."""
    if not (ngrams.training and ngrams.dropout.p):
        return torch.empty(0)
    return torch.stack([ngrams.dropout(torch.ones(*ids.shape, 1)) for _ in ngrams.tables])


def _nothing() -> tuple[_Shape, _Places, _Batch, _Tables, _Out]:
    """Arguments that make a step do nothing."""
    none, floats = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return (
        _Shape(1, 1, 1, 1, 16, True, True, True, True, 0, 0.0, 0.0, 0, False),
        _Places(*[0] * 12),
        _Batch(none, none, none, ZERO, floats, floats, floats, floats),
        _Tables((floats,) * MOST_TABLES, none, floats, none, none, none, none, floats),
        _Out(np.zeros(0), floats, floats),
    )


def build(core: nn.Module, workers: WorkerPool, on_event: OnEvent, precision: str = "float32") -> Pass:
    """The pass of a core that `supports` accepts. Raises what numba raises where it cannot compile."""
    assert isinstance(core, GPT)
    training = _Training(core, workers, precision)
    workers.load(on_event, (_step, _nothing()))
    return training.backward


class _Training:
    """A core's parameters in the layout of `gpt_step`, and its gradients back."""

    def __init__(self, core: GPT, workers: WorkerPool, precision: str) -> None:
        self.core, self.workers, blocks = core, workers, core.blocks
        self.bfloat16 = precision == "bfloat16" and rounds(core.config)
        self.rms = RMS[GPTConfig][core.config.norm]
        self.embeddings = list(core.ngrams.tables) if core.config.ngrams > 1 else []
        self.linears = [
            _Linears([core.head], [core.norm]),
            _Linears([x.attention.qkv for x in blocks], [x.attention_norm for x in blocks]),
            _Linears([x.attention.projection for x in blocks]),
            _Linears([x.mlp.expansion for x in blocks], [x.mlp_norm for x in blocks]),
            _Linears([x.mlp.projection for x in blocks]),
        ]
        self.sizes = [core.tokens.weight.numel(), *(size for linear in self.linears for size in linear.sizes)]
        self.places = _Places(*np.cumsum([0, *self.sizes]).tolist())
        self.table_sizes = np.array([len(table.weight) for table in self.embeddings], np.int64)

    def shape(self, T: int) -> _Shape:
        c, training = self.core.config, self.core.training
        p = float(c.dropout) if training else 0.0
        seed = int(torch.randint(2**62, ())) if p else 0
        biased = any(linear.biased or linear.norms for linear in self.linears)
        kinds = biased, self.rms, c.qk_norm, c.position == "rotary", ACTIVATIONS.index(c.activation)
        return _Shape(
            T, c.vocab_size, c.layers, c.heads, c.channels, *kinds, p, p * c.embedding_dropout, seed, self.bfloat16
        )

    def joined(self, B: int, T: int) -> int:
        """How many short sequences are computed as one with several documents, so that the weights are read from memory
        less often: as many as fill a BLOCK, if each thread has one."""
        fits = [n for n in range(1, BLOCK // T + 1) if B % n == 0 and B // n >= min(B, self.workers.count)]
        return max(fits, default=1)

    def tables(self, ids: Tensor) -> _Tables:
        K, N = len(self.embeddings), ids.numel()
        padding = [torch.empty(0)] * (MOST_TABLES - K)
        noise = _noise(self.core.ngrams, ids) if K else torch.empty(0)
        rows, places, found = torch.empty(3, K, N, dtype=torch.int64)
        grads, counts = torch.empty(K, N, self.core.config.channels), torch.empty(K, dtype=torch.int64)
        weights = (*(table.weight for table in self.embeddings), *padding)
        return _Tables(weights, self.table_sizes, noise, rows, places, counts, found, grads)

    @torch.no_grad()
    def backward(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None, condition: None, count: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        core, (B, T), N = self.core, ids.shape, ids.numel()
        starts = (torch.arange(T).expand(B, T) if positions is None else positions).contiguous()
        weights = torch.empty(self.places.total)
        tokens, *parts = weights.split(self.sizes)
        tokens.copy_(core.tokens.weight.view(-1))
        for layers, weight, bias in zip(self.linears, parts[::2], parts[1::2], strict=True):
            layers.fold(weight, bias)
        joined = self.joined(B, T)
        s, tables, nothing = self.shape(joined * T), self.tables(ids), torch.empty(0)
        groups = min(self.workers.count, B // joined)
        out = _Out(
            torch.empty(groups, dtype=torch.float64), torch.empty(groups, self.places.total), torch.empty(N, s.C)
        )
        batch = _Batch(
            ids.contiguous(), targets.contiguous(), starts, np.float32(1 / max(1, count)),
            weights, nothing if s.rotary else core.positions.weight,
            core.cos[:T] if s.rotary else nothing, core.sin[:T] if s.rotary else nothing,
        )  # fmt: skip
        self.workers.run(_step, s, self.places, batch, tables, out, count=groups)
        tokens, *grads = out.grads[0].split(self.sizes)
        found: list[tuple[Tensor, Tensor]] = [(core.tokens.weight, tokens.view(core.tokens.weight.shape))]
        for layers, weight, bias in zip(self.linears, grads[::2], grads[1::2], strict=True):
            found += layers.gradients(weight, bias)
        if not s.rotary:
            table = core.positions.weight
            found.append((table, torch.zeros_like(table).index_add_(0, starts.flatten(), out.dx)))
        return out.nats.sum().float(), found + self.table_gradients(tables)

    def table_gradients(self, tables: _Tables) -> list[tuple[Tensor, Tensor]]:
        """The gradients of the n-gram tables, sparse where the table asks for it."""
        made = []
        for table, n, read, grad in zip(
            self.embeddings, tables.counts.tolist(), tables.found, tables.grads, strict=True
        ):
            p, read, grad = table.weight, read[:n], grad[:n]
            if table.sparse:
                grad = torch.sparse_coo_tensor(read[None], grad, p.shape, is_coalesced=True, check_invariants=False)
            else:
                grad = torch.zeros_like(p).index_copy_(0, read, grad)
            made.append((p, grad))
        return made
