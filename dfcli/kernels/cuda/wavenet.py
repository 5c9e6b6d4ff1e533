"""WaveNet on an NVIDIA GPU: one kernel (Triton) makes a whole chunk of samples, picks included, without a return to the
host. It computes in float32 and so makes the plain engine's picks. Not measured yet: no GPU was at hand.

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
(waits) + 3 (2.) + 10 (head) + 3 (pick) = 45 µs or 22,000 samples/s, to be believed within a factor of 1.5.

Many clips: a program advances `ROWS` clips by tensor cores, each weight that it reads serves all of them, and once
there are as many such programs as multiprocessors each works alone (G = 1), without waits. 132 programs that read
4.9 MB at L2's common 5 TB/s: 130 µs a step; say 250 µs with the latencies: 132 x 16 clips / 250 µs = 8 million
samples/s.

The queues (786 kB a clip) lie in global memory, which for up to about 50 clips means L2, on the chip.
"""

# Inside its kernels Triton's language is not what its annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores.protocols import Picking, prefill
from dfcli.cores.wavenet import WaveNet, WaveNetConfig
from dfcli.system.device import Device
from dfcli.system.events import Note, OnEvent, ignore

ROWS = 16  # clips of one program where there are many: the rows of a tensor core's product
FEW = 16  # clips that are advanced one by one
TILE = 64  # width of the pieces that the skip paths and the head are computed in; they are padded to multiples
WIDEST = 128  # residual channels: a layer's matrices must fit into one multiprocessor's registers
MOST_IDS = 1024  # the pick holds all logits of a program's clips in registers
FLAGS = 32  # distance of the flags: each on a cache line of its own


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
def _pick(logits, uniforms, temperature, top_k, top_p, min_p, V, W: tl.constexpr, MODE: tl.constexpr):
    """`sampling.pick`: logits [M, W], uniforms [M] float64 -> ids [M]."""
    ids = tl.arange(0, W)[None, :]
    logits = tl.where(ids < V, logits, float("-inf"))
    if MODE == "greedy":
        picked = tl.argmax(logits, 1)
    else:
        weights = tl.exp((logits - tl.max(logits, 1)[:, None]) / temperature)
        if MODE == "sorted":  # for top-k and top-p
            largest = tl.sort(weights, descending=True)
            sums = tl.cumsum(tl.where(ids < top_k, largest, 0.0).to(tl.float64), 1)
            enough = (sums >= top_p * tl.max(sums, 1)[:, None]) & (top_p < 1)
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


@triton.jit(do_not_specialize=["n", "clock", "top_k"])
def _samples(
    table, newest, past, residual, skip, head1, head2, biases, head_biases, layers,  # see `Persistent.__init__`
    queues, sums, gates, partials, hidden1, hidden2, logits, flags,  # see `Persistent.start`
    uniforms, ids, n, clock, temperature, top_k, top_p, min_p,
    V, places, batch, L: tl.constexpr, TAPS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, FLAGS: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
    NORMED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Picks and reads n samples of each clip: uniforms [batch, n] float64 -> ids [batch, n]; `clock` were read before.

    Programs G i .. G i + G - 1 share the clips M i .. M i + M - 1; all programs must run at the same time if G > 1."""
    program, group = tl.program_id(0) % G, tl.program_id(0) // G
    clips = (group * M + tl.arange(0, M)).to(tl.int64)
    rows = clips[:, None]
    layers_done = flags + 3 * group * FLAGS
    shares_done, head_done = layers_done + FLAGS, layers_done + 2 * FLAGS
    r, wide, everything = tl.arange(0, P)[None, :], tl.arange(0, TILE)[None, :], tl.arange(0, W)[None, :]
    square = tl.arange(0, P)[:, None] * P + r
    for j in range(n):
        t = clock + j

        if program == 0:
            _wait(head_done, j, G)
            u = tl.load(uniforms + clips * n + j)
            picked = _pick(tl.load(logits + rows * W + everything), u, temperature, top_k, top_p, min_p, V, W, MODE)
            tl.store(ids + clips * n + j, picked)
            x = tl.load(table + picked[:, None] * P + r)
            for layer in tl.range(0, L, num_stages=2):  # with the next layer's weights under way
                h = x
                if NORMED:
                    h = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / R + 1.1920929e-07)  # as torch's: the step above 1
                length, place = tl.load(layers + 3 * layer + 1), tl.load(layers + 3 * layer + 2)
                tl.store(queues + (rows * places + place + t % length) * P + r, h)
                at = (rows * L + layer) * 2 * P + r
                a = _product(h, tl.load(newest + 2 * layer * P * P + square), tl.load(sums + at), M)
                b = _product(h, tl.load(newest + (2 * layer + 1) * P * P + square), tl.load(sums + at + P), M)
                gate = (2 * tl.sigmoid(2 * a) - 1) * tl.sigmoid(b)  # tanh by sigmoid
                tl.store(gates + (rows * L + layer) * P + r, gate)
                bias = tl.load(biases + (3 * layer + 2) * P + r)
                x = _product(gate, tl.load(residual + layer * P * P + square), x + bias, M)
            _raise(layers_done, G)

        _wait(layers_done, j + 1, G)
        for start in range(0, S, TILE):
            total = tl.zeros([M, TILE], tl.float32)
            for layer in tl.range(program, L, G, num_stages=2):
                gate = tl.load(gates + (rows * L + layer) * P + r)
                w = tl.load(skip + (layer * P + tl.arange(0, P)[:, None]) * S + start + wide)
                total = _product(gate, w, total, M)
            tl.store(partials + (program * batch + rows) * S + start + wide, total)
        for layer in range(program, L, G):
            dilation, length = tl.load(layers + 3 * layer), tl.load(layers + 3 * layer + 1)
            place = tl.load(layers + 3 * layer + 2)
            for half in range(2):
                total = tl.zeros([M, P], tl.float32) + tl.load(biases + (3 * layer + half) * P + r)
                for tap in range(TAPS - 1):
                    moment = place + (t + 1 + tap * dilation) % length
                    x = tl.load(queues + (rows * places + moment) * P + r)
                    w = tl.load(past + ((layer * (TAPS - 1) + tap) * 2 + half) * P * P + square)
                    total = _product(x, w, total, M)
                tl.store(sums + ((rows * L + layer) * 2 + half) * P + r, total)
        _raise(shares_done, G)

        if program == G - 1:
            _wait(shares_done, (j + 1) * G, G)
            for start in range(0, S, TILE):
                total = tl.zeros([M, TILE], tl.float32) + tl.load(head_biases + start + wide)
                for share in range(G):
                    total += tl.load(partials + (share * batch + rows) * S + start + wide)
                tl.store(hidden1 + rows * S + start + wide, tl.where(total < 0, 0.0, total))
            tl.debug_barrier()
            _linear(hidden2, hidden1, head1, head_biases + S, rows, S, H, M, TILE, True)
            _linear(logits, hidden2, head2, head_biases + S + H, rows, H, W, M, TILE, False)
            _raise(head_done, G)


def supports(config: WaveNetConfig, device: Device) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    if config.residual > WIDEST or config.vocab_size > MOST_IDS:
        return f"the kernel holds at most {WIDEST} residual channels and {MOST_IDS} ids"
    if config.row:
        return "the kernel takes no conditions yet"
    if torch.cuda.get_device_properties(device.torch_device).major < 8:
        return "the GPU is older than Ampere, and its tensor cores are too old for the kernel"
    return None


def build(core: nn.Module, device: Device, exact: bool = True, on_event: OnEvent = ignore) -> Persistent:
    """The engine for a WaveNet in eval mode on a GPU. It is exact whether that is asked for or not."""
    assert isinstance(core, WaveNet)
    on_event(Note("compiling the WaveNet kernel (once for this shape of model)"))
    return Persistent(core, device, torch.cuda.get_device_properties(device.torch_device).multi_processor_count)


class Persistent:
    """`engines.Engine` of the kernel above; openings are read by the core itself. `processors` programs at most wait
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
        biases = matrix.new_zeros(L, 3, P)  # per layer tanh's, sigmoid's, the residual's
        biases[:, :2, :R] = stacked(dilated, "bias").view(L, 2, R)
        residuals = matrix.new_zeros(L, P, P)  # of the last layer nothing is used
        if residual:
            residuals[:-1, :R, :R] = stacked(residual, "weight").mT
            biases[:-1, 2, :R] = stacked(residual, "bias")
        lengths = [max(1, layer.past) for layer in core.layers]  # of the queues; with one tap they are never read
        places = np.cumsum([0, *lengths])  # where they begin
        layers = np.stack([c.all_dilations, lengths, places[:-1]], 1)
        head_biases = [_padded(stacked([core.skip], "bias")[0], S), _padded(core.head1.bias, H), _padded(bias, W)]
        weights = [
            _padded(core.entry(core.table.weight), c.vocab_size, P),
            taps[:, -1],
            taps[:, :-1],
            residuals,
            _padded(core.skip.weight.view(c.skip, L, R).permute(1, 2, 0), L, P, S),
            _padded(core.head1.weight.mT, S, H),
            _padded(matrix.mT, H, W),
            biases,
            torch.cat([part.float() for part in head_biases]),
        ]
        self._weights = [tensor.float().contiguous() for tensor in weights]
        self._weights.append(torch.from_numpy(layers.astype(np.int32)).to(self._device))
        self._sizes: dict[str, Any] = {
            "V": c.vocab_size, "places": int(places[-1]), "L": L, "TAPS": K, "R": R, "P": P, "S": S, "H": H, "W": W,
            "TILE": TILE, "FLAGS": FLAGS, "NORMED": c.norm == "rmsnorm",
        }  # fmt: skip

    def start(self, batch: int) -> None:
        self._batch, self._clock = batch, 0
        self._M = 1 if batch <= FEW else ROWS
        self._groups = -(-batch // self._M)
        self._G = max(1, min(self._sizes["L"], self._processors // self._groups))
        B = self._groups * self._M
        L, P, S, H, W = (self._sizes[name] for name in "LPSHW")
        shapes = [
            (B, self._sizes["places"], P),  # queues: per layer a ring of its inputs
            (B, L, 2, P),  # sums: per layer, before tanh and sigmoid, without the newest tap
            (B, L, P),  # gates
            (self._G, B, S),  # partials: shares of the skip sums
            (B, S),  # hidden1
            (B, H),  # hidden2
            (B, W),  # logits
        ]
        self._arrays = [torch.zeros(shape, device=self._device) for shape in shapes]
        self._flags = torch.zeros(3 * self._groups * FLAGS, dtype=torch.int32, device=self._device)

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64]) -> None:
        ids = ids[:1] if (ids == ids[:1]).all() else ids  # the same for all: read once
        newest, state = prefill(self._core, torch.from_numpy(ids).to(self._device), self._core.init_state(len(ids)))
        queues, sums, *_, logits = (array[: self._batch] for array in self._arrays)
        logits[:, : newest.shape[1]] = newest
        _, _, past, *_, biases, _, layers = self._weights
        R, place = self._sizes["R"], 0
        for number, (layer, queue) in enumerate(zip(self._core.layers, state.queues, strict=True)):
            place = int(layers[number, 2])
            queues[:, place : place + layer.past, :R] = queue  # the oldest entry is the first
            total = biases[number, :2]
            for tap in range(layer.kernel - 1):
                total = total + torch.einsum("br,hrp->bhp", queue[:, tap * layer.dilation], past[number, tap, :, :R])
            sums[:, number] = total
        self._clock = 0

    @torch.inference_mode()
    def generate(self, uniforms: NDArray[np.float64], picking: Picking) -> NDArray[np.int64]:
        temperature, top_k, top_p, min_p = picking
        mode = "sorted" if top_k < self._sizes["V"] or top_p < 1 else "plain"
        n, B = uniforms.shape[1], self._groups * self._M
        chances = torch.zeros((B, n), dtype=torch.float64, device=self._device)
        chances[: self._batch] = torch.from_numpy(uniforms)
        ids = torch.zeros((B, n), dtype=torch.int64, device=self._device)
        self._flags.zero_()
        _samples[(self._groups * self._G,)](
            *self._weights, *self._arrays, self._flags, chances, ids, n, self._clock,
            min(max(temperature, 1e-30), 1e30), top_k, top_p, min_p, batch=B, M=self._M, G=self._G,
            MODE=mode if temperature else "greedy", **self._sizes,
            num_warps=8, launch_cooperative_grid=self._G > 1,
        )  # fmt: skip
        self._clock += n
        return ids[: self._batch].cpu().numpy()

    def finite(self) -> bool:
        return bool(self._arrays[-1][: self._batch, : self._sizes["V"]].isfinite().all())


def _padded(tensor: Tensor, *shape: int) -> Tensor:
    """`tensor` with zeros behind it along every axis."""
    out = tensor.new_zeros(shape)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out
