"""The default recipe's WaveNet in training on a CPU: loss and gradients by compiled functions (numba).

With 32 channels the products of a layer take less time than what surrounds them: a dozen PyTorch operations that each
send megabytes through memory. Here a layer takes `BLOCK` positions at a time, which stay in the nearest cache from its
input to its output, its part of the skips included, and so does the head, forwards and backwards. The loss of the
core's own `forward` is the reference: loss and gradients agree to 1e-5 (tests).

Positions are flat: N = B T of them, rows behind each other, since a position knows how far it is from its document's
start and nothing looks beyond that. Each worker has a share of them and passes through all layers; threads meet between
layers, as a tap may lie in another's share. Gradients of weights are summed in the order of the workers, so that the
same number of threads gives the same bits.

What is kept for the backward pass: of each layer its input h (and the norm's scale), its gate z = tanh(a) sigmoid(b),
and sigmoid(b); tanh(a) is their quotient.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy import uintp
from torch import Tensor, nn

from dfcli.cores.protocols import Pass
from dfcli.cores.wavenet import WaveNet, WaveNetConfig
from dfcli.kernels.compile import Compiled, inner, unsupported_cpu
from dfcli.kernels.gemm import COLUMNS, panel_product, product, round_up, row_stride
from dfcli.kernels.ops import (
    ONE,
    TWO,
    ZERO,
    add,
    clamp,
    copy,
    cross_entropy,
    exp,
    fill,
    norm,
    norm_back,
)
from dfcli.kernels.threads import WorkerPool, barrier
from dfcli.system.events import OnEvent

BLOCK = 64  # positions
WIDEST = 128  # residual channels: PyTorch's products of wider ones are faster than ours

_row_stride, _round_up = inner(row_stride), inner(round_up)


@inner
def _own(worker, workers, N):
    """The positions of a worker, of whole blocks: begin, end."""
    size = (-(-N // workers) + BLOCK - 1) // BLOCK * BLOCK
    return min(N, worker * size), min(N, (worker + 1) * size)


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


@inner
def _relu(out, o, x, i, n):
    """out[o : o + n] = what is positive of x[i : i + n], else zero; not a number stays so."""
    for k in range(n):
        value = x[uintp(i + k)]
        out[uintp(o + k)] = ZERO if value < ZERO else value


@inner
def _relu_back(dx, d, y, i, n):
    """dx[d : d + n] is zero where y[i : i + n], what the ReLU gave, is."""
    for k in range(n):
        dx[uintp(d + k)] = ZERO if y[uintp(i + k)] == ZERO else dx[uintp(d + k)]


def wavenet_forward(
    worker, workers, flags, yielder, positions, dilations, taps, normed, dilated, gate_bias, residual,
    residual_bias, skip, skip_bias, x, h, scales, gates, sigmoids, skips,
):  # fmt: skip
    """One worker of the forward pass, all arrays flat. L layers, R residual and S skip channels, K taps.

    positions int64 [N]; dilations [L]; weights [inputs, outputs], as `_packed` gives them: dilated [L, K, R, 2 R],
    residual [L - 1, R, R], skip [L, R, S]. In: x [N, R], overwritten. Out: h [L, N, R], scales [L, N], gates and
    sigmoids [L, N, R], skips [N, S], whose rows begin `row_stride`.
    """
    N, L = positions.size, dilations.size
    if N == 0:
        return
    R, S = x.size // N, skip_bias.size
    Ss, (begin, end) = _row_stride(S), _own(worker, workers, N)
    sums, past = np.empty(BLOCK * 2 * R, np.float32), np.empty(BLOCK * R, np.float32)
    for t in range(begin, end):
        _norm(h, t * R, scales, t, x, t * R, R, normed)
        copy(skips, t * Ss, skip_bias, 0, S)
    for layer in range(L):
        if not barrier(flags, worker, workers, layer + 1, yielder):
            return
        first = layer * N * R
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for r in range(n):
                copy(sums, r * 2 * R, gate_bias, layer * 2 * R, 2 * R)
            for tap in range(taps):
                back, w = (taps - 1 - tap) * dilations[layer], (layer * taps + tap) * R * 2 * R
                if back == 0:
                    panel_product(sums, 0, 2 * R, h, first + t * R, R, dilated, w, n, 2 * R, R)
                else:
                    _shifted(past, h, first, t, -back, positions, n, R)
                    panel_product(sums, 0, 2 * R, past, 0, R, dilated, w, n, 2 * R, R)
            for r in range(n):
                _gate(gates, sigmoids, first + (t + r) * R, sums, r * 2 * R, R)
            panel_product(skips, t * Ss, Ss, gates, first + t * R, R, skip, layer * R * S, n, S, R)
            if layer + 1 < L:
                for r in range(n):
                    add(x, (t + r) * R, residual_bias, layer * R, R)
                panel_product(x, t * R, R, gates, first + t * R, R, residual, layer * R * R, n, R, R)
                for r in range(t, t + n):
                    _norm(h, first + (N + r) * R, scales, (layer + 1) * N + r, x, r * R, R, normed)


def wavenet_backward(
    worker, workers, flags, yielder, positions, dilations, taps, normed, dilated, residual, skip, h, scales, gates,
    sigmoids, d_skips, dx, d_sums, d_dilated, d_gate_bias, d_residual, d_residual_bias, d_skip,
):  # fmt: skip
    """One worker of the backward pass, all arrays flat, from the gradient with respect to the skips.

    Weights [outputs, inputs], as `_packed` gives them: dilated [L, K, 2 R, R], residual [L - 1, R, R], skip [L, S, R].
    In: d_skips [N, S], whose rows lie `row_stride` apart. Added to, zeros at first: dx [N, R] and, for each worker,
    the weights' gradients, as in PyTorch: d_dilated [L, 2 R, K R], d_gate_bias [L, 2 R], d_residual [L - 1, R, R],
    d_residual_bias [L - 1, R], d_skip [S, L R]. Scratch: d_sums [2, N, 2 R], of which one half may still be read by
    others when the next layer fills the other.
    """
    N, L = positions.size, dilations.size
    if N == 0:
        return
    R, S, Ss = dx.size // N, skip.size // (L * (dx.size // N)), d_skips.size // N
    begin, end = _own(worker, workers, N)
    dz, dh, past = np.empty(BLOCK * R, np.float32), np.empty(BLOCK * R, np.float32), np.empty(BLOCK * R, np.float32)
    future = np.empty(BLOCK * 2 * R, np.float32)
    for layer in range(L - 1, -1, -1):
        first, sums = layer * N * R, layer % 2 * N * 2 * R
        own, own_residual = worker * L + layer, worker * (L - 1) + layer
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            z = first + t * R
            fill(dz, 0, n * R, ZERO)
            panel_product(dz, 0, R, d_skips, t * Ss, Ss, skip, layer * S * R, n, R, S)
            product(d_skip, (worker * S * L + layer) * R, L * R, d_skips, t * Ss, 1, Ss, gates, z, R, S, R, n)
            if layer + 1 < L:
                panel_product(dz, 0, R, dx, t * R, R, residual, layer * R * R, n, R, R)
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
        if not barrier(flags, worker, workers, L - layer, yielder):
            return
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            fill(dh, 0, n * R, ZERO)
            for tap in range(taps):
                back, w = (taps - 1 - tap) * dilations[layer], (layer * taps + tap) * 2 * R * R
                if back == 0:
                    panel_product(dh, 0, R, d_sums, sums + t * 2 * R, 2 * R, dilated, w, n, R, 2 * R)
                else:
                    _shifted(future, d_sums, sums, t, back, positions, n, 2 * R)
                    panel_product(dh, 0, R, future, 0, 2 * R, dilated, w, n, R, 2 * R)
            for r in range(n):
                if normed:
                    s, scale = first + (t + r) * R, scales[uintp(layer * N + t + r)]
                    norm_back(dx, (t + r) * R, dh, r * R, h, s, scale, R)
                else:
                    add(dx, (t + r) * R, dh, r * R, R)


def wavenet_head(
    worker, workers, flags, yielder, targets, skips, head1, bias1, head2, bias2, head1_back, head2_back, per_target,
    nats, d_head1, d_bias1, d_head2, d_bias2, d_skip_bias,
):  # fmt: skip
    """One worker of the loss, all arrays flat: S skip channels -> ReLU -> H -> ReLU -> V logits.

    targets int64 [N] (negative: not scored); weights as `_packed` gives them: [inputs, outputs] head1 [S, H] and head2
    [H, V], in whole columns; [outputs, inputs] head1_back and head2_back. skips [N, S], whose rows begin `row_stride`,
    become their gradient. Out: nats float64 [workers], the cross-entropy summed over the targets of each worker. Added
    to, zeros at first, for each worker: the gradients of `per_target` times it, as PyTorch's weights lie.
    """
    N = targets.size
    if N == 0:
        return
    S, H, V = d_skip_bias.size // workers, bias1.size, bias2.size
    Ss, Hs, Vs, Vp = _row_stride(S), _row_stride(H), _row_stride(V), _round_up(V)
    begin, end = _own(worker, workers, N)
    inputs, hidden, d_hidden = (np.empty(BLOCK * Ss, np.float32), np.empty(BLOCK * Hs, np.float32),
                                np.empty(BLOCK * Hs, np.float32))  # fmt: skip
    logits = np.zeros(BLOCK * Vs, np.float32)
    total = 0.0
    for t in range(begin, end, BLOCK):
        n = min(BLOCK, end - t)
        _relu(inputs, 0, skips, t * Ss, n * Ss)
        for r in range(n):
            copy(hidden, r * Hs, bias1, 0, H)
            copy(logits, r * Vs, bias2, 0, V)
        panel_product(hidden, 0, Hs, inputs, 0, Ss, head1, 0, n, H, S)
        _relu(hidden, 0, hidden, 0, n * Hs)
        panel_product(logits, 0, Vs, hidden, 0, Hs, head2, 0, n, Vp, H)
        for r in range(n):
            target = targets[uintp(t + r)]
            if target < 0:
                fill(logits, r * Vs, V, ZERO)
            else:
                total += cross_entropy(logits, r * Vs, V, target, per_target)
            add(d_bias2, worker * V, logits, r * Vs, V)
        product(d_head2, worker * V * H, H, logits, 0, 1, Vs, hidden, 0, Hs, V, H, n)
        fill(d_hidden, 0, n * Hs, ZERO)
        panel_product(d_hidden, 0, Hs, logits, 0, Vs, head2_back, 0, n, H, V)
        _relu_back(d_hidden, 0, hidden, 0, n * Hs)
        product(d_head1, worker * H * S, S, d_hidden, 0, 1, Hs, inputs, 0, Ss, H, S, n)
        fill(skips, t * Ss, n * Ss, ZERO)
        panel_product(skips, t * Ss, Ss, d_hidden, 0, Hs, head1_back, 0, n, S, H)
        _relu_back(skips, t * Ss, inputs, 0, n * Ss)
        for r in range(n):
            add(d_bias1, worker * H, d_hidden, r * Hs, H)
            add(d_skip_bias, worker * S, skips, (t + r) * Ss, S)
    nats[uintp(worker)] = total


_forward, _head, _backward = (Compiled(f, [__file__]) for f in (wavenet_forward, wavenet_head, wavenet_backward))


def _packed(matrices: Tensor) -> Tensor:
    """Matrices [..., K, N] as `gemm.pack` puts each, filled up with zeros to whole columns."""
    matrices = F.pad(matrices, (0, round_up(matrices.shape[-1]) - matrices.shape[-1]))
    return matrices.unflatten(-1, (-1, COLUMNS)).transpose(-3, -2).contiguous()


def supports(c: WaveNetConfig) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    if not c.bias or c.layers < 2 or c.embedding or c.decoder:
        return "the WaveNet kernel needs biases, two layers or more, and no separate embedding or decoder"
    if c.row:
        return "the WaveNet kernel takes no conditions yet"
    if any(width % COLUMNS for width in (c.residual, c.skip, c.head)):
        return f"the WaveNet kernel needs channels in multiples of {COLUMNS}"
    if c.residual > WIDEST:
        return f"the WaveNet kernel is for at most {WIDEST} residual channels; beyond, PyTorch is faster"
    return unsupported_cpu()


def build(core: nn.Module, workers: WorkerPool, on_event: OnEvent) -> Pass:
    """The pass of a core that `supports` accepts. Raises what numba raises where it cannot compile."""
    assert isinstance(core, WaveNet)
    c, layers = core.config, core.layers
    dilations, L, K, R, S = np.array(c.all_dilations), len(layers), c.kernel, c.residual, c.skip
    normed = c.norm == "rmsnorm"
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
    workers.load(
        on_event,
        (_forward, (none, none, K, normed, *[nothing] * 12)),
        (_head, (none, *[nothing] * 7, ZERO, np.zeros(0), *[nothing] * 5)),
        (_backward, (none, none, K, normed, *[nothing] * 15)),
    )
    stacked = [
        [layer.dilated.weight for layer in layers],
        [layer.dilated.bias for layer in layers],
        [layer.residual.weight for layer in layers[:-1]],
        [layer.residual.bias for layer in layers[:-1]],
    ]
    others = [core.skip.weight, core.skip.bias, core.head1.weight, core.head1.bias, core.head2.weight, core.head2.bias]

    @torch.no_grad()
    def backward(
        ids: Tensor, targets: Tensor, positions: Tensor | None, condition: None, count: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        B, T = ids.shape
        N = B * T
        positions = (torch.arange(T).expand(B, T) if positions is None else positions).contiguous()
        dilated, gate_bias, residual, residual_bias = weights = [torch.stack(each) for each in stacked]
        skip, skip_bias, head1, bias1, head2, bias2 = others
        d_dilated, d_gate_bias, d_residual, d_residual_bias, d_skip, d_skip_bias, *d_head = (
            torch.zeros(workers.count, *weight.shape) for weight in (*weights, *others)
        )
        h, scales, gates, sigmoids = (torch.empty(L, N, width) for width in (R, 1, R, R))
        skips, nats = torch.empty(N, row_stride(S)), torch.empty(workers.count, dtype=torch.float64)
        by_tap, by_layer = dilated.unflatten(2, (K, R)), skip.unflatten(1, (L, R))
        workers.run(
            _forward, positions, dilations, K, normed, _packed(by_tap.permute(0, 2, 3, 1)), gate_bias,
            _packed(residual.mT), residual_bias, _packed(by_layer.permute(1, 2, 0)), skip_bias, core.table(ids), h,
            scales, gates, sigmoids, skips,
        )  # fmt: skip
        workers.run(
            _head, targets.contiguous(), skips, _packed(head1.T), bias1, _packed(head2.T), bias2, _packed(head1),
            _packed(head2), np.float32(1 / max(1, count)), nats, *d_head, d_skip_bias,
        )  # fmt: skip
        dx, d_sums = torch.zeros(N, R), torch.empty(2, N, 2 * R)
        workers.run(
            _backward, positions, dilations, K, normed, _packed(by_tap.transpose(1, 2)), _packed(residual),
            _packed(by_layer.transpose(0, 1)), h, scales, gates, sigmoids, skips, dx, d_sums,
            d_dilated, d_gate_bias, d_residual, d_residual_bias, d_skip,
        )  # fmt: skip
        found: list[tuple[Tensor, Tensor]] = []
        for ps, grads in zip(stacked, (d_dilated, d_gate_bias, d_residual, d_residual_bias), strict=True):
            found += zip(ps, grads.sum(0), strict=True)
        found += [(p, grads.sum(0)) for p, grads in zip(others, (d_skip, d_skip_bias, *d_head), strict=True)]
        table = core.table.weight
        found.append((table, torch.zeros_like(table).index_add_(0, ids.flatten(), dx)))
        return nats.sum().float(), found

    return backward
