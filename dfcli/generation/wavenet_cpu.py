"""WaveNet on a CPU: the whole step, pick included, is one compiled function (numba) that makes a chunk of
samples a call. It gives the plain step's logits to 1e-5 and so makes the same picks.

A sample of the `paper` preset takes 1.24 million multiply-adds, of which each needs a weight that no other
uses: 4.9 MB, too much for a core's own caches, so that the speed of the last-level cache decides (60 GB/s
where this was measured: 80 µs; the arithmetic alone takes 30 µs). What is done about it:

- The weights lie in the order in which they are read, in tiles (see `kernels`).
- A layer with dilation d reads its own inputs of d samples ago, so those of the next d samples are known
  already. What the past taps make of them is computed for `AHEAD` samples at once, and their weights, a
  fifth of all, are read once in that many samples.
- tanh and sigmoid are vector code with one division for both, the embedding (with a projection behind it)
  is a table, a linear layer that follows another is multiplied into it, and the skip paths are one product
  over the gates of all layers.
- Several clips: each core takes its share of them, and each weight that is read serves two.

With `weights="bfloat16"` the matrices are rounded to half the bytes. The picks are then no longer the plain
step's, though the distribution they are drawn from is the same to the eye: on speech its loss differs by
less than 0.001 bits a sample.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores.wavenet import WaveNet, WaveNetState
from dfcli.errors import DfError
from dfcli.generation import compiled, kernels
from dfcli.generation.compiled import Compiled, jit
from dfcli.generation.engines import Unavailable
from dfcli.generation.kernels import add, copy, multiply, padded, pick, relu, tanh_sigmoid, tiles
from dfcli.generation.sampling import Filters
from dfcli.system.device import Device

AHEAD = 8  # samples at most whose past taps are computed at once


class _Model(NamedTuple):
    """Everything that does not change. R, S, H: channels in whole tiles; V ids."""

    table: NDArray[np.float32]  # [V, R]: what an id puts into the first layer
    weights: NDArray[Any]  # per layer the newest tap [2 R, R] and the residual [R, R] (not the last); skip, head
    past: NDArray[Any]  # per layer its other taps [2 R, R], oldest first
    biases: NDArray[np.float32]  # per layer the gate's [2 R] and the residual's [R]; skip [S], head [H] and [V]
    layers: NDArray[np.int64]  # [L, 5]: dilation, samples ahead, queue length, where its queue and its sums begin
    taps: int
    channels: int  # of the residual path, without padding
    normed: bool
    vocab_size: int


class _State(NamedTuple):
    """What changes while B clips advance together. Rows of all clips at one moment lie together."""

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
    chances: NDArray[np.float32]  # [V]


@jit
def _set_rows(out, x):
    """Puts x [n] into every row of the flat `out` [rows, n]."""
    for start in range(0, out.size, x.size):
        copy(out[start : start + x.size], x)


@jit
def _norm(out, x, channels):
    """RMSNorm without gain, as torch's: x / sqrt(mean of squares + the smallest step above 1)."""
    total = np.float32(0)
    for i in range(channels):
        total += x[i] * x[i]
    scale = np.float32(1 / np.sqrt(total / np.float32(channels) + np.float32(2**-23)))
    for i in range(x.size):
        out[i] = x[i] * scale


@jit
def _gate(out, sums):
    """tanh of the first half of `sums` times sigmoid of the second."""
    R = out.size
    a, b = sums[:R], sums[R : 2 * R]
    for i in range(R):
        out[i] = tanh_sigmoid(a[i], b[i])


@jit
def _step(model, state):
    """Reads one sample a clip, which stands in state.stream: leaves its logits in the state."""
    B, R = state.stream.shape
    L, S, H, V = len(model.layers), state.skip.shape[1], state.head.shape[1], state.logits.shape[1]
    queues, sums, stream, inputs = state.queues.ravel(), state.sums.ravel(), state.stream.ravel(), state.inputs.ravel()
    gates, skip, head, logits = state.gates.ravel(), state.skip.ravel(), state.head.ravel(), state.logits.ravel()
    t, w, past, c = state.clock[0], np.int64(0), 0, 0  # a literal 0 would make numba compile `multiply` twice
    for layer in range(L):
        dilation, ahead, length, queue, sum_ = model.layers[layer]
        for b in range(B):
            if model.normed:
                _norm(inputs[b * R : (b + 1) * R], stream[b * R : (b + 1) * R], model.channels)
            else:
                copy(inputs[b * R : (b + 1) * R], stream[b * R : (b + 1) * R])
        block = sums[sum_ * B * 2 * R : (sum_ + ahead) * B * 2 * R]
        if t % ahead == 0:
            _set_rows(block, model.biases[c : c + 2 * R])
            for tap in range(model.taps - 1):
                oldest = queue + (t + tap * dilation) % length  # `ahead` places from here on: it divides both
                x = queues[oldest * B * R :]
                multiply(block, 2 * R, x, R, ahead * B, model.past, past + tap * 2 * R * R, 2 * R, R)
        place = (queue + t % length) * B * R
        copy(queues[place : place + B * R], inputs)
        now = block[t % ahead * B * 2 * R : (t % ahead + 1) * B * 2 * R]
        w = multiply(now, 2 * R, inputs, R, B, model.weights, w, 2 * R, R)
        for b in range(B):
            _gate(gates[(b * L + layer) * R : (b * L + layer + 1) * R], now[b * 2 * R : (b + 1) * 2 * R])
        if layer + 1 < L:
            for b in range(B):
                add(stream[b * R : (b + 1) * R], model.biases[c + 2 * R : c + 3 * R])
            w = multiply(stream, R, gates[layer * R :], L * R, B, model.weights, w, R, R)
        past += (model.taps - 1) * 2 * R * R
        c += 3 * R
    _set_rows(skip, model.biases[c : c + S])
    w = multiply(skip, S, gates, L * R, B, model.weights, w, S, L * R)
    relu(skip)
    _set_rows(head, model.biases[c + S : c + S + H])
    w = multiply(head, H, skip, S, B, model.weights, w, H, S)
    relu(head)
    _set_rows(logits, model.biases[c + S + H :])
    multiply(logits, V, head, H, B, model.weights, w, V, H)
    state.clock[0] = t + 1


def wavenet_samples(model, state, uniforms, temperature, top_k, top_p, min_p, ids):
    """Picks and reads uniforms.shape[1] samples of each clip: uniforms [B, n] -> ids [B, n]."""
    for j in range(uniforms.shape[1]):
        for b in range(uniforms.shape[0]):
            logits = state.logits[b, : model.vocab_size]
            ids[b, j] = pick(logits, uniforms[b, j], temperature, top_k, top_p, min_p, state.chances)
            copy(state.stream[b], model.table[ids[b, j]])
        _step(model, state)


_samples = Compiled(wavenet_samples, [__file__, kernels.__file__, compiled.__file__])


def needs_compiling() -> bool:
    """Whether the first engine of this process will have to be compiled, which takes several seconds."""
    return not _samples.ready()


def build(core: nn.Module, batch: int, device: Device, weights: str = "float32") -> FastWaveNet:
    """The engine for a WaveNet; `weights` "float32" or "bfloat16". Raises Unavailable where numba fails."""
    assert isinstance(core, WaveNet)
    try:
        return FastWaveNet(core, device, weights)
    except Exception as error:  # numba has no base class for what it raises
        raise Unavailable(f"numba could not compile it ({type(error).__name__}: {error})") from error


class FastWaveNet:
    """`engines.Engine` for a WaveNet in eval mode on the CPU."""

    def __init__(self, core: WaveNet, device: Device, weights: str = "float32") -> None:
        self.name = "numba" if weights == "float32" else f"numba, {weights} weights"
        self._core = core
        self._threads = device.threads
        self._model = _model(core, packed=weights == "bfloat16")
        self._lanes: list[_State] = []  # the clips, in shares that are worked on at the same time
        state = _state(self._model, core, 1)
        _samples.load(self._model, state, np.empty((1, 0)), 1.0, 1, 1.0, 0.0, np.empty((1, 0), np.int64))

    def start(self, batch: int) -> None:
        lanes = min(self._threads, batch)
        sizes = [(batch + lane) // lanes for lane in range(lanes)]
        self._lanes = [_state(self._model, self._core, size) for size in sizes]

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64]) -> None:
        for lane, part in zip(self._lanes, self._split(ids), strict=True):
            logits, state = self._core.prefill(torch.from_numpy(part), self._core.init_state(len(part)))
            lane.logits[:, : logits.shape[1]] = logits.numpy()
            _fill(self._model, lane, state)

    def generate(self, uniforms: NDArray[np.float64], filters: Filters) -> NDArray[np.int64]:
        ids = np.empty(uniforms.shape, np.int64)
        numbers = filters.numbers(self._model.vocab_size)
        jobs = [
            (self._model, lane, np.ascontiguousarray(part), *numbers, out)
            for lane, part, out in zip(self._lanes, self._split(uniforms), self._split(ids), strict=True)
        ]
        if len(jobs) == 1:
            _samples(*jobs[0])
        else:
            with ThreadPoolExecutor(len(jobs)) as pool:
                for done in [pool.submit(_samples, *job) for job in jobs]:
                    done.result()
        if not all(np.isfinite(lane.logits).all() for lane in self._lanes):
            raise DfError(
                "the model's output is not finite", "its training may have diverged: try an earlier `--checkpoint`"
            )
        return ids

    def _split(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        ends = np.cumsum([len(lane.stream) for lane in self._lanes])
        return np.split(rows, ends[:-1])


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
        biases.append(kernels.pad(_array(torch.zeros(size) if vector is None else vector), width))

    for number, layer in enumerate(core.layers):
        # [2 R, taps R] -> halves and taps apart, each padded to whole tiles
        taps = _array(layer.dilated.weight).reshape(2, config.residual, K, config.residual)
        taps = kernels.pad(taps, 2, R, K, R).reshape(2 * R, K, R)
        past += [tiles(taps[:, tap]) for tap in range(K - 1)]
        weights.append(tiles(taps[:, K - 1]))
        both = layer.dilated.bias
        both = np.zeros((2, config.residual), np.float32) if both is None else _array(both).reshape(2, -1)
        biases.append(kernels.pad(both, 2, R).ravel())
        if number + 1 < L:
            weights.append(tiles(kernels.pad(_array(layer.residual.weight), R, R)))
        bias(layer.residual, config.residual, R)
        ahead = max(n for n in range(1, AHEAD + 1) if layer.dilation % n == 0)
        length = max(layer.past, 1)  # of a kernel of 1 the queue is never read
        layers.append((layer.dilation, ahead, length, queue, sum_))
        queue, sum_ = queue + length, sum_ + ahead
    skip = kernels.pad(_array(core.skip.weight).reshape(config.skip, L, config.residual), S, L, R)
    weights.append(tiles(skip.reshape(S, L * R)))
    weights.append(tiles(kernels.pad(_array(core.head1.weight), H, S)))
    weights.append(tiles(kernels.pad(_array(out_weight), W, H)))
    bias(core.skip, config.skip, S)
    bias(core.head1, config.head, H)
    biases.append(kernels.pad(_array(out_bias), W))
    place = kernels.pack if packed else (lambda tiles: tiles)
    return _Model(
        table=kernels.pad(_array(table), V, R),
        weights=place(kernels.join(weights)),
        past=place(kernels.join([*past, np.zeros(0, np.float32)])),
        biases=np.concatenate(biases),
        layers=np.array(layers, np.int64),
        taps=K,
        channels=config.residual,
        normed=config.norm == "rmsnorm",
        vocab_size=V,
    )


def _state(model: _Model, core: WaveNet, batch: int) -> _State:
    """Empty queues for `batch` clips."""
    R, (_, ahead, length, queue, sum_) = model.table.shape[1], model.layers[-1]

    def zeros(*shape: int) -> NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    return _State(
        clock=np.zeros(1, np.int64),
        queues=zeros(queue + length, batch, R),
        sums=zeros(sum_ + ahead, batch, 2 * R),
        logits=zeros(batch, padded(model.vocab_size)),
        stream=zeros(batch, R),
        inputs=zeros(batch, R),
        gates=zeros(batch, len(model.layers), R),
        skip=zeros(batch, padded(core.config.skip)),
        head=zeros(batch, padded(core.config.head)),
        chances=zeros(model.vocab_size),
    )


def _fill(model: _Model, lane: _State, state: WaveNetState) -> None:
    """Takes over the queues [B, P, R] of a core's state just after its `prefill`: the oldest entry is the first."""
    lane.clock[0] = 0
    for (_, _, _, place, _), queue in zip(model.layers, state.queues, strict=True):
        lane.queues[place : place + queue.shape[1], :, : model.channels] = queue.transpose(0, 1).numpy()
