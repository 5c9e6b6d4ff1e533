"""GPT on an NVIDIA GPU: one id, its pick included, is one CUDA graph that is replayed id after id, in float32 and with
the plain engine's picks.

At batch 1 a token reads every weight once: 0.5 GB for `gpt2`, 0.15 ms at an H100's 3.3 TB/s. The plain step launches
about 15 small kernels a layer, in 2.8 ms on an H200 (a graph: 0.8 ms). As a graph they start within 1-2 µs of each
other, and nothing returns to the host until a chunk is done. So a replay must look the same every time:

- The step is the core's, but with a cache of fixed shape: the new key and value go where `position`, a number on the
  GPU, says, and a mask hides what lies beyond. To read no more of the cache than needed, there is a graph for every
  power of two of positions ("span"), each captured when it is first needed.
- The pick is `sampling.pick` in PyTorch, so that the logits stay where they are.
- When the cache is full, the core's own `prefill` reads the next id: by its rule, the newest half of the context is
  read again at once, in the same tensors.

Source: the static cache is gpt-fast's (pytorch-labs, 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dfcli.cores import Condition
from dfcli.cores.gpt import GPT, GPTConfig, GPTState, rotate
from dfcli.cores.protocols import Picking, prefill
from dfcli.kernels.cuda.graph import recorded
from dfcli.kernels.known import unknown
from dfcli.system.device import Device
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.words import first_line

MANY = 256  # heads of all sequences: fused attention gives each to one multiprocessor, and fewer would leave some idle
SPAN = 128  # positions of the cache that the first graph reads; each further one reads twice as many


def pick(logits: Tensor, picking: Picking, uniforms: Tensor) -> Tensor:
    """`generation.sampling.pick` without a copy to the host: logits [B, V], uniforms [B] float64 in [0, 1) -> ids
    [B] int64."""
    size = logits.shape[-1]
    temperature, top_k, top_p, min_p = picking
    top_k = min(top_k, size)
    if temperature == 0:
        return logits.argmax(-1)
    weights = logits - logits.amax(-1, keepdim=True)
    weights = weights.div_(min(max(temperature, 1e-30), 1e30)).exp_()
    if top_k < size or top_p < 1:
        largest = weights.topk(top_k).values
        count = torch.full_like(largest[:, :1], top_k, dtype=torch.int64)
        if top_p < 1:
            sums = largest.cumsum(-1, dtype=torch.float64)
            count = 1 + (sums[:, :-1] < top_p * sums[:, -1:]).sum(-1, keepdim=True)
        smallest = largest.gather(-1, count - 1)
        above, level = weights > smallest, weights == smallest
        weights *= above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    weights *= weights >= min_p
    sums = weights.cumsum(-1, dtype=torch.float64)
    return (sums <= uniforms[:, None] * sums[:, -1:]).sum(-1).clamp_(max=size - 1)


def step(core: GPT, ids: Tensor, position: Tensor, state: GPTState, span: int) -> Tensor:
    """The core's step with everything of fixed shape: reads ids [B] at `position` [1] int64, which must lie below
    `span`, into the cache -> logits [B, V]. It leaves `state.length` alone."""
    config, B = core.config, len(ids)
    D = config.channels // config.heads
    state.ids.index_copy_(1, position, ids[:, None])
    x = core.tokens(ids[:, None])  # [B, 1, C]
    if config.ngrams > 1:
        past = position - torch.arange(config.ngrams - 1, 0, -1, device=ids.device)
        x = x + core.ngrams(ids[:, None], state.ids.index_select(1, past.clamp(min=0)) * (past >= 0))
    if config.position == "learned":
        x = x + core.positions(position)
    hidden = torch.arange(span, device=ids.device) > position
    for layer, block in enumerate(core.blocks):
        q, k, v = block.attention.qkv(block.attention_norm(x)).view(B, 1, 3, config.heads, D).permute(2, 0, 3, 1, 4)
        if config.qk_norm:
            q, k = F.rms_norm(q, (D,)), F.rms_norm(k, (D,))
        if config.position == "rotary":
            angle = core.cos[position], core.sin[position]
            q, k = rotate(q, *angle), rotate(k, *angle)
        keys, values = state.keys[layer], state.values[layer]
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        keys, values = keys[:, :, :span], values[:, :, :span]
        if B * config.heads < MANY:
            scores = (q @ keys.mT * D**-0.5).masked_fill(hidden, float("-inf"))
            y = scores.softmax(-1) @ values
        else:
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=~hidden[None, None, None])
        x = x + block.attention.projection(y.view(B, 1, config.channels))
        x = x + block.mlp(block.mlp_norm(x))
    return core.head(core.norm(x[:, 0]))


def supports(config: GPTConfig, device: Device) -> str | None:
    """None where `build` takes a model of this config, else the reason, a clause."""
    return unknown(config)


def build(core: nn.Module, device: Device, exact: bool = True, on_event: OnEvent = ignore) -> Graphed:
    """The engine for a GPT in eval mode on a GPU. It is exact whether that is asked for or not."""
    assert isinstance(core, GPT)
    return Graphed(core, device, on_event)


class Graphed:
    """`protocols.Engine` that replays `step` and `pick`. B sequences; the cache is the core's own state."""

    name, reason = "cuda-graph", "one graph launch an id, with the plain engine's picks"

    def __init__(self, core: GPT, device: Device, on_event: OnEvent = ignore) -> None:
        self._core, self._device = core, device.torch_device
        self._on_event, self._proven = on_event, False  # proven: a graph was captured

    @torch.inference_mode()
    def start(self, batch: int) -> None:
        self._state = self._core.init_state(batch)
        self._position = torch.zeros(1, dtype=torch.int64, device=self._device)  # state.length, on the GPU
        self._next = torch.zeros((batch, self._core.config.vocab_size), device=self._device)  # logits
        self._uniforms = torch.zeros(batch, dtype=torch.float64, device=self._device)
        self._ids = torch.zeros(batch, dtype=torch.int64, device=self._device)
        self._replays: dict[tuple[int, Picking], Callable[[], object]] = {}

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64], condition: Condition | None = None) -> None:
        self._read(prefill(self._core, torch.from_numpy(ids).to(self._device), self._state))

    @torch.inference_mode()
    def generate(
        self, uniforms: NDArray[np.float64], picking: Picking, condition: Condition | None = None
    ) -> NDArray[np.int64]:
        chances = torch.from_numpy(uniforms).to(self._device)
        picked = torch.empty(uniforms.shape, dtype=torch.int64, device=self._device)
        for j in range(uniforms.shape[1]):
            self._uniforms.copy_(chances[:, j])
            if self._state.length == self._core.context:
                self._ids.copy_(pick(self._next, picking, self._uniforms))
                self._read(self._core.step(self._ids, self._state))
            else:
                self._replay(picking)
                self._state.length += 1
            picked[:, j] = self._ids
        return picked.cpu().numpy()

    def finite(self) -> bool:
        return bool(self._next.isfinite().all())

    def _read(self, result: tuple[Tensor, Any]) -> None:
        logits, self._state = result
        self._next.copy_(logits)
        self._position.fill_(self._state.length)

    def _replay(self, picking: Picking) -> None:
        """Picks an id a sequence by `_uniforms` into `_ids`, and reads it."""
        span = SPAN
        while span <= self._state.length:
            span *= 2
        span = min(span, self._core.context)

        def advance() -> None:
            self._ids.copy_(pick(self._next, picking, self._uniforms))
            self._next.copy_(step(self._core, self._ids, self._position, self._state, span))
            self._position.add_(1)

        if (span, picking) not in self._replays:
            self._replays[span, picking] = self._captured(advance)
        self._replays[span, picking]()

    def _captured(self, advance: Callable[[], None]) -> Callable[[], object]:
        """A graph's replay in place of `advance`, whose state is as it was; `advance` itself where it cannot be
        captured."""
        before = self._next.clone(), self._position.clone()
        try:
            graph, _ = recorded(advance)
        except RuntimeError as error:
            if not self._proven:
                raise
            self._on_event(Note(f"without a CUDA graph from here on, which is slower ({first_line(error)})"))
            return advance
        finally:
            self._next.copy_(before[0])
            self._position.copy_(before[1])
        self._proven = True
        return graph.replay
