"""WaveNet in training on a CPU: loss and gradients by compiled functions (numba).

With 32 channels the products of a layer take less time than the dozen PyTorch operations around them, which each send
megabytes through memory. Here a layer takes `BLOCK` positions at a time, which stay in the nearest cache from its input
to its output, its part of the skips included, and so does the head, forward and backward. The core's own `forward` is
the reference: loss and gradients agree to 1e-5; with products in bfloat16 they are as close as PyTorch's
autocast (tests).

The N = B T positions are flat, the sequences behind each other, because a position knows how far it is from its
document's start and nothing looks beyond that. They are divided into slots. Where there are at least as many sequences
as threads, a slot is some sequences: a thread takes the next free slot, runs forward, head and backward for it, and
never waits for another thread, so that a busy machine delays only the slot that it interrupts. Where there are fewer
sequences, the slots are one range of positions for each thread, and the threads meet between layers, because a tap may
lie in another thread's range. The weights' gradients are summed in the order of the slots, so that the same number of
threads gives the same bits.

A gate's bias is a row of its own for each run of positions that share a condition row; without conditions a slot is one
run of the layer's own bias. PyTorch makes these rows from biases, labels and series, and takes their gradients back.

Kept for the backward pass, of each layer: its input h (and the norm's scale), its gate z = tanh(a) sigmoid(b), and
sigmoid(b); tanh(a) is their quotient.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import uintp
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores.protocols import Pass
from dfcli.cores.wavenet import Condition, WaveNet, WaveNetConfig
from dfcli.kernels.compile import Compiled, inner, unsupported_cpu
from dfcli.kernels.gemm import (
    AMX,
    COLUMNS,
    PANEL,
    SIDE,
    end_rounding,
    fetch_add,
    linear,
    outer,
    round_up,
    rounding,
    row_stride,
)
from dfcli.kernels.known import RMS, unknown
from dfcli.kernels.ops import ONE, TWO, ZERO, add, clamp, copy, cross_entropy, exp, fill, norm, norm_back, relu
from dfcli.kernels.threads import WorkerPool, barrier
from dfcli.system.events import OnEvent

BLOCK = 128  # positions
SLOTS = 8  # for each thread: many, so that a thread that is held up delays little work
WIDEST = {"float32": 128, "bfloat16": 256}  # residual channels: beyond, PyTorch is faster or was not compared


class Shape(NamedTuple):
    """A model's sizes: L layers, K taps, R residual and S skip channels, H channels in the head, V ids."""

    dilations: NDArray[np.int64]  # [L]
    taps: int
    residual: int
    skip: int
    head: int
    ids: int
    normed: bool
    bfloat16: bool  # the products; else they are in float32


class Matrices(NamedTuple):
    """Weights in panels (`gemm.pack`), [inputs, outputs] for the forward pass and [outputs, inputs] for the backward
    pass; or their gradients, as PyTorch's weights lie: [L, 2 R, K R], [L - 1, R, R], [S, L R], [H, S], [V, H]."""

    dilated: Any  # [L, K] matrices of R and 2 R
    residual: Any  # [L - 1] of R and R
    skip: Any  # [L] of R and S
    head1: Any  # of S and H
    head2: Any  # of H and V


class Biases(NamedTuple):
    """Biases, or their gradients."""

    residual: Any  # [L - 1, R]
    skip: Any  # [S]
    head1: Any  # [H]
    head2: Any  # [V]


class Model(NamedTuple):
    shape: Shape
    table: Any  # [V, R]
    forward: Matrices
    backward: Matrices
    biases: Biases
    gate_rows: Any  # [L, runs, 2 R]


class Batch(NamedTuple):
    """What a pass reads, and the stream that it leaves."""

    ids: Any  # int64 [N]
    targets: Any  # int64 [N]; negative: not scored
    positions: Any  # int64 [N]: how far from the document's start
    runs: Any  # int64 [N]: which of the `gate_rows`
    stream: Any  # [N, R]: the residual path, then the gradient of the embedded ids
    bounds: Any  # int64 [slots + 1]: where the slots begin
    next_slot: Any  # int64 [1]: the first that no thread has taken
    together: bool  # whether all threads share the sequences and meet between layers
    per_target: Any  # what the gradient of one target's loss is multiplied by


class Buffers(NamedTuple):
    """What is kept of n positions: of the whole batch where the threads work together, else of each thread's slot."""

    h: Any  # [L, n, R]
    scales: Any  # [L, n]
    gates: Any  # [L, n, R]
    sigmoids: Any  # [L, n, R]
    skips: Any  # [n, S], rows `row_stride` apart; then their gradient
    d_sums: Any  # [2, n, 2 R]: others may still read one half while the next layer fills the other


class Gradients(NamedTuple):
    """Zeros at first. `matrices` and `biases` exist once for each slot."""

    matrices: Matrices
    biases: Biases
    gate_rows: Any  # [L, runs, 2 R]
    nats: Any  # float64 [slots]: the cross-entropy, summed over the slot's targets


class Scratch(NamedTuple):
    """Of one thread, for `BLOCK` positions."""

    rounding: Any
    sums: Any  # [BLOCK, 2 R]
    narrow: Any  # [BLOCK, R]
    taps: Any  # [BLOCK, 2 R]: positions at another tap
    inputs: Any  # [BLOCK, S], rows `row_stride` apart, and so the others
    hidden: Any  # [BLOCK, H]
    d_hidden: Any  # [BLOCK, H]
    logits: Any  # [BLOCK, V]


class Team(NamedTuple):
    """The threads that share some positions: `barrier`'s arguments. One alone never waits."""

    worker: Any
    workers: Any
    flags: Any
    yielder: Any


@inner
def _meet(team, count):
    """False where a thread never comes: then stop."""
    return team.workers == 1 or barrier(team.flags, team.worker, team.workers, count, team.yielder)


# ---- operations, forward and backward


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
    """What a layer reads of the stream x, and the norm's scale."""
    if normed:
        scales[uintp(s)] = norm(h, o, x, i, R)
    else:
        copy(h, o, x, i, R)


@inner
def _norm_back(dx, d, dh, g, h, i, scale, R, normed):
    """The gradient of `_norm`, added to that of the stream."""
    if normed:
        norm_back(dx, d, dh, g, h, i, scale, R)
    else:
        add(dx, d, dh, g, R)


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


@inner
def _relu_back(dx, d, y, i, n):
    """dx[d : d + n] is zero where y[i : i + n], what the ReLU gave, is."""
    for k in range(n):
        dx[uintp(d + k)] = ZERO if y[uintp(i + k)] == ZERO else dx[uintp(d + k)]


# ---- n positions of one layer from t on, forward and backward


@inner
def _layer(layer, t, n, model, batch, buffers, scratch):
    """The gate, its part of the skips, and the next layer's input."""
    shape, w, sums, taps, stream = model.shape, model.forward, scratch.sums, scratch.taps, batch.stream
    h, gates, sigmoids, scales, skips = buffers.h, buffers.gates, buffers.sigmoids, buffers.scales, buffers.skips
    gate_rows, runs, positions = model.gate_rows, batch.runs, batch.positions
    N, R, S, K, L = positions.size, shape.residual, shape.skip, shape.taps, shape.dilations.size
    Ss, first, rows, normed = row_stride(S), layer * N * R, layer * (gate_rows.size // (L * 2 * R)), shape.normed
    z = first + t * R
    for r in range(n):
        copy(sums, r * 2 * R, gate_rows, (rows + runs[uintp(t + r)]) * 2 * R, 2 * R)
    for tap in range(K):
        back, m = (K - 1 - tap) * shape.dilations[layer], (layer * K + tap) * R * 2 * R
        if back == 0:
            linear(scratch.rounding, sums, 0, 2 * R, h, z, R, w.dilated, m, (n, 2 * R, R))
        else:
            _shifted(taps, h, first, t, -back, positions, n, R)
            linear(scratch.rounding, sums, 0, 2 * R, taps, 0, R, w.dilated, m, (n, 2 * R, R))
    for r in range(n):
        _gate(gates, sigmoids, z + r * R, sums, r * 2 * R, R)
    linear(scratch.rounding, skips, t * Ss, Ss, gates, z, R, w.skip, layer * R * S, (n, S, R))
    if layer + 1 < L:
        bias = model.biases.residual
        for r in range(n):
            add(stream, (t + r) * R, bias, layer * R, R)
        linear(scratch.rounding, stream, t * R, R, gates, z, R, w.residual, layer * R * R, (n, R, R))
        for r in range(n):
            _norm(h, z + (N + r) * R, scales, (layer + 1) * N + t + r, stream, (t + r) * R, R, normed)


@inner
def _layer_back(layer, t, n, model, batch, buffers, scratch, gradients):
    """The gradient of the gate's sums, and those of the layer's weights."""
    shape, w, g, stream = model.shape, model.backward, gradients.matrices, batch.stream
    h, gates, sigmoids, skips, d_sums = buffers.h, buffers.gates, buffers.sigmoids, buffers.skips, buffers.d_sums
    dz, taps, runs, positions, d_rows = scratch.narrow, scratch.taps, batch.runs, batch.positions, gradients.gate_rows
    N, R, S, K, L = positions.size, shape.residual, shape.skip, shape.taps, shape.dilations.size
    Ss, first, sums = row_stride(S), layer * N * R, (layer % 2 * N + t) * 2 * R
    z, rows = first + t * R, layer * (d_rows.size // (L * 2 * R))
    fill(dz, 0, n * R, ZERO)
    linear(scratch.rounding, dz, 0, R, skips, t * Ss, Ss, w.skip, layer * S * R, (n, R, S))
    outer(scratch.rounding, g.skip, layer * R, L * R, skips, t * Ss, Ss, gates, z, R, (S, R, n))
    if layer + 1 < L:
        linear(scratch.rounding, dz, 0, R, stream, t * R, R, w.residual, layer * R * R, (n, R, R))
        outer(scratch.rounding, g.residual, layer * R * R, R, stream, t * R, R, gates, z, R, (R, R, n))
        bias = gradients.biases.residual
        for r in range(n):
            add(bias, layer * R, stream, (t + r) * R, R)
    for r in range(n):
        _gate_back(d_sums, sums + r * 2 * R, dz, r * R, gates, sigmoids, z + r * R, R)
        add(d_rows, (rows + runs[uintp(t + r)]) * 2 * R, d_sums, sums + r * 2 * R, 2 * R)
    for tap in range(K):
        back, d = (K - 1 - tap) * shape.dilations[layer], layer * 2 * R * K * R + tap * R
        if back == 0:
            outer(scratch.rounding, g.dilated, d, K * R, d_sums, sums, 2 * R, h, z, R, (2 * R, R, n))
        else:
            _shifted(taps, h, first, t, -back, positions, n, R)
            outer(scratch.rounding, g.dilated, d, K * R, d_sums, sums, 2 * R, taps, 0, R, (2 * R, R, n))


@inner
def _taps_back(layer, t, n, model, batch, buffers, scratch):
    """The gradient of the layer's input, which the sums at all taps give, added to the stream's."""
    shape, w, dh, taps, stream = model.shape, model.backward.dilated, scratch.narrow, scratch.taps, batch.stream
    h, scales, d_sums, positions, normed = buffers.h, buffers.scales, buffers.d_sums, batch.positions, shape.normed
    N, R, K = positions.size, shape.residual, shape.taps
    first, sums = layer * N, layer % 2 * N * 2 * R
    fill(dh, 0, n * R, ZERO)
    for tap in range(K):
        back, m = (K - 1 - tap) * shape.dilations[layer], (layer * K + tap) * 2 * R * R
        if back == 0:
            linear(scratch.rounding, dh, 0, R, d_sums, sums + t * 2 * R, 2 * R, w, m, (n, R, 2 * R))
        else:
            _shifted(taps, d_sums, sums, t, back, positions, n, 2 * R)
            linear(scratch.rounding, dh, 0, R, taps, 0, 2 * R, w, m, (n, R, 2 * R))
    for r in range(t, t + n):
        _norm_back(stream, r * R, dh, (r - t) * R, h, (first + r) * R, scales[uintp(first + r)], R, normed)


# ---- the head of n positions from t on, forward and backward


@inner
def _head(t, n, model, batch, buffers, scratch):
    """Skips -> ReLU -> H -> ReLU -> V logits, which become their gradient. Returns the cross-entropy's sum in nats."""
    S, H, V, bias1, bias2 = model.shape.skip, model.shape.head, model.shape.ids, model.biases.head1, model.biases.head2
    Ss, Hs, Vs, hidden, logits = row_stride(S), row_stride(H), row_stride(V), scratch.hidden, scratch.logits
    targets, inputs, per_target = batch.targets, scratch.inputs, batch.per_target
    relu(inputs, 0, buffers.skips, t * Ss, n * Ss)
    for r in range(n):
        copy(hidden, r * Hs, bias1, 0, H)
        copy(logits, r * Vs, bias2, 0, V)
    linear(scratch.rounding, hidden, 0, Hs, inputs, 0, Ss, model.forward.head1, 0, (n, H, S))
    relu(hidden, 0, hidden, 0, n * Hs)
    linear(scratch.rounding, logits, 0, Vs, hidden, 0, Hs, model.forward.head2, 0, (n, round_up(V), H))
    total = 0.0
    for r in range(n):
        target = targets[uintp(t + r)]
        if target < 0:
            fill(logits, r * Vs, V, ZERO)
        else:
            total += cross_entropy(logits, r * Vs, V, target, per_target)
    return total


@inner
def _head_back(t, n, model, buffers, scratch, gradients):
    """From the logits' gradient to that of the skips, and those of the head's weights."""
    S, H, V, g, biases = model.shape.skip, model.shape.head, model.shape.ids, gradients.matrices, gradients.biases
    Ss, Hs, Vs, hidden, d_hidden = row_stride(S), row_stride(H), row_stride(V), scratch.hidden, scratch.d_hidden
    logits, inputs, skips, w = scratch.logits, scratch.inputs, buffers.skips, model.backward
    d_bias1, d_bias2, d_skip_bias = biases.head1, biases.head2, biases.skip
    outer(scratch.rounding, g.head2, 0, H, logits, 0, Vs, hidden, 0, Hs, (V, H, n))
    fill(d_hidden, 0, n * Hs, ZERO)
    linear(scratch.rounding, d_hidden, 0, Hs, logits, 0, Vs, w.head2, 0, (n, H, V))
    _relu_back(d_hidden, 0, hidden, 0, n * Hs)
    outer(scratch.rounding, g.head1, 0, S, d_hidden, 0, Hs, inputs, 0, Ss, (H, S, n))
    fill(skips, t * Ss, n * Ss, ZERO)
    linear(scratch.rounding, skips, t * Ss, Ss, d_hidden, 0, Hs, w.head1, 0, (n, S, H))
    _relu_back(skips, t * Ss, inputs, 0, n * Ss)
    for r in range(n):
        add(d_bias2, 0, logits, r * Vs, V)
        add(d_bias1, 0, d_hidden, r * Hs, H)
        add(d_skip_bias, 0, skips, (t + r) * Ss, S)


# ---- all layers, by one thread


@inner
def _forward(team, begin, end, model, batch, buffers, scratch):
    """Positions begin to end. False where another thread never comes."""
    R, S, normed = model.shape.residual, model.shape.skip, model.shape.normed
    table, bias = model.table, model.biases.skip
    ids, stream, h, scales, skips = batch.ids, batch.stream, buffers.h, buffers.scales, buffers.skips
    for t in range(begin, end):
        copy(stream, t * R, table, ids[uintp(t)] * R, R)
        _norm(h, t * R, scales, t, stream, t * R, R, normed)
        copy(skips, t * row_stride(S), bias, 0, S)
    for layer in range(model.shape.dilations.size):
        if not _meet(team, layer + 1):
            return False
        for t in range(begin, end, BLOCK):
            _layer(layer, t, min(BLOCK, end - t), model, batch, buffers, scratch)
    return True


@inner
def _backward(team, begin, end, model, batch, buffers, scratch, gradients):
    """Positions begin to end, from the skips' gradient. False where another thread never comes."""
    R, L = model.shape.residual, model.shape.dilations.size
    fill(batch.stream, begin * R, (end - begin) * R, ZERO)
    for layer in range(L - 1, -1, -1):
        for t in range(begin, end, BLOCK):
            _layer_back(layer, t, min(BLOCK, end - t), model, batch, buffers, scratch, gradients)
        if not _meet(team, L + L - layer):
            return False
        for t in range(begin, end, BLOCK):
            _taps_back(layer, t, min(BLOCK, end - t), model, batch, buffers, scratch)
    return True


@inner
def _part(array, number, count):
    """Part `number` of `count` equal ones of a flat array."""
    size = array.size // count
    return array[number * size : (number + 1) * size]


@inner
def _own_gradients(g, slot):
    m, b, n = g.matrices, g.biases, g.nats.size
    matrices = Matrices(_part(m.dilated, slot, n), _part(m.residual, slot, n), _part(m.skip, slot, n),
                        _part(m.head1, slot, n), _part(m.head2, slot, n))  # fmt: skip
    biases = Biases(_part(b.residual, slot, n), _part(b.skip, slot, n), _part(b.head1, slot, n),
                    _part(b.head2, slot, n))  # fmt: skip
    return Gradients(matrices, biases, g.gate_rows, g.nats)


@inner
def _own_buffers(b, worker, n):
    return Buffers(_part(b.h, worker, n), _part(b.scales, worker, n), _part(b.gates, worker, n),
                   _part(b.sigmoids, worker, n), _part(b.skips, worker, n), _part(b.d_sums, worker, n))  # fmt: skip


@inner
def _own_batch(b, first, last, R):
    return Batch(b.ids[first:last], b.targets[first:last], b.positions[first:last], b.runs[first:last],
                 b.stream[first * R : last * R], b.bounds, b.next_slot, b.together, b.per_target)  # fmt: skip


@inner
def _scratch(shape):
    R, Ss, Hs, Vs = shape.residual, row_stride(shape.skip), row_stride(shape.head), row_stride(shape.ids)
    rounded = rounding(shape.bfloat16, BLOCK, max(2 * R, shape.skip, shape.head, shape.ids))
    return Scratch(
        rounded,
        np.empty(BLOCK * 2 * R, np.float32), np.empty(BLOCK * R, np.float32), np.empty(BLOCK * 2 * R, np.float32),
        np.empty(BLOCK * Ss, np.float32), np.empty(BLOCK * Hs, np.float32), np.empty(BLOCK * Hs, np.float32),
        np.zeros(BLOCK * Vs, np.float32),
    )  # fmt: skip


@inner
def _slot(slot, team, model, batch, buffers, scratch, gradients):
    """Forward pass, head and backward pass of one slot. False where another thread never comes."""
    first = np.int64(0) if batch.together else batch.bounds[slot]
    last = np.int64(batch.positions.size) if batch.together else batch.bounds[slot + 1]
    begin, end = batch.bounds[slot] - first, batch.bounds[slot + 1] - first
    own, grads = _own_batch(batch, first, last, model.shape.residual), _own_gradients(gradients, slot)
    if not _forward(team, begin, end, model, own, buffers, scratch):
        return False
    nats = 0.0
    for t in range(begin, end, BLOCK):
        nats += _head(t, min(BLOCK, end - t), model, own, buffers, scratch)
        _head_back(t, min(BLOCK, end - t), model, buffers, scratch, grads)
    gradients.nats[slot] = nats
    return _backward(team, begin, end, model, own, buffers, scratch, grads)


def wavenet_pass(worker, workers, flags, yielder, model, batch, buffers, gradients):
    """One thread's work: its range of positions where the threads work together, else one free slot after another."""
    slots = batch.bounds.size - 1
    if slots == 0:
        return
    scratch, together = _scratch(model.shape), batch.together
    team = Team(np.int64(worker if together else 0), np.int64(workers if together else 1), flags, yielder)
    own = buffers if together else _own_buffers(buffers, worker, workers)
    slot = np.int64(worker) if together else fetch_add(batch.next_slot, 0)
    while slot < slots and _slot(slot, team, model, batch, own, scratch, gradients):
        slot = np.int64(slots) if together else fetch_add(batch.next_slot, 0)
    end_rounding(scratch.rounding)


# ---- from PyTorch


def supports(c: WaveNetConfig, precision: str = "float32") -> str | None:
    """None where `build` takes a model of this config on a CPU of this precision, else the reason, a clause."""
    widest = WIDEST[precision if rounds(c) else "float32"]
    if reason := unknown(c):
        return reason
    if not c.bias or c.layers < 2 or c.embedding or c.decoder:
        return "the WaveNet kernel needs biases, two layers or more, and no separate embedding or decoder"
    if any(width % COLUMNS for width in (c.residual, c.skip, c.head)):
        return f"the WaveNet kernel needs channels in multiples of {COLUMNS}"
    if c.residual > widest:
        return f"the WaveNet kernel is for at most {widest} residual channels; beyond, PyTorch is faster"
    return unsupported_cpu()


def rounds(c: WaveNetConfig) -> bool:
    """Whether `build` can take products in bfloat16 for a model of this config, on this processor."""
    return AMX and not any(width % SIDE for width in (c.residual, c.skip, c.head))


def slot_bounds(sequences: int, length: int, threads: int) -> tuple[list[int], bool]:
    """Where the slots of so many sequences begin, with the end, and whether the threads share the sequences."""
    N = sequences * length
    if sequences < threads:
        size = -(-N // (threads * BLOCK)) * BLOCK
        return [min(N, size * slot) for slot in range(threads)] + [N], True
    slots = min(sequences, SLOTS * threads)
    return [sequences * slot // slots * length for slot in range(slots + 1)], False


class _Parameters(NamedTuple):
    """A core's parameters; those of the layers as lists."""

    layers: list[list[Tensor]]  # dilated weights, residual weights, residual biases
    others: list[Tensor]  # of skip, head1 and head2: weights, then biases
    gate_rows: list[Tensor]  # what `gate_biases` is made of


def _parameters(core: WaveNet) -> _Parameters:
    layers, linears = core.layers, (core.skip, core.head1, core.head2)
    conditions = [layer.condition.weight for layer in layers if layer.condition is not None]
    return _Parameters(
        [
            [layer.dilated.weight for layer in layers],
            [layer.residual.weight for layer in layers[:-1]],
            [layer.residual.bias for layer in layers[:-1]],
        ],
        [linear.weight for linear in linears] + [linear.bias for linear in linears],
        [layer.dilated.bias for layer in layers] + conditions + list(core.labels.parameters()),
    )


def _panels(matrices: Tensor, bfloat16: bool) -> Tensor:
    """Matrices [..., K, N] as `gemm.pack` puts each, filled up with zeros to a multiple of COLUMNS: [..., K N]; or as
    `gemm.pack_pairs`, filled up to multiples of SIDE: [..., K N / 2]."""
    if bfloat16:
        K, N = matrices.shape[-2:]
        matrices = F.pad(matrices, (0, -N % SIDE, 0, -K % SIDE)).bfloat16()
        pairs = matrices.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, 2))  # [..., K / 2, 2, N / SIDE, SIDE]
        return pairs.movedim(-2, -4).transpose(-1, -2).flatten(-4).contiguous().view(torch.float32)
    matrices = F.pad(matrices, (0, round_up.py_func(matrices.shape[-1]) - matrices.shape[-1]))
    whole = matrices.shape[-1] // PANEL * PANEL
    panels = matrices[..., :whole].unflatten(-1, (-1, PANEL)).transpose(-3, -2)
    return torch.cat([panels.flatten(-3), matrices[..., whole:].flatten(-2)], -1)


def _model(core: WaveNet, shape: Shape, parameters: _Parameters, gate_rows: Tensor) -> Model:
    """The weights as they are now."""
    dilated, residual, residual_bias = (torch.stack(each) for each in parameters.layers)
    skip, head1, head2, *biases = parameters.others
    by_tap = dilated.unflatten(2, (shape.taps, shape.residual))  # [L, 2 R, K, R]
    by_layer = skip.unflatten(1, (-1, shape.residual))  # [S, L, R]
    forward = (by_tap.permute(0, 2, 3, 1), residual.mT, by_layer.permute(1, 2, 0), head1.T, head2.T)
    backward = (by_tap.transpose(1, 2), residual, by_layer.transpose(0, 1), head1, head2)
    there, back = (Matrices(*(_panels(each, shape.bfloat16) for each in way)) for way in (forward, backward))
    return Model(shape, core.table.weight, there, back, Biases(residual_bias, *biases), gate_rows)


def _runs(index: Tensor | None, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """The positions' runs int64 [N], each of one condition row and within one slot, and the row of each run."""
    N = bounds[-1]
    rows = torch.zeros(N, dtype=torch.int64) if index is None else index.flatten()
    change = torch.zeros(N, dtype=torch.bool)
    change[1:] = rows[1:] != rows[:-1]
    change[[begin for begin in bounds if begin < N]] = True
    return change.cumsum(0) - 1, rows[change]


def _buffers(c: WaveNetConfig, bounds: list[int], together: bool, threads: int) -> Buffers:
    longest = max(end - begin for begin, end in pairwise(bounds))
    copies, n = (1, bounds[-1]) if together else (threads, longest)
    L, R = c.layers, c.residual
    sizes = (L * n * R, L * n, L * n * R, L * n * R, n * row_stride.py_func(c.skip), 2 * n * 2 * R)
    return Buffers(*(torch.empty(copies, size) for size in sizes))


def _zero_gradients(model: Model, parameters: _Parameters, slots: int) -> Gradients:
    def zeros(like: list[Tensor]) -> Tensor:
        return torch.zeros(slots, len(like), *like[0].shape)

    dilated, residual, residual_bias = (zeros(each) for each in parameters.layers)
    others = [zeros([p]) for p in parameters.others]
    matrices, biases = Matrices(dilated, residual, *others[:3]), Biases(residual_bias, *others[3:])
    return Gradients(matrices, biases, torch.zeros_like(model.gate_rows), torch.zeros(slots, dtype=torch.float64))


def _summed(g: Gradients, parameters: _Parameters) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with its gradient, summed over the slots."""
    by_layer = zip(parameters.layers, (g.matrices.dilated, g.matrices.residual, g.biases.residual), strict=True)
    pairs = [pair for ps, grads in by_layer for pair in zip(ps, grads.sum(0), strict=True)]
    others = (*g.matrices[2:], *g.biases[1:])
    return pairs + [(p, grads.sum(0)[0]) for p, grads in zip(parameters.others, others, strict=True)]


def _nothing(shape: Shape) -> tuple[Any, ...]:
    """Arguments of `wavenet_pass` with which it does nothing."""
    none, nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    matrices, biases = Matrices(*[nothing] * 5), Biases(*[nothing] * 4)
    return (
        Model(shape, nothing, matrices, matrices, biases, nothing),
        Batch(none, none, none, none, nothing, np.zeros(1, np.int64), none, False, ZERO),
        Buffers(*[nothing] * 6),
        Gradients(matrices, biases, nothing, np.zeros(0)),
    )


_pass = Compiled(wavenet_pass, [__file__])


def build(core: nn.Module, workers: WorkerPool, on_event: OnEvent, precision: str = "float32") -> Pass:
    """The pass of a core that `supports` accepts. Raises what numba raises where it cannot compile."""
    assert isinstance(core, WaveNet)
    c, parameters = core.config, _parameters(core)
    dilations, normed = np.array(c.all_dilations), RMS[WaveNetConfig][c.norm]
    bfloat16 = precision == "bfloat16" and rounds(c)
    shape = Shape(dilations, c.kernel, c.residual, c.skip, c.head, c.vocab_size, normed, bfloat16)
    workers.load(on_event, (_pass, _nothing(shape)))

    def run(
        ids: Tensor, targets: Tensor, positions: Tensor | None, condition: Condition | None, count: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        B, T = ids.shape
        bounds, together = slot_bounds(B, T, workers.count)
        runs, run_rows = _runs(None if condition is None else condition.index, bounds)
        with torch.enable_grad():
            gate_rows = core.gate_biases(condition)[:, run_rows]
        positions = (torch.arange(T).expand(B, T) if positions is None else positions).contiguous()
        batch = Batch(
            ids.contiguous(), targets.contiguous(), positions, runs, torch.empty(B * T, c.residual),
            torch.tensor(bounds), np.zeros(1, np.int64), together, np.float32(1 / max(1, count)),
        )  # fmt: skip
        with torch.no_grad():
            model = _model(core, shape, parameters, gate_rows.detach().contiguous())
            gradients = _zero_gradients(model, parameters, len(bounds) - 1)
            workers.run(_pass, model, batch, _buffers(c, bounds, together, workers.count), gradients)
            found = _summed(gradients, parameters)
            table = core.table.weight
            found.append((table, torch.zeros_like(table).index_add_(0, ids.flatten(), batch.stream)))
        gate_grads = torch.autograd.grad(gate_rows, parameters.gate_rows, gradients.gate_rows)
        found += zip(parameters.gate_rows, gate_grads, strict=True)
        return gradients.nats.sum().float(), found

    return run
