"""GPT on a CPU: the whole step, pick included, is one compiled function (numba) that makes a chunk of ids a call. It
gives the plain step's logits to 1e-4. In a small model this saves the overhead of PyTorch's calls, which is most of its
step; in a large one the weights come from memory as fast as one core can read, half again as fast as by PyTorch's
matrix-vector product.

- The weights lie in the order in which they are read, in tiles (see `gemm.py`); the gains and biases of a norm are
  multiplied into the linear layer behind it.
- Keys are kept as [D, context] for each head, so that a query's products with all of them are sums of rows.
- When the cache is full, the core's own rule decides what is read again, by its own `prefill`.
- Several sequences: each core takes its share of them, and each weight that is read serves two.

PyTorch's step reads with all cores, which pays for large models where there are more than `FEW` of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy import uintp
from numpy.typing import NDArray
from torch import nn

from dfcli.cores import Condition
from dfcli.cores.gpt import GPT, GPTConfig, GPTState, Norm
from dfcli.cores.protocols import Picking
from dfcli.kernels.compile import Compiled, inner
from dfcli.kernels.gemm import join, multiply, pad, padded, tiles
from dfcli.kernels.known import RMS, unknown
from dfcli.kernels.ops import (
    ACTIVATIONS,
    ONE,
    activate,
    add,
    copy,
    exp_sum,
    largest,
    layer_norm,
    norm,
    rotate,
    set_rows,
)
from dfcli.kernels.pick import pick
from dfcli.kernels.threads import ThreadedEngine
from dfcli.system.device import Device
from dfcli.system.events import OnEvent, ignore

FEW = 2  # cores
LARGE = 64 * 2**20  # bytes of weights: more than most processors' caches hold
LARGEST = 2 * 2**30  # bytes of weights that there is room for once more


class _Model(NamedTuple):
    """Everything that does not change. C channels and M = 4 C inside the MLP, in whole tiles; H heads of D; V ids."""

    tokens: NDArray[np.float32]  # [V, C]
    positions: NDArray[np.float32]  # [context, C], zeros where they are rotary
    ngrams: NDArray[np.float32]  # flat: the rows of every n-gram table, [C] each
    ngram_rows: NDArray[np.int64]  # of each table
    cos: NDArray[np.float32]  # [context, D / 2]
    sin: NDArray[np.float32]
    weights: NDArray[np.float32]  # per layer qkv [3 C, C], projection [C, C], MLP [M, C] and [C, M]; head [V, C]
    biases: NDArray[np.float32]  # per layer [3 C], [C], [M], [C]; head [V]
    channels: int  # without padding
    inside: int  # of the MLP, in whole tiles
    heads: int
    context: int
    vocab_size: int
    rms: bool  # RMSNorm, otherwise LayerNorm
    qk_norm: bool
    rotary: bool
    activation: int  # its place in ACTIVATIONS


class _State(NamedTuple):
    """What changes while B sequences advance together. All arrays are flat."""

    length: NDArray[np.int64]  # [1]: positions read
    recent: NDArray[np.int64]  # [B, n-gram tables]: the last ids read, the newest first; zeros where there are none
    keys: NDArray[np.float32]  # [L, B, H, D, context]
    values: NDArray[np.float32]  # [L, B, H, context, D]
    logits: NDArray[np.float32]  # [B, V in whole tiles]
    # Scratch:
    stream: NDArray[np.float32]  # [B, C]: the residual path
    normed: NDArray[np.float32]  # [B, C]
    qkv: NDArray[np.float32]  # [B, 3 C]
    mixed: NDArray[np.float32]  # [B, C]: values, weighed by attention
    inside: NDArray[np.float32]  # [B, M]
    scores: NDArray[np.float32]  # [context]
    weights: NDArray[np.float32]  # [V]: of the pick


@inner
def _norm(model, state, B):
    """state.normed = the norm of state.stream; its gain and bias are in the weights behind it."""
    C = model.tokens.shape[1]
    for b in range(B):
        if model.rms:
            norm(state.normed, b * C, state.stream, b * C, model.channels)
        else:
            layer_norm(state.normed, b * C, state.stream, b * C, model.channels)


@inner
def _attend(out, o, q, i, D, keys, k, values, v, context, count, scores):
    """out[o : o + D] = the mean of `count` values, weighed by softmax of their keys times the query q[i : i + D]."""
    for t in range(count):
        scores[uintp(t)] = 0
    for d in range(D):
        factor = q[uintp(i + d)]
        for t in range(count):
            scores[uintp(t)] += factor * keys[uintp(k + d * context + t)]
    total = exp_sum(scores, 0, count, np.float32(1 / np.sqrt(D)), largest(scores, 0, count))
    for d in range(D):
        out[uintp(o + d)] = 0
    for t in range(count):
        share = scores[uintp(t)] / total
        for d in range(D):
            out[uintp(o + d)] += share * values[uintp(v + t * D + d)]


@inner
def _embed(model, state, b, id):
    """state.stream of sequence b = the embedding of `id` after those read."""
    C, number, row = model.tokens.shape[1], id, 0
    copy(state.stream, b * C, model.tokens.ravel(), id * C, C)
    add(state.stream, b * C, model.positions.ravel(), state.length[0] * C, C)
    tables = model.ngram_rows.size
    for k in range(tables):
        number = number * model.vocab_size + state.recent[b * tables + k]
        add(state.stream, b * C, model.ngrams, (row + number % model.ngram_rows[k]) * C, C)
        row += model.ngram_rows[k]
    for k in range(tables - 1, 0, -1):
        state.recent[b * tables + k] = state.recent[b * tables + k - 1]
    if tables:
        state.recent[b * tables] = id


@inner
def _step(model, state, B):
    """Reads one id a sequence, whose embedding stands in state.stream, and leaves the logits after it."""
    zero, C, M, H, T = np.int64(0), model.tokens.shape[1], model.inside, model.heads, model.context
    D, L, W = model.channels // model.heads, state.keys.size // (B * model.channels * T), state.logits.size // B
    weights, biases, stream, qkv, inside = model.weights, model.biases, state.stream, state.qkv, state.inside
    t, w, c = state.length[0], zero, 0
    for layer in range(L):
        _norm(model, state, B)
        set_rows(qkv, 0, 3 * C, biases, c, B, 3 * C)
        w = multiply(qkv, zero, 3 * C, state.normed, zero, C, B, weights, w, 3 * C, C)
        for b in range(B):
            for head in range(H):
                q = b * 3 * C + head * D
                k, v = q + C, q + 2 * C
                if model.qk_norm:
                    norm(qkv, q, qkv, q, D)
                    norm(qkv, k, qkv, k, D)
                if model.rotary:
                    rotate(qkv, q, D, model.cos, model.sin, t * (D // 2), ONE)
                    rotate(qkv, k, D, model.cos, model.sin, t * (D // 2), ONE)
                cache = ((layer * B + b) * H + head) * D * T
                for d in range(D):
                    state.keys[uintp(cache + d * T + t)] = qkv[uintp(k + d)]
                copy(state.values, cache + t * D, qkv, v, D)
                _attend(
                    state.mixed, b * C + head * D, qkv, q, D, state.keys, cache, state.values, cache, T, t + 1,
                    state.scores,
                )  # fmt: skip
        for b in range(B):
            add(stream, b * C, biases, c + 3 * C, C)
        w = multiply(stream, zero, C, state.mixed, zero, C, B, weights, w, C, C)
        _norm(model, state, B)
        set_rows(inside, 0, M, biases, c + 4 * C, B, M)
        w = multiply(inside, zero, M, state.normed, zero, C, B, weights, w, M, C)
        activate(inside, 0, inside, 0, B * M, model.activation)
        for b in range(B):
            add(stream, b * C, biases, c + 4 * C + M, C)
        w = multiply(stream, zero, C, inside, zero, M, B, weights, w, C, M)
        c += 5 * C + M
    _norm(model, state, B)
    set_rows(state.logits, 0, W, biases, c, B, W)
    multiply(state.logits, zero, W, state.normed, zero, C, B, weights, w, W, C)
    state.length[0] = t + 1


def gpt_tokens(model, state, uniforms, temperature, top_k, top_p, min_p, ids):
    """Picks and reads n ids of each sequence: uniforms [B, n] -> ids [B, n]; and returns n. When the cache is full it
    ends with ids that are picked and not read: it returns how many came before these."""
    B, n = uniforms.shape
    W = state.logits.size // B
    for j in range(n):
        full = state.length[0] == model.context
        for b in range(B):
            logits = state.logits[b * W : b * W + model.vocab_size]
            ids[b, j] = pick(logits, uniforms[b, j], temperature, top_k, top_p, min_p, state.weights)
            if not full:
                _embed(model, state, b, ids[b, j])
        if full:
            return j
        _step(model, state, B)
    return n


_tokens = Compiled(gpt_tokens, [__file__])


def supports(config: GPTConfig, device: Device) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    if 4 * config.parameters() > (LARGE if device.threads > FEW else LARGEST):
        return "PyTorch reads weights of this size faster, with all CPUs"
    return unknown(config)


def build(core: nn.Module, device: Device, exact: bool = True, on_event: OnEvent = ignore) -> ThreadedEngine:
    """The engine for a GPT in eval mode on the CPU. It is exact whether that is asked for or not. Raises what numba
    raises where it cannot compile."""
    assert isinstance(core, GPT)
    model = _model(core)
    _tokens.load(
        on_event, model, _state(model, core, 1), np.empty((1, 0)), 1.0, 1, 1.0, 0.0, np.empty((1, 0), np.int64)
    )
    reason = "compiled for this processor; it makes the same samples as the plain engine"
    return ThreadedEngine("numba", reason, lambda size: _Sequences(core, model, size), device.threads)


class _Sequences:
    """Sequences that one thread advances (`threads.Sequences`)."""

    def __init__(self, core: GPT, model: _Model, size: int) -> None:
        self._core, self._model = core, model
        self._state = _state(model, core, size)
        self._ids = np.empty((size, core.context), np.int64)  # that the cache was made of

    @property
    def logits(self) -> NDArray[np.float32]:
        return self._state.logits.reshape(len(self._ids), -1)

    def prefill(self, ids: NDArray[np.int64], condition: Condition | None = None) -> None:
        self._read(ids, self._core.init_state(len(ids)))

    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None = None
    ) -> NDArray[np.int64]:
        B, n = uniforms.shape
        ids = np.empty((B, n), np.int64)
        done = 0
        while done < n:
            made = np.empty((B, n - done), np.int64)
            rolls = np.ascontiguousarray(uniforms[:, done:])
            count = _tokens(self._model, self._state, rolls, *picking, made)
            ids[:, done : done + count + 1] = made[:, : count + 1]
            end = self._state.length[0]
            self._ids[:, end - count : end] = made[:, :count]
            done += count
            if done < n:  # the cache is full, and the newest ids are not read yet
                state = self._core.init_state(B)
                state.ids.copy_(torch.from_numpy(self._ids))
                state.length = end.item()
                self._read(ids[:, done : done + 1], state)
                done += 1
        return ids

    @torch.inference_mode()
    def _read(self, ids: NDArray[np.int64], state: GPTState) -> None:
        """Lets the core read ids [B, T] after `state`, by its own rule where the cache is full, and takes over the
        result."""
        logits, state = self._core.prefill(torch.from_numpy(ids), state)
        L, _, H, T, D = state.keys.shape
        B, n = len(self._ids), state.length
        self._state.length[0] = n
        self._state.keys.reshape(L, B, H, D, T)[..., :n] = state.keys[:, :, :, :n].transpose(-1, -2).numpy()
        self._state.values.reshape(L, B, H, T, D)[:, :, :, :n] = state.values[:, :, :, :n].numpy()
        self.logits[:, : logits.shape[1]] = logits.numpy()
        self._ids[:, :n] = state.ids[:, :n].numpy()
        recent = self._state.recent.reshape(B, -1)
        kept = min(n, recent.shape[1])
        recent[:, :kept], recent[:, kept:] = self._ids[:, n - kept : n][:, ::-1], 0


@torch.no_grad()
def _model(core: GPT) -> _Model:
    """The core's weights in the layout of `_Model`."""
    config = core.config
    channels, V = config.channels, config.vocab_size
    C, M, W = padded(channels), padded(4 * channels), padded(V)
    weights, biases = [], []

    def place(linear: nn.Linear, norm: Norm | None, parts: int, outputs: int, inputs: int) -> None:
        """The layer's weights and bias, with the norm before it in them; `parts` equal parts of its outputs are padded
        to `outputs` each."""
        weight = linear.weight.double()
        bias = torch.zeros(len(weight)).double() if linear.bias is None else linear.bias.double()
        if norm is not None and norm.weight is not None:
            if norm.bias is not None:
                bias = bias + weight @ norm.bias.double()
            weight = weight * norm.weight.double()
        matrix = weight.float().numpy().reshape(parts, -1, weight.shape[1])
        weights.append(tiles(pad(matrix, parts, outputs, inputs).reshape(parts * outputs, inputs)))
        biases.append(pad(bias.float().numpy().reshape(parts, -1), parts, outputs).ravel())

    for block in core.blocks:
        place(block.attention.qkv, block.attention_norm, 3, C, C)
        place(block.attention.projection, None, 1, C, C)
        place(block.mlp.expansion, block.mlp_norm, 1, M, C)
        place(block.mlp.projection, None, 1, C, M)
    place(core.head, core.norm, 1, W, C)
    rotary = config.position == "rotary"
    positions = np.zeros((config.context, C), np.float32)
    if not rotary:
        positions[:, :channels] = core.positions.weight.numpy()
    tables = core.ngrams.tables if config.ngrams > 1 else []
    ngrams = [pad(table.weight.numpy(), table.num_embeddings, C).ravel() for table in tables]
    return _Model(
        tokens=pad(core.tokens.weight.numpy(), V, C),
        positions=positions,
        ngrams=np.concatenate(ngrams) if ngrams else np.zeros(0, np.float32),
        ngram_rows=np.array(config.ngram_rows, np.int64),
        cos=core.cos.numpy().ravel() if rotary else np.zeros(0, np.float32),
        sin=core.sin.numpy().ravel() if rotary else np.zeros(0, np.float32),
        weights=join(weights),
        biases=np.concatenate(biases),
        channels=channels,
        inside=M,
        heads=config.heads,
        context=config.context,
        vocab_size=V,
        rms=RMS[GPTConfig][config.norm],
        qk_norm=config.qk_norm,
        rotary=rotary,
        activation=ACTIVATIONS.index(config.activation),
    )


def _state(model: _Model, core: GPT, batch: int) -> _State:
    """An empty cache for `batch` sequences."""
    C, cache = model.tokens.shape[1], core.config.layers * model.context * model.channels

    def zeros(size: int) -> NDArray[np.float32]:
        return np.zeros(batch * size, np.float32)

    return _State(
        length=np.zeros(1, np.int64),
        recent=np.zeros(batch * model.ngram_rows.size, np.int64),
        keys=zeros(cache),
        values=zeros(cache),
        logits=zeros(padded(model.vocab_size)),
        stream=zeros(C),
        normed=zeros(C),
        qkv=zeros(3 * C),
        mixed=zeros(C),
        inside=zeros(model.inside),
        scores=np.zeros(model.context, np.float32),
        weights=np.zeros(model.vocab_size, np.float32),
    )
