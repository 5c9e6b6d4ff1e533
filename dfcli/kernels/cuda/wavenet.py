"""WaveNet on an NVIDIA GPU: one kernel (Triton) makes a whole chunk of samples, picks included, without a return to the
host. It computes in float32 and so makes the plain engine's picks.

The idea of a persistent kernel whose programs hand activations to each other by flags is NVIDIA's nv-wavenet (2018).
There each layer has its own programs; here, by the arithmetic below, one program runs through all the layers:

A sample of the `paper` preset reads 4.9 MB of weights, and a single multiprocessor reads its GPU's L2 cache at about
110 GB/s (64 bytes a cycle): 45 µs, and with the wait for each answer about 90 µs, too slow for 16 kHz (62 µs). But only
two products a layer, 12,288 of its 36,864 weights, wait for the layer before. Program 0 of a clip makes these (the
"chain": 30 layers at 0.7-1 µs, their weights fetched one layer ahead). Everything else needs only what the chain has
left behind: the skip paths, and what the past taps put into each layer at the *next* sample. So:

1. program 0: pick, embedding, the chain of layers -> `gates`, `queues`
2. all G programs, each for every G-th layer: share of the skip sums -> `partials`, past taps -> `sums`
3. program G - 1: the head -> `logits`

Programs wait for each other three times a sample, each about 1.3 µs (a release and an acquire through L2); one that
handed over after each layer, as in nv-wavenet, would wait 30 times. Expected for one clip on an H100: 25 (chain) + 4
(waits) + 3 (2.) + 10 (head) + 3 (pick) = 45 µs or 22,000 samples/s. Measured on an H200: 167 µs, 5,993 samples/s, 37
times the plain engine; 64 clips 486,946 samples/s. A head that 32 programs share, and one product for both halves of a
gate, left one clip as it was and made 64 slower, so most of the time is the chain's.

Many clips: a program advances `ROWS` clips by tensor cores, each weight that it reads serves all of them, and once
there are as many such programs as multiprocessors each works alone (G = 1), without waits. 132 programs that read
4.9 MB at L2's common 5 TB/s: 130 µs a step; say 250 µs with the latencies: 132 x 16 clips / 250 µs = 8 million
samples/s.

The queues (786 kB a clip) lie in global memory, which for up to about 50 clips means L2, on the chip.
"""

# Inside its kernels Triton's language is not what its annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores.protocols import Picking, prefill
from dfcli.cores.wavenet import Condition, WaveNet, WaveNetConfig
from dfcli.kernels.known import RMS, unknown
from dfcli.system.device import Device
from dfcli.system.events import Note, OnEvent, ignore

ROWS = 16  # clips of one program where there are many: the rows of a tensor core's product
FEW = 16  # clips that are advanced one by one
TILE = 64  # width of the pieces that the skip paths and the head are computed in; they are padded to multiples
WIDEST = 128  # residual channels: a layer's matrices must fit into one multiprocessor's registers
MOST_IDS = 4096  # the pick holds all logits of a program's clips in registers,
WIDE = 1024  # and beyond this many ids a program has one clip
FLAGS = 32  # distance of the flags: each on a cache line of its own


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    """[M, N]. Triton 3.6 takes a field of `Sizes` as an argument, but not as a part of a shape."""
    return tl.zeros([M, N], tl.float32)


@triton.jit
def _product(x, w, total, M: tl.constexpr):
    """total [M, N] + x [M, K] @ w [K, N] in float32 (tf32x3: three tensor core products, exact to about 1e-6)."""
    if M == 1:
        total += tl.sum(tl.trans(x) * w, 0)[None, :]
    else:
        total = tl.dot(x, w, total, input_precision="tf32x3")
    return total


@triton.jit
def _wait(flag, count, G: tl.constexpr):
    """Until `flag` has been raised `count` times; what was stored before can then be loaded."""
    if G > 1:
        while tl.atomic_add(flag, 0, sem="acquire") < count:
            pass


@triton.jit
def _raise(flag, G: tl.constexpr):
    tl.debug_barrier()  # all threads of this program have stored
    if G > 1:
        tl.atomic_add(flag, 1, sem="release")


@triton.jit
def _pick(
    logits, uniforms, picking, V: tl.constexpr, W: tl.constexpr, GREEDY: tl.constexpr, SORTS: tl.constexpr
):  # fmt: skip
    """`sampling.pick`: logits [M, W], uniforms [M] float64 -> ids [M]; picking float32 [4] in memory."""
    temperature, top_p, min_p = tl.load(picking), tl.load(picking + 2), tl.load(picking + 3)
    ids = tl.arange(0, W)[None, :]
    logits = tl.where(ids < V, logits, float("-inf"))
    if GREEDY:
        picked = tl.argmax(logits, 1)
    else:
        weights = tl.exp((logits - tl.max(logits, 1)[:, None]) / temperature)
        if SORTS:  # for top-k and top-p
            top_k = tl.load(picking + 1).to(tl.int32)
            largest = tl.sort(weights, descending=True)
            sums = tl.cumsum(tl.where(ids < top_k, largest, 0.0).to(tl.float64), 1)
            enough = sums >= tl.where(top_p < 1, top_p, 2.0) * tl.max(sums, 1)[:, None]
            count = tl.minimum(1 + tl.sum((~enough).to(tl.int32), 1), top_k)[:, None]
            smallest = tl.sum(tl.where(ids == count - 1, largest, 0.0), 1)[:, None]
            level = (weights == smallest).to(tl.int32)
            room = count - tl.sum((weights > smallest).to(tl.int32), 1)[:, None]
            kept = (weights > smallest) | ((level > 0) & (tl.cumsum(level, 1) <= room))
            weights = tl.where(kept, weights, 0.0)
        weights = tl.where(weights >= min_p, weights, 0.0)
        sums = tl.cumsum(weights.to(tl.float64), 1)
        picked = tl.sum((sums <= (uniforms * tl.max(sums, 1))[:, None]).to(tl.int32), 1)
    return tl.minimum(picked, V - 1)  # whatever the logits are, an id


@triton.jit
def _linear(
    out, x, w, bias, rows, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, RELU: tl.constexpr
):
    """out [.., N] = x [.., K] @ w [K, N] + bias [N] of M rows in memory, piece by piece."""
    wide = tl.arange(0, TILE)
    for start in range(0, N, TILE):
        total = tl.zeros([M, TILE], tl.float32) + tl.load(bias + start + wide)[None, :]
        for k in tl.range(0, K, TILE, num_stages=2):
            piece = tl.load(w + (k + wide)[:, None] * N + start + wide[None, :])
            total = _product(tl.load(x + rows * K + k + wide[None, :]), piece, total, M)
        if RELU:
            total = tl.where(total < 0, 0.0, total)
        tl.store(out + rows * N + start + wide[None, :], total)
    tl.debug_barrier()


class Weights(NamedTuple):
    """Pointers to float32 tensors, padded: P residual and S skip channels, H in the head, W ids."""

    table: Any  # [V, P]
    newest: Any  # [L, 2, P, P]: each layer's newest tap for tanh and sigmoid, [inputs, outputs]
    past: Any  # [L, taps - 1, 2, P, P]: its other taps, oldest first
    residual: Any  # [L, P, P]
    skip: Any  # [L, P, S]
    head1: Any  # [S, H]
    head2: Any  # [H, W]
    biases: Any  # [L, P] of the residual path, then [S], [H] and [W]
    layers: Any  # int32 [L, 3]: dilation, length of the queue, where it begins


class State(NamedTuple):
    """Pointers to what changes while B clips advance."""

    queues: Any  # [B, places, P]: per layer a ring of its inputs
    sums: Any  # [B, L, 2, P]: per layer what the past taps put into the next sample
    gates: Any  # [B, L, P]
    partials: Any  # [G, B, S]: shares of the skip sums
    hidden1: Any  # [B, S]
    hidden2: Any  # [B, H]
    logits: Any  # [B, W]
    flags: Any  # int32


class Chunk(NamedTuple):
    """Pointers to what a launch reads and writes."""

    uniforms: Any  # float64 [B, n]
    rows: Any  # [F, L, 2, P]: the gates' biases
    index: Any  # int32 [B, n]: which of the F rows
    ids: Any  # int64 [B, n]


class Sizes(NamedTuple):
    """Constants of a compilation."""

    V: int
    places: int
    L: int
    taps: int
    R: int
    P: int
    S: int
    H: int
    W: int
    normed: bool
    M: int  # clips of a program
    G: int  # programs that share them
    stages: int = 2  # 2: a layer's weights are fetched while those before are used, if both fit into a multiprocessor
    greedy: bool = False  # how an id is picked; Triton 3.6 takes numbers here, no text
    sorts: bool = False


@triton.jit
def _chain(weights, state, chunk, picking, clips, j, n, t, c: tl.constexpr):
    """1. Pick, embedding, and what each layer needs of the one before: leaves `gates` and `queues`."""
    rows, r = clips[:, None], tl.arange(0, c.P)[None, :]
    square = tl.arange(0, c.P)[:, None] * c.P + r
    logits = tl.load(state.logits + rows * c.W + tl.arange(0, c.W)[None, :])
    picked = _pick(logits, tl.load(chunk.uniforms + clips * n + j), picking, c.V, c.W, c.greedy, c.sorts)
    tl.store(chunk.ids + clips * n + j, picked)
    x = tl.load(weights.table + picked[:, None] * c.P + r)
    told = chunk.rows + tl.load(chunk.index + clips * n + j)[:, None].to(tl.int64) * (2 * c.L * c.P) + r
    for layer in tl.range(0, c.L, num_stages=c.stages):  # with the next layer's weights under way
        h = x
        if c.normed:
            h = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / c.R + 1.1920929e-07)  # as torch's: the step above 1
        length, place = tl.load(weights.layers + 3 * layer + 1), tl.load(weights.layers + 3 * layer + 2)
        tl.store(state.queues + (rows * c.places + place + t % length) * c.P + r, h)
        at, newest = state.sums + (rows * c.L + layer) * 2 * c.P + r, weights.newest + 2 * layer * c.P * c.P + square
        a = tl.load(at) + tl.load(told + 2 * layer * c.P)
        b = tl.load(at + c.P) + tl.load(told + (2 * layer + 1) * c.P)
        a = _product(h, tl.load(newest), a, c.M)
        b = _product(h, tl.load(newest + c.P * c.P), b, c.M)
        gate = (2 * tl.sigmoid(2 * a) - 1) * tl.sigmoid(b)  # tanh by sigmoid
        tl.store(state.gates + (rows * c.L + layer) * c.P + r, gate)
        bias = tl.load(weights.biases + layer * c.P + r)
        x = _product(gate, tl.load(weights.residual + layer * c.P * c.P + square), x + bias, c.M)


@triton.jit
def _shares(weights, state, clips, program, batch, t, c: tl.constexpr, TILE: tl.constexpr):
    """2. Of every G-th layer: its share of the skip sums, and what its past taps put into the next sample."""
    rows, r, wide = clips[:, None], tl.arange(0, c.P)[None, :], tl.arange(0, TILE)[None, :]
    square = tl.arange(0, c.P)[:, None] * c.P + r
    for start in range(0, c.S, TILE):
        total = _zeros(c.M, TILE)
        for layer in tl.range(program, c.L, c.G, num_stages=c.stages):
            gate = tl.load(state.gates + (rows * c.L + layer) * c.P + r)
            w = tl.load(weights.skip + (layer * c.P + tl.arange(0, c.P)[:, None]) * c.S + start + wide)
            total = _product(gate, w, total, c.M)
        tl.store(state.partials + (program * batch + rows) * c.S + start + wide, total)
    for layer in range(program, c.L, c.G):
        dilation, length = tl.load(weights.layers + 3 * layer), tl.load(weights.layers + 3 * layer + 1)
        place = tl.load(weights.layers + 3 * layer + 2)
        for half in range(2):
            total = _zeros(c.M, c.P)
            for tap in range(c.taps - 1):
                moment = place + (t + 1 + tap * dilation) % length
                x = tl.load(state.queues + (rows * c.places + moment) * c.P + r)
                w = tl.load(weights.past + ((layer * (c.taps - 1) + tap) * 2 + half) * c.P * c.P + square)
                total = _product(x, w, total, c.M)
            tl.store(state.sums + ((rows * c.L + layer) * 2 + half) * c.P + r, total)


@triton.jit
def _head(weights, state, clips, batch, c: tl.constexpr, TILE: tl.constexpr):
    """3. The sum of the shares, two layers, `logits`."""
    rows, wide, biases = clips[:, None], tl.arange(0, TILE)[None, :], weights.biases + c.L * c.P
    for start in range(0, c.S, TILE):
        total = _zeros(c.M, TILE) + tl.load(biases + start + wide)
        for share in range(c.G):
            total += tl.load(state.partials + (share * batch + rows) * c.S + start + wide)
        tl.store(state.hidden1 + rows * c.S + start + wide, tl.where(total < 0, 0.0, total))
    tl.debug_barrier()
    _linear(state.hidden2, state.hidden1, weights.head1, biases + c.S, rows, c.S, c.H, c.M, TILE, True)
    _linear(state.logits, state.hidden2, weights.head2, biases + c.S + c.H, rows, c.H, c.W, c.M, TILE, False)


@triton.jit(do_not_specialize=["n", "clock"])
def _samples(
    weights, state, chunk, picking, batch, n, clock, c: tl.constexpr, TILE: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """Picks and reads n samples of each clip, of which `clock` were read before.

    Programs G i .. G i + G - 1 share the clips M i .. M i + M - 1; all programs must run at the same time if G > 1."""
    program, group = tl.program_id(0) % c.G, tl.program_id(0) // c.G
    clips = (group * c.M + tl.arange(0, c.M)).to(tl.int64)
    layers_done = state.flags + 3 * group * FLAGS
    shares_done, head_done = layers_done + FLAGS, layers_done + 2 * FLAGS
    for j in range(n):
        if program == 0:
            _wait(head_done, j, c.G)
            _chain(weights, state, chunk, picking, clips, j, n, clock + j, c)
            _raise(layers_done, c.G)
        _wait(layers_done, j + 1, c.G)
        _shares(weights, state, clips, program, batch, clock + j, c, TILE)
        _raise(shares_done, c.G)
        if program == c.G - 1:
            _wait(shares_done, (j + 1) * c.G, c.G)
            _head(weights, state, clips, batch, c, TILE)
            _raise(head_done, c.G)


def supports(config: WaveNetConfig, device: Device) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    if config.residual > WIDEST or config.vocab_size > MOST_IDS:
        return f"the kernel holds at most {WIDEST} residual channels and {MOST_IDS} ids"
    if torch.cuda.get_device_properties(device.torch_device).major < 8:
        return "the GPU is older than Ampere, and its tensor cores are too old for the kernel"
    return unknown(config)


def build(core: nn.Module, device: Device, exact: bool = True, on_event: OnEvent = ignore) -> Persistent:
    """The engine for a WaveNet in eval mode on a GPU. It is exact whether that is asked for or not."""
    assert isinstance(core, WaveNet)
    on_event(Note("compiling the WaveNet kernel (once for this shape of model)"))
    return Persistent(core, device, torch.cuda.get_device_properties(device.torch_device).multi_processor_count)


class Persistent:
    """`protocols.Engine` of the kernel above; openings are read by the core itself. `processors` programs at most wait
    for each other: as many as the GPU has multiprocessors, so that none waits for one that has not begun."""

    name, reason = "triton", "one kernel on the GPU makes many samples, with the plain engine's picks"

    @torch.no_grad()
    def __init__(self, core: WaveNet, device: Device, processors: int) -> None:
        self._core, self._device = core, device.torch_device
        c, self._processors = core.config, processors
        R, K, L = c.residual, c.kernel, c.layers
        P, W = max(16, triton.next_power_of_2(R)), max(TILE, triton.next_power_of_2(c.vocab_size))
        S, H = (-(-size // TILE) * TILE for size in (c.skip, c.head))
        matrix, bias = core.head2.weight, core.head2.bias
        if isinstance(core.decoder, nn.Linear):  # a linear layer behind another: one
            outer = core.decoder.weight.double()
            matrix, bias = outer @ matrix.double(), outer @ bias.double() + core.decoder.bias

        def stacked(linears: list[nn.Linear], name: str) -> Tensor:
            parameters = [getattr(linear, name) for linear in linears]
            return torch.stack([bias.new_zeros(len(linear.weight)) if p is None else p
                                for linear, p in zip(linears, parameters, strict=True)])  # fmt: skip

        dilated, residual = [x.dilated for x in core.layers], [x.residual for x in core.layers[:-1]]
        taps = stacked(dilated, "weight").view(L, 2, R, K, R).permute(0, 3, 1, 4, 2)  # [L, K, half, input, output]
        taps = _padded(taps, L, K, 2, P, P)
        biases, residuals = matrix.new_zeros(L, P), matrix.new_zeros(L, P, P)  # of the last layer nothing is used
        if residual:
            residuals[:-1, :R, :R] = stacked(residual, "weight").mT
            biases[:-1, :R] = stacked(residual, "bias")
        lengths = [max(1, layer.past) for layer in core.layers]  # of the queues; with one tap they are never read
        places = np.cumsum([0, *lengths])  # where they begin
        head = [_padded(stacked([core.skip], "bias")[0], S), _padded(core.head1.bias, H), _padded(bias, W)]
        weights = Weights(
            _padded(core.entry(core.table.weight), c.vocab_size, P),
            taps[:, -1],
            taps[:, :-1],
            residuals,
            _padded(core.skip.weight.view(c.skip, L, R).permute(1, 2, 0), L, P, S),
            _padded(core.head1.weight.mT, S, H),
            _padded(matrix.mT, H, W),
            torch.cat([part.float() for part in (biases.ravel(), *head)]),
            torch.from_numpy(np.stack([c.all_dilations, lengths, places[:-1]], 1)).to(self._device),
        )
        floats = [tensor.float().contiguous() for tensor in weights[:-1]]
        self._weights = Weights(*floats, weights.layers.to(torch.int32).contiguous())
        stages = 2 if P <= TILE else 1
        normed = RMS[WaveNetConfig][c.norm]
        self._sizes = Sizes(c.vocab_size, int(places[-1]), L, K, R, P, S, H, W, normed, M=1, G=1, stages=stages)

    def start(self, batch: int) -> None:
        c, self._batch, self._clock = self._sizes, batch, 0
        M = 1 if batch <= FEW or c.W > WIDE else ROWS
        self._groups = -(-batch // M)
        G = max(1, min(c.L, self._processors // self._groups))
        self._sizes = c._replace(M=M, G=G)
        B = self._groups * M

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self._device)

        self._state = State(
            zeros(B, c.places, c.P), zeros(B, c.L, 2, c.P), zeros(B, c.L, c.P), zeros(G, B, c.S), zeros(B, c.S),
            zeros(B, c.H), zeros(B, c.W), zeros(3 * self._groups * FLAGS).int(),
        )  # fmt: skip

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64], condition: Condition | None = None) -> None:
        if (ids == ids[:1]).all() and (condition is None or (condition.index == condition.index[:1]).all()):
            ids = ids[:1]  # the same for all: read once
            condition = condition and condition._replace(index=condition.index[:1])
        told = condition and condition.to(self._device)
        start = self._core.init_state(len(ids))
        logits, state = prefill(self._core, torch.from_numpy(ids).to(self._device), start, told)
        self._state.logits[: self._batch, : logits.shape[1]] = logits
        past, R = self._weights.past, self._sizes.R
        for number, (layer, queue) in enumerate(zip(self._core.layers, state.queues, strict=True)):
            place = int(self._weights.layers[number, 2])
            self._state.queues[: self._batch, place : place + layer.past, :R] = queue  # the oldest entry is the first
            for tap in range(layer.kernel - 1):
                x = queue[:, tap * layer.dilation]
                self._state.sums[: self._batch, number] += torch.einsum("br,hrp->bhp", x, past[number, tap, :, :R])
        self._clock = 0

    @torch.inference_mode()
    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None = None
    ) -> NDArray[np.int64]:
        c, n, B = self._sizes, uniforms.shape[1], self._groups * self._sizes.M
        greedy = picking.temperature == 0
        sorts = not greedy and (picking.top_k < c.V or picking.top_p < 1)
        chunk = Chunk(
            torch.zeros((B, n), dtype=torch.float64, device=self._device),
            self._rows(condition),
            torch.zeros((B, n), dtype=torch.int32, device=self._device),
            torch.zeros((B, n), dtype=torch.int64, device=self._device),
        )
        chunk.uniforms[: self._batch] = torch.from_numpy(uniforms)
        if condition is not None:
            chunk.index[: self._batch] = condition.index
        temperature = min(max(picking.temperature, 1e-30), 1e30)  # float32 holds no more
        limits = torch.tensor([temperature, min(picking.top_k, c.V), picking.top_p, picking.min_p], device=self._device)
        self._state.flags.zero_()
        sizes = c._replace(greedy=greedy, sorts=sorts)
        _samples[(self._groups * c.G,)](
            self._weights, self._state, chunk, limits.float(), B, n, self._clock, sizes, TILE, FLAGS,
            num_warps=8, launch_cooperative_grid=c.G > 1,
        )  # fmt: skip
        self._clock += n
        return chunk.ids[: self._batch].cpu().numpy()

    def _rows(self, condition: Condition | None) -> Tensor:
        """The gates' biases, [F, L, 2, P]."""
        c, rows = self._sizes, self._core.gate_biases(condition and condition.to(self._device))
        return _padded(rows.float().transpose(0, 1).unflatten(2, (2, c.R)), rows.shape[1], c.L, 2, c.P).contiguous()

    def finite(self) -> bool:
        return bool(self._state.logits[: self._batch, : self._sizes.V].isfinite().all())


def _padded(tensor: Tensor, *shape: int) -> Tensor:
    """`tensor` with zeros behind it along every axis."""
    out = tensor.new_zeros(shape)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out
