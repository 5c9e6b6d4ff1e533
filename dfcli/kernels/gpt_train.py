"""The default recipe's GPT in training on a CPU: loss and gradients by one compiled function (numba).

With 64 to 128 channels PyTorch's operations are so short that starting them, and taking their results through memory,
takes most of the time. Here a thread takes whole sequences, each forwards and backwards before the next, so that what
is kept between stays in its caches; so no more threads work than a batch has rows. The loss of the core's own `forward`
is the reference: loss and gradients agree to 1e-5 (tests). Gradients of weights are summed in the order of the workers,
so that the same number of threads gives the same bits.

Attention is that of the queries and keys that RMSNorm made, whose scores are at most sqrt(D): exp of them needs no
maximum taken off. Its gradient passes the rotation, which keeps lengths and angles, before that of the norm.

Arrays are flat. C channels, 3 C of queries, keys and values, F = 4 C in the MLP, V ids, T positions. In the arrays that
belong to a sequence, and in transposed ones, rows lie `row_stride` floats apart: Cs, Qs, Fs, Vs, Ts.
Weights, gradients, attention's shares, and what is given and returned, have no such gaps.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy import uintp
from torch import Tensor, nn

from dfcli.cores.gpt import GPT, GPTConfig, NGrams
from dfcli.cores.protocols import Pass
from dfcli.kernels.compile import Compiled, inner, unsupported_cpu
from dfcli.kernels.gemm import COLUMNS, pack, panel_product, prefetch, product, round_up, row_stride, transposed
from dfcli.kernels.ops import (
    ONE,
    TWO,
    ZERO,
    add,
    add_times,
    copy,
    cross_entropy,
    dot,
    exp_sum,
    fill,
    norm,
    norm_back,
    rotate,
)
from dfcli.kernels.threads import WorkerPool, barrier
from dfcli.system.events import OnEvent

WIDEST = 128  # channels: PyTorch's products of wider ones are faster than ours
LONGEST = 512  # positions: the attention weights are kept, T x T for each head
MOST_TABLES = 7  # a GPT has no more: for 2 to 8 ids
BLOCK = 64  # positions of the products with weights
QUERIES = 16  # positions of attention: of a block of queries all keys up to its last are multiplied

_row_stride, _round_up = inner(row_stride), inner(round_up)


@inner
def _both(forwards, back, weights, begin, layer, outputs, inputs):
    """A layer's weight, [outputs, inputs] among all of its kind, packed for both ways."""
    o = layer * outputs * inputs
    pack(forwards, o, weights, begin + o, 1, inputs, inputs, outputs)
    pack(back, o, weights, begin + o, inputs, 1, outputs, inputs)


@inner
def _embed(stream, Cs, first, C, T, V, ids, positions, weights, many, sizes, tables, noise, rows):
    """The tokens' embeddings and those of n-grams (`cores.gpt.NGrams`) of the sequence that begins at `first`."""
    N = ids.size
    for t in range(T):
        n = first + t
        back, number = min(t, positions[uintp(n)]), ids[uintp(n)]
        for k in range(many):
            number = number * V + (ids[uintp(n - 1 - k)] if back > k else 0)
            row = number % sizes[uintp(k)]
            rows[uintp(k * N + n)] = row
            prefetch(tables[k], row * C, C)
    for t in range(T):
        n = first + t
        copy(stream, t * Cs, weights, ids[uintp(n)] * C, C)
        for k in range(many):
            factor = noise[uintp(k * N + n)] if noise.size else ONE
            add_times(stream, t * Cs, factor, tables[k], rows[uintp(k * N + n)] * C, C)


@inner
def _table_gradients(k, N, C, rows, noise, dx, places, counts, found, grads):
    """Of table k the rows that were read, in order and each once, with their gradients."""
    for n in range(N):
        places[uintp(k * N + n)] = rows[uintp(k * N + n)] * N + n
    places[k * N : (k + 1) * N].sort()
    count, last = k * N, -1
    for j in range(k * N, (k + 1) * N):
        row = places[uintp(j)] // N
        n = places[uintp(j)] - row * N
        if row != last:
            found[uintp(count)], last = row, row
            fill(grads, count * C, C, ZERO)
            count += 1
        factor = noise[uintp(k * N + n)] if noise.size else ONE
        add_times(grads, (count - 1) * C, factor, dx, n * C, C)
    counts[uintp(k)] = count - k * N


@inner
def _attend(y, shares, qkv, keys, first, q0, T, h, heads, D, positions, start):
    """y of head h and QUERIES queries from q0 on, added; and their shares, which sum to 1 over the keys of their
    document.

    The sequence's rows of qkv, y and shares begin with row `first`, its ids with `start`; keys [heads D, T]."""
    C = heads * D
    Cs, Qs, Ts, Tp = _row_stride(C), _row_stride(3 * C), _row_stride(T), _round_up(T)
    m, factor = min(QUERIES, T - q0), np.float32(1 / np.sqrt(D))
    many = q0 + m  # keys
    query, value = (first + q0) * Qs + h * D, first * Qs + 2 * C + h * D
    begin = ((first + q0) * heads + h) * Tp
    for t in range(m):
        fill(shares, begin + t * heads * Tp, Tp, ZERO)
    product(shares, begin, heads * Tp, qkv, query, Qs, 1, keys, h * D * Ts, Ts, m, _round_up(many), D)
    for t in range(m):
        s, last = begin + t * heads * Tp, q0 + t
        earliest = last - min(last, positions[uintp(start + last)])
        one = ONE / exp_sum(shares, s + earliest, last + 1 - earliest, factor, ZERO)
        fill(shares, s, earliest, ZERO)
        for k in range(earliest, last + 1):
            shares[uintp(s + k)] *= one
        fill(shares, s + last + 1, Tp - last - 1, ZERO)
    product(y, (first + q0) * Cs + h * D, Cs, shares, begin, heads * Tp, 1, qkv, value, Qs, m, D, many)


@inner
def _attend_back(d_qkv, dy, d_shares, shares, qkv, values, first, q0, T, h, heads, D):
    """The gradient of `_attend`, added to that of its queries, keys and values. values [D, T] of head h; d_shares is
    for use here."""
    C = heads * D
    Cs, Qs, Ts, Tp = _row_stride(C), _row_stride(3 * C), _row_stride(T), _round_up(T)
    m, factor = min(QUERIES, T - q0), np.float32(1 / np.sqrt(D))
    many = q0 + m  # keys
    q, k, v = h * D, C + h * D, 2 * C + h * D  # within a row of qkv
    begin = ((first + q0) * heads + h) * Tp
    fill(d_shares, 0, m * Ts, ZERO)
    product(d_shares, 0, Ts, dy, q0 * Cs + q, Cs, 1, values, 0, Ts, m, _round_up(many), D)
    for t in range(m):
        s = begin + t * heads * Tp
        mean = dot(d_shares, t * Ts, shares, s, many)
        for j in range(many):
            change = d_shares[uintp(t * Ts + j)] - mean
            d_shares[uintp(t * Ts + j)] = shares[uintp(s + j)] * change * factor
    product(d_qkv, q0 * Qs + q, Qs, d_shares, 0, Ts, 1, qkv, first * Qs + k, Qs, m, D, many)
    product(d_qkv, k, Qs, d_shares, 0, 1, Ts, qkv, (first + q0) * Qs + q, Qs, many, D, m)
    product(d_qkv, v, Qs, shares, begin, 1, heads * Tp, dy, q0 * Cs + q, Cs, many, D, m)


def gpt_step(
    worker, workers, flags, yielder, ids, targets, positions, T, V, L, heads, cos, sin, weights, many, sizes, tables,
    noise, per_target, nats, grads, dx, rows, places, counts, found, row_grads,
):  # fmt: skip
    """One worker's loss and gradients. N = B T positions, L blocks, C channels, H heads of D, K = `many` n-gram tables.

    ids, targets (negative: not scored), positions (how far each is from its document's start) int64 [N]; cos, sin
    [T, D / 2]; weights, as PyTorch's: tokens [V, C], head [V, C], then of all blocks queries, keys and values
    [L, 3 C, C], projection [L, C, C], expansion [L, 4 C, C], contraction [L, C, 4 C]. Tables: a tuple of MOST_TABLES
    arrays, of `sizes` int64 [K] rows; noise [K, N]: what dropout multiplies n-grams by, or nothing.

    Out: nats float64 [workers], the cross-entropy summed over the targets of each worker; the gradients of
    `per_target` times it: grads [workers, weights], the first row (the others are for use here); of each table how many
    rows were read (counts int64 [K]), which (found int64 [K, N]), and theirs (row_grads [K, N, C]). dx [N, C], and rows
    and places int64 [K, N], are for use here.
    """
    N, B = ids.size, ids.size // T
    if N == 0:
        return
    C = dx.size // N
    D, F, Tp, Vp = C // heads, 4 * C, _round_up(T), _round_up(V)
    Cs, Qs, Fs, Vs, Ts = _row_stride(C), _row_stride(3 * C), _row_stride(F), _row_stride(V), _row_stride(T)
    # Where each kind of weight begins, among the weights and, after `mine`, among the gradients.
    W_head, W_qkv = V * C, 2 * V * C
    W_projection = W_qkv + L * 3 * C * C
    W_expansion = W_projection + L * C * C
    W_contraction = W_expansion + L * F * C
    total = W_contraction + L * C * F
    mine = worker * total
    nats[uintp(worker)] = 0
    fill(grads, mine, total, ZERO)
    # The weights as products take them: forwards [inputs, outputs], backwards [outputs, inputs].
    head, head_back = np.zeros(C * Vp, np.float32), np.empty(V * C, np.float32)
    qkv_weight, qkv_back = np.empty(L * 3 * C * C, np.float32), np.empty(L * 3 * C * C, np.float32)
    projection, projection_back = np.empty(L * C * C, np.float32), np.empty(L * C * C, np.float32)
    expansion, expansion_back = np.empty(L * C * F, np.float32), np.empty(L * C * F, np.float32)
    contraction, contraction_back = np.empty(L * C * F, np.float32), np.empty(L * C * F, np.float32)
    pack(head, 0, weights, W_head, 1, C, C, V)
    pack(head_back, 0, weights, W_head, C, 1, V, C)
    for layer in range(L):
        _both(qkv_weight, qkv_back, weights, W_qkv, layer, 3 * C, C)
        _both(projection, projection_back, weights, W_projection, layer, C, C)
        _both(expansion, expansion_back, weights, W_expansion, layer, F, C)
        _both(contraction, contraction_back, weights, W_contraction, layer, C, F)
    # What is kept of a sequence, for the way back: outputs and scales of the norms, queries and keys normed and turned,
    # attention's shares [L, T, H, Tp], its output, relu of the MLP's inside.
    h1, scale1, h2, scale2 = (np.empty(L * T * Cs, np.float32), np.empty(L * T, np.float32),
                              np.empty(L * T * Cs, np.float32), np.empty(L * T, np.float32))  # fmt: skip
    qkv, qk_scales = np.empty(L * T * Qs, np.float32), np.empty(L * T * 2 * heads, np.float32)
    shares, y, r = (
        np.empty(L * T * heads * Tp, np.float32),
        np.empty(L * T * Cs, np.float32),
        np.empty(L * T * Fs, np.float32),
    )
    out, out_scale, logits = np.empty(T * Cs, np.float32), np.empty(T, np.float32), np.empty(BLOCK * Vs, np.float32)
    stream, dy, d_qkv = np.empty(T * Cs, np.float32), np.empty(T * Cs, np.float32), np.empty(T * Qs, np.float32)
    d_inside, inside, dh = (
        np.empty(BLOCK * Fs, np.float32),
        np.empty(BLOCK * Fs, np.float32),
        np.empty(BLOCK * Cs, np.float32),
    )
    keys, values, d_shares = (
        np.zeros(heads * D * Ts, np.float32),
        np.zeros(D * Ts, np.float32),
        np.empty(QUERIES * Ts, np.float32),
    )
    for b in range(worker * B // workers, (worker + 1) * B // workers):
        _embed(stream, Cs, b * T, C, T, V, ids, positions, weights, many, sizes, tables, noise, rows)
        for layer in range(L):
            first = layer * T
            for t0 in range(0, T, BLOCK):
                n, row, at = min(BLOCK, T - t0), first + t0, t0 * Cs
                for t in range(n):
                    scale1[uintp(row + t)] = norm(h1, (row + t) * Cs, stream, at + t * Cs, C)
                fill(qkv, row * Qs, n * Qs, ZERO)
                panel_product(qkv, row * Qs, Qs, h1, row * Cs, Cs, qkv_weight, layer * 3 * C * C, n, 3 * C, C)
                for t in range(n):
                    for part in range(2 * heads):
                        i = (row + t) * Qs + part * D
                        qk_scales[uintp((row + t) * 2 * heads + part)] = norm(qkv, i, qkv, i, D)
                        rotate(qkv, i, D, cos, sin, (t0 + t) * (D // 2), ONE)
                for h in range(heads):
                    transposed(keys, h * D * Ts + t0, Ts, qkv, row * Qs + C + h * D, Qs, n, D)
                fill(y, row * Cs, n * Cs, ZERO)
                for h in range(heads):
                    for q0 in range(t0, t0 + n, QUERIES):
                        _attend(y, shares, qkv, keys, first, q0, T, h, heads, D, positions, b * T)
                panel_product(stream, at, Cs, y, row * Cs, Cs, projection, layer * C * C, n, C, C)
                for t in range(n):
                    scale2[uintp(row + t)] = norm(h2, (row + t) * Cs, stream, at + t * Cs, C)
                fill(inside, 0, n * Fs, ZERO)
                panel_product(inside, 0, Fs, h2, row * Cs, Cs, expansion, layer * C * F, n, F, C)
                for i in range(n * Fs):
                    value = inside[uintp(i)]
                    value = ZERO if value < ZERO else value
                    r[uintp(row * Fs + i)] = value
                    inside[uintp(i)] = value * value
                panel_product(stream, at, Cs, inside, 0, Fs, contraction, layer * C * F, n, C, F)
        # The head and the loss; from here on `stream` is the gradient with respect to the residual stream.
        for t0 in range(0, T, BLOCK):
            n, at = min(BLOCK, T - t0), t0 * Cs
            for t in range(n):
                out_scale[uintp(t0 + t)] = norm(out, at + t * Cs, stream, at + t * Cs, C)
            fill(logits, 0, n * Vs, ZERO)
            panel_product(logits, 0, Vs, out, at, Cs, head, 0, n, Vp, C)
            for t in range(n):
                target, i = targets[uintp(b * T + t0 + t)], t * Vs
                if target < 0:
                    fill(logits, i, V, ZERO)
                    continue
                nats[uintp(worker)] += cross_entropy(logits, i, V, target, per_target)
            product(grads, mine + W_head, C, logits, 0, 1, Vs, out, at, Cs, V, C, n)
            fill(dh, 0, n * Cs, ZERO)
            panel_product(dh, 0, Cs, logits, 0, Vs, head_back, 0, n, C, V)
            fill(stream, at, n * Cs, ZERO)
            for t in range(n):
                norm_back(stream, at + t * Cs, dh, t * Cs, out, at + t * Cs, out_scale[uintp(t0 + t)], C)
        for layer in range(L - 1, -1, -1):
            first = layer * T
            fill(dy, 0, T * Cs, ZERO)
            for t0 in range(0, T, BLOCK):
                n, row, at = min(BLOCK, T - t0), first + t0, t0 * Cs
                fill(d_inside, 0, n * Fs, ZERO)
                panel_product(d_inside, 0, Fs, stream, at, Cs, contraction_back, layer * C * F, n, F, C)
                for i in range(n * Fs):
                    value = r[uintp(row * Fs + i)]
                    inside[uintp(i)] = value * value
                    d_inside[uintp(i)] *= TWO * value
                own = mine + W_contraction + layer * C * F
                product(grads, own, F, stream, at, 1, Cs, inside, 0, Fs, C, F, n)
                own = mine + W_expansion + layer * F * C
                product(grads, own, C, d_inside, 0, 1, Fs, h2, row * Cs, Cs, F, C, n)
                fill(dh, 0, n * Cs, ZERO)
                panel_product(dh, 0, Cs, d_inside, 0, Fs, expansion_back, layer * C * F, n, C, F)
                for t in range(n):
                    norm_back(stream, at + t * Cs, dh, t * Cs, h2, (row + t) * Cs, scale2[uintp(row + t)], C)
                own = mine + W_projection + layer * C * C
                product(grads, own, C, stream, at, 1, Cs, y, row * Cs, Cs, C, C, n)
                panel_product(dy, at, Cs, stream, at, Cs, projection_back, layer * C * C, n, C, C)
            fill(d_qkv, 0, T * Qs, ZERO)
            for h in range(heads):
                transposed(values, 0, Ts, qkv, first * Qs + 2 * C + h * D, Qs, T, D)
                for q0 in range(0, T, QUERIES):
                    _attend_back(d_qkv, dy, d_shares, shares, qkv, values, first, q0, T, h, heads, D)
            for t in range(T):
                for part in range(2 * heads):
                    i, j = t * Qs + part * D, (first + t) * Qs + part * D
                    scale = qk_scales[uintp((first + t) * 2 * heads + part)]
                    mean = dot(d_qkv, i, qkv, j, D) / np.float32(D)
                    for k in range(D):
                        d_qkv[uintp(i + k)] = scale * (d_qkv[uintp(i + k)] - qkv[uintp(j + k)] * mean)
                    rotate(d_qkv, i, D, cos, sin, t * (D // 2), -ONE)
            for t0 in range(0, T, BLOCK):
                n, row, at = min(BLOCK, T - t0), first + t0, t0 * Cs
                own = mine + W_qkv + layer * 3 * C * C
                product(grads, own, C, d_qkv, t0 * Qs, 1, Qs, h1, row * Cs, Cs, 3 * C, C, n)
                fill(dh, 0, n * Cs, ZERO)
                panel_product(dh, 0, Cs, d_qkv, t0 * Qs, Qs, qkv_back, layer * 3 * C * C, n, C, 3 * C)
                for t in range(n):
                    norm_back(stream, at + t * Cs, dh, t * Cs, h1, (row + t) * Cs, scale1[uintp(row + t)], C)
        for t in range(T):
            add(grads, mine + ids[uintp(b * T + t)] * C, stream, t * Cs, C)
            copy(dx, (b * T + t) * C, stream, t * Cs, C)
    if not barrier(flags, worker, workers, 1, yielder):
        return
    begin, end = worker * total // workers, (worker + 1) * total // workers
    for other in range(1, workers):
        add(grads, begin, grads, other * total + begin, end - begin)
    for k in range(worker, many, workers):
        _table_gradients(k, N, C, rows, noise, dx, places, counts, found, row_grads)


_step = Compiled(gpt_step, [__file__])


def _noise(ngrams: NGrams, ids: Tensor) -> Tensor:
    """What dropout multiplies the n-grams of ids [B, T] by: [tables, B, T, 1], or nothing where there is none."""
    if not (ngrams.training and ngrams.dropout.p):
        return torch.empty(0)
    return torch.stack([ngrams.dropout(torch.ones(*ids.shape, 1)) for _ in ngrams.tables])


def supports(c: GPTConfig) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    if (c.position, c.norm, c.activation, c.qk_norm) != ("rotary", "rmsnorm", "relu2", True):
        return "the GPT kernel needs rotary positions, RMSNorm, QK-norm and squared ReLU"
    if c.bias or c.qkv_bias or c.head_bias or c.tied_head:
        return "the GPT kernel has no biases and no tied head"
    if c.dropout:
        return "the GPT kernel has no dropout; a step takes two to three times as long as with `--set dropout=0`"
    if c.channels // c.heads % COLUMNS:
        return f"the GPT kernel needs a multiple of {COLUMNS} channels a head"
    if c.channels > WIDEST or c.context > LONGEST:
        return f"the GPT kernel is for at most {WIDEST} channels and a context of {LONGEST}; beyond, PyTorch is faster"
    return unsupported_cpu()


def build(core: nn.Module, workers: WorkerPool, on_event: OnEvent) -> Pass:
    """The pass of a core that `supports` accepts. Raises what numba raises where it cannot compile."""
    assert isinstance(core, GPT)
    c, blocks, C = core.config, core.blocks, core.config.channels
    embeddings = list(core.ngrams.tables) if c.ngrams > 1 else []
    tables = [table.weight for table in embeddings]
    dense = [
        core.tokens.weight,
        core.head.weight,
        *(block.attention.qkv.weight for block in blocks),
        *(block.attention.projection.weight for block in blocks),
        *(block.mlp.expansion.weight for block in blocks),
        *(block.mlp.projection.weight for block in blocks),
    ]
    many, places = len(tables), [p.numel() for p in dense]
    sizes = np.array([len(table) for table in tables], np.int64)
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
    ids = (none, none, none, 1, 1, 1, 1)
    inputs = (nothing, nothing, nothing, 0, none, (nothing,) * MOST_TABLES, nothing)
    outputs = (np.zeros(0), nothing, nothing, none, none, none, none, nothing)
    workers.load(on_event, (_step, (*ids, *inputs, ZERO, *outputs)))

    @torch.no_grad()
    def backward(
        ids: Tensor, targets: Tensor, positions: Tensor | None, condition: None, count: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        (B, T), N = ids.shape, ids.numel()
        positions = torch.arange(T).expand(B, T) if positions is None else positions
        noise = _noise(core.ngrams, ids) if tables else torch.empty(0)
        several = min(workers.count, B)
        nats, grads = torch.empty(several, dtype=torch.float64), torch.empty(several, sum(places))
        dx, row_grads, counts = torch.empty(N, C), torch.empty(many, N, C), torch.empty(many, dtype=torch.int64)
        rows, sorted_rows, found = torch.empty(3, many, N, dtype=torch.int64)
        workers.run(
            _step, ids.contiguous(), targets.contiguous(), positions.contiguous(), T, c.vocab_size, c.layers, c.heads,
            core.cos[:T], core.sin[:T], torch.cat([p.view(-1) for p in dense]), many, sizes,
            (*tables, *[torch.empty(0)] * (MOST_TABLES - many)), noise,
            np.float32(1 / max(1, count)), nats, grads, dx, rows, sorted_rows, counts, found, row_grads, count=several,
        )  # fmt: skip
        found_grads = [(p, grad.view(p.shape)) for p, grad in zip(dense, grads[0].split(places), strict=True)]
        for table, n, read, grad in zip(embeddings, counts.tolist(), found, row_grads, strict=True):
            p, read, grad = table.weight, read[:n], grad[:n]
            if table.sparse:
                grad = torch.sparse_coo_tensor(read[None], grad, p.shape, is_coalesced=True, check_invariants=False)
            else:
                grad = torch.zeros_like(p).index_copy_(0, read, grad)
            found_grads.append((p, grad))
        return nats.sum().float(), found_grads

    return backward
