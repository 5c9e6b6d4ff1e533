"""WaveNet on a CPU: the whole step, pick included, is one compiled function (numba) that makes a chunk of
samples a call. It gives the plain step's logits to 1e-5 and so makes the same picks.

A sample of the `paper` preset takes 1.24 million multiply-adds, of which each needs a weight that no other
uses: 4.9 MB, too much for a core's own caches, so that the speed of the last-level cache decides (60 GB/s
where this was measured: 80 µs; the arithmetic alone takes 30 µs). What is done about it:

- The weights lie in the order in which they are read, in tiles (see `gemm.py`).
- A layer with dilation d reads its own inputs of d samples ago, so those of the next d samples are known
  already. What the past taps make of them is computed for `AHEAD` samples at once, and their weights, a
  fifth of all, are read once in that many samples.
- tanh and sigmoid are vector code with one division for both, the embedding (with a projection behind it)
  is a table, a linear layer that follows another is multiplied into it, and the skip paths are one product
  over the gates of all layers.
- Several clips: each core takes its share of them, and each weight that is read serves two.

Where the weights are more than a core's own cache holds (`ROUNDED`), and unless exactness is asked for, they are
rounded to bfloat16: half the bytes. The picks are then no longer the plain step's, but they are drawn from a
distribution whose loss differs by less than 0.001 bits a sample.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import uintp
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores.protocols import Picking, prefill
from dfcli.cores.wavenet import Condition, WaveNet, WaveNetConfig
from dfcli.kernels.compile import Compiled, inner
from dfcli.kernels.gemm import join, multiply, pad, padded, tiles, to_bfloat16
from dfcli.kernels.known import RMS, unknown
from dfcli.kernels.ops import ZERO, add, copy, fill, norm, relu, set_rows, tanh_sigmoid
from dfcli.kernels.pick import pick
from dfcli.kernels.threads import ThreadedEngine
from dfcli.system.device import Device
from dfcli.system.events import OnEvent, ignore

AHEAD = 8  # samples at most whose past taps are computed at once
ROUNDED = 2 * 2**20  # bytes of float32 weights from which on they may be rounded


class _Model(NamedTuple):
    """Everything that does not change. R, S, H: channels in whole tiles; V ids."""

    table: NDArray[np.float32]  # [V, R]: what an id puts into the first layer
    weights: NDArray[Any]  # per layer the newest tap [2 R, R] and the residual [R, R] (not the last); skip, head
    past: NDArray[Any]  # per layer its other taps [2 R, R], oldest first
    biases: NDArray[np.float32]  # per layer the residual's [R]; skip [S], head [H] and [V]
    layers: NDArray[np.int64]  # [L, 5]: dilation, samples ahead, queue length, where its queue and its sums begin
    taps: int
    channels: int  # of the residual path, without padding
    normed: bool
    vocab_size: int


class _Gates(NamedTuple):
    """The gates' biases, the layers' own and the conditions', as rows; which of the F rows each sample uses."""

    rows: NDArray[np.float32]  # [L, F, 2 R], flat
    places: NDArray[np.int64]  # [B, n]


class _State(NamedTuple):
    """What changes while B clips advance together. All arrays are flat; the clips' rows at one moment lie together."""

    clock: NDArray[np.int64]  # [1]: samples read since the queues were filled
    queues: NDArray[np.float32]  # [places, B, R]: per layer a ring of its inputs
    sums: NDArray[np.float32]  # [places, B, 2 R]: per layer, before tanh and sigmoid, of the samples ahead
    logits: NDArray[np.float32]  # [B, V in whole tiles], after the newest sample
    # Scratch:
    stream: NDArray[np.float32]  # [B, R]: the residual path
    inputs: NDArray[np.float32]  # [B, R]: what a layer reads of it
    gates: NDArray[np.float32]  # [B, L, R]
    skip: NDArray[np.float32]  # [B, S]
    head: NDArray[np.float32]  # [B, H]
    weights: NDArray[np.float32]  # [V]: of the pick


@inner
def _gate(out, o, sums, s, bias, b, R):
    """out[o : o + R] = tanh of R sums times sigmoid of the next R, each with its bias."""
    for i in range(R):
        tanh = sums[uintp(s + i)] + bias[uintp(b + i)]
        out[uintp(o + i)] = tanh_sigmoid(tanh, sums[uintp(s + R + i)] + bias[uintp(b + R + i)])


@inner
def _step(model, state, gate_biases, j, B):
    """Reads sample j of each clip, whose embedding stands in state.stream, and leaves the logits after it."""
    queues, sums, stream, inputs = state.queues, state.sums, state.stream, state.inputs
    gates, skip, head, logits = state.gates, state.skip, state.head, state.logits
    weights, biases, layers, taps = model.weights, model.biases, model.layers, model.taps
    L, R, S, H, W = len(layers), stream.size // B, skip.size // B, head.size // B, logits.size // B
    rows, places, F = gate_biases.rows, gate_biases.places, gate_biases.rows.size // (L * 2 * R)
    t, c = state.clock[0], 0
    w = past = np.int64(0)  # a literal 0 would be a type of its own and compile `multiply` twice
    for layer in range(L):
        dilation, ahead, length = layers[layer, 0], layers[layer, 1], layers[layer, 2]
        queue, block = layers[layer, 3] * B * R, layers[layer, 4] * B * 2 * R
        if model.normed:
            for b in range(B):
                norm(inputs, b * R, stream, b * R, model.channels)  # the padding stays zero
        else:
            copy(inputs, 0, stream, 0, B * R)
        if t % ahead == 0:
            fill(sums, block, ahead * B * 2 * R, ZERO)
            for tap in range(taps - 1):
                x = queue + (t + tap * dilation) % length * B * R  # `ahead` rows lie there: it divides both
                multiply(sums, block, 2 * R, queues, x, R, ahead * B, model.past, past + tap * 2 * R * R, 2 * R, R)
        copy(queues, queue + t % length * B * R, inputs, 0, B * R)
        now = block + t % ahead * B * 2 * R
        w = multiply(sums, now, 2 * R, inputs, np.int64(0), R, B, weights, w, 2 * R, R)
        for b in range(B):
            _gate(gates, (b * L + layer) * R, sums, now + b * 2 * R, rows, (layer * F + places[b, j]) * 2 * R, R)
        if layer + 1 < L:
            for b in range(B):
                add(stream, b * R, biases, c, R)
            w = multiply(stream, np.int64(0), R, gates, layer * R, L * R, B, weights, w, R, R)
        past += (taps - 1) * 2 * R * R
        c += R
    set_rows(skip, 0, S, biases, c, B, S)
    w = multiply(skip, np.int64(0), S, gates, np.int64(0), L * R, B, weights, w, S, L * R)
    relu(skip, 0, skip, 0, B * S)
    set_rows(head, 0, H, biases, c + S, B, H)
    w = multiply(head, np.int64(0), H, skip, np.int64(0), S, B, weights, w, H, S)
    relu(head, 0, head, 0, B * H)
    set_rows(logits, 0, W, biases, c + S + H, B, W)
    multiply(logits, np.int64(0), W, head, np.int64(0), H, B, weights, w, W, H)
    state.clock[0] = t + 1


def wavenet_samples(model, state, gate_biases, uniforms, picking, ids):
    """Picks and reads n samples of each clip: uniforms [B, n] -> ids [B, n]."""
    temperature, top_k, top_p, min_p = picking
    B, n = uniforms.shape
    R, W = model.table.shape[1], state.logits.size // B
    table = model.table.ravel()
    for j in range(n):
        for b in range(B):
            logits = state.logits[b * W : b * W + model.vocab_size]
            ids[b, j] = pick(logits, uniforms[b, j], temperature, top_k, top_p, min_p, state.weights)
            copy(state.stream, b * R, table, ids[b, j] * R, R)
        _step(model, state, gate_biases, j, B)


_SOURCES = [__file__]
_exact, _rounded = (Compiled(wavenet_samples, _SOURCES, variant) for variant in ("", "-bfloat16"))


def supports(config: WaveNetConfig, device: Device) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    return unknown(config)


def build(core: nn.Module, device: Device, exact: bool = True, on_event: OnEvent = ignore) -> ThreadedEngine:
    """The engine for a WaveNet in eval mode on the CPU; `exact` keeps its weights in float32. Raises what numba
    raises where it cannot compile."""
    assert isinstance(core, WaveNet)
    rounded = not exact and 4 * core.config.parameters() >= ROUNDED
    model, samples = _model(core, rounded), _rounded if rounded else _exact
    none = np.empty((1, 0), np.int64)
    gates = _Gates(np.zeros(len(model.layers) * 2 * model.table.shape[1], np.float32), none)
    samples.load(on_event, model, _state(model, core, 1), gates, np.empty((1, 0)), Picking(), none)
    name, reason = "numba", "compiled for this processor; it makes the same samples as the plain engine"
    if rounded:
        name = "numba-bfloat16"
        reason = "compiled for this processor, weights rounded to bfloat16; `--engine fast` keeps float32"
    return ThreadedEngine(name, reason, lambda size: _Sequences(core, model, samples, size), device.threads)


class _Sequences:
    """Clips that one thread advances (`threads.Sequences`)."""

    def __init__(self, core: WaveNet, model: _Model, samples: Compiled, size: int) -> None:
        self._core, self._model, self._samples = core, model, samples
        self._state = _state(model, core, size)

    @property
    def logits(self) -> NDArray[np.float32]:
        return self._state.logits.reshape(-1, padded(self._model.vocab_size))

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64], condition: Condition | None) -> None:
        logits, state = prefill(self._core, torch.from_numpy(ids), self._core.init_state(len(ids)), condition)
        self.logits[:, : logits.shape[1]] = logits.numpy()
        self._state.clock[0] = 0  # now the oldest entry of each queue [B, P, R] is its first
        queues = self._state.queues.reshape(-1, len(self.logits), self._model.table.shape[1])
        for (_, _, _, place, _), queue in zip(self._model.layers, state.queues, strict=True):
            queues[place : place + queue.shape[1], :, : self._model.channels] = queue.transpose(0, 1).numpy()

    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None
    ) -> NDArray[np.int64]:
        ids = np.empty(uniforms.shape, np.int64)
        self._samples(self._model, self._state, self._gates(condition, ids.shape), uniforms, picking, ids)
        return ids

    @torch.inference_mode()
    def _gates(self, condition: Condition | None, shape: tuple[int, ...]) -> _Gates:
        """The rows of a condition whose index has this shape; without one, the layers' own biases."""
        rows = _array(self._core.gate_biases(condition)).reshape(len(self._model.layers), -1, 2, self._model.channels)
        rows = pad(rows, *rows.shape[:3], self._model.table.shape[1]).ravel()
        return _Gates(rows, np.zeros(shape, np.int64) if condition is None else condition.index.contiguous().numpy())


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().numpy()


def _model(core: WaveNet, packed: bool) -> _Model:
    """The core's weights in the layout of `_Model`."""
    config = core.config
    K, L, V = config.kernel, config.layers, config.vocab_size
    R, S, H, W = (padded(size) for size in (config.residual, config.skip, config.head, V))
    table = core.entry(core.table.weight)
    out_weight, out_bias = core.head2.weight, core.head2.bias
    if isinstance(core.decoder, nn.Linear):
        outer = core.decoder.weight.double()
        out_weight, out_bias = outer @ out_weight.double(), outer @ out_bias.double() + core.decoder.bias
    weights, past, biases, layers = [], [], [], []
    queue = sum_ = 0

    def bias(linear: nn.Module, size: int, width: int) -> None:
        vector = getattr(linear, "bias", None)
        biases.append(pad(_array(torch.zeros(size) if vector is None else vector), width))

    for number, layer in enumerate(core.layers):
        # [2 R, taps R] -> halves and taps apart, each padded to whole tiles
        taps = _array(layer.dilated.weight).reshape(2, config.residual, K, config.residual)
        taps = pad(taps, 2, R, K, R).reshape(2 * R, K, R)
        past += [tiles(taps[:, tap]) for tap in range(K - 1)]
        weights.append(tiles(taps[:, K - 1]))
        if number + 1 < L:
            weights.append(tiles(pad(_array(layer.residual.weight), R, R)))
        bias(layer.residual, config.residual, R)
        ahead = max(n for n in range(1, AHEAD + 1) if layer.dilation % n == 0)
        length = max(layer.past, 1)  # of a kernel of 1 the queue is never read
        layers.append((layer.dilation, ahead, length, queue, sum_))
        queue, sum_ = queue + length, sum_ + ahead
    skip = pad(_array(core.skip.weight).reshape(config.skip, L, config.residual), S, L, R)
    weights.append(tiles(skip.reshape(S, L * R)))
    weights.append(tiles(pad(_array(core.head1.weight), H, S)))
    weights.append(tiles(pad(_array(out_weight), W, H)))
    bias(core.skip, config.skip, S)
    bias(core.head1, config.head, H)
    biases.append(pad(_array(out_bias), W))
    place = to_bfloat16 if packed else (lambda tiles: tiles)
    return _Model(
        table=pad(_array(table), V, R),
        weights=place(join(weights)),
        past=place(join([*past, np.zeros(0, np.float32)])),
        biases=np.concatenate(biases),
        layers=np.array(layers, np.int64),
        taps=K,
        channels=config.residual,
        normed=RMS[WaveNetConfig][config.norm],
        vocab_size=V,
    )


def _state(model: _Model, core: WaveNet, batch: int) -> _State:
    """Empty queues for `batch` clips."""
    L, R, (_, ahead, length, queue, sum_) = len(model.layers), model.table.shape[1], model.layers[-1]

    def zeros(size: int) -> NDArray[np.float32]:
        return np.zeros(batch * size, np.float32)

    return _State(
        clock=np.zeros(1, np.int64),
        queues=zeros((queue + length) * R),
        sums=zeros((sum_ + ahead) * 2 * R),
        logits=zeros(padded(model.vocab_size)),
        stream=zeros(R),
        inputs=zeros(R),
        gates=zeros(L * R),
        skip=zeros(padded(core.config.skip)),
        head=zeros(padded(core.config.head)),
        weights=np.zeros(model.vocab_size, np.float32),
    )
