"""The character-level WaveNet of makemore, part 5 (Andrej Karpathy, nn-zero-to-hero): a tree that joins two neighbours
at a time, 8 characters -> 4 -> 2 -> 1. Each join is a causal convolution with kernel 2 and dilations 1, 2, 4, then
BatchNorm and tanh; there are no gates, no residual and no skip paths.

It is a core of its own because of BatchNorm: in training only the tree's own positions may be computed
(`last_only=True`), as in the lecture, or the statistics would be those of other positions.

Shapes: B sequences, T positions, E embedding channels, C hidden channels, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks


@dataclass(frozen=True)
class CharWaveNetConfig:
    """Everything that rebuilds a CharWaveNet. Raises ValueError where a value is out of bounds."""

    vocab_size: int = 27
    levels: int = 3  # of the tree; it sees 2 ** levels ids
    embedding: int = 24
    hidden: int = 128

    def __post_init__(self) -> None:
        checks.whole("vocab_size", self.vocab_size, 1, 10_000_000)
        checks.whole("levels", self.levels, 1, 16)
        checks.whole("embedding", self.embedding, 1, 100_000)
        checks.whole("hidden", self.hidden, 1, 100_000)
        checks.affordable(self.parameters())

    @property
    def context(self) -> int:
        """How many ids the model sees."""
        return int(2**self.levels)

    def parameters(self) -> int:
        """Trainable parameters: table, joins without bias, BatchNorm's gain and bias, head."""
        V, E, C = self.vocab_size, self.embedding, self.hidden
        return V * E + 2 * E * C + (self.levels - 1) * 2 * C * C + self.levels * 2 * C + C * V + V

    def flops_per_token(self) -> int:
        """FLOPs of one position's forward pass in a full sequence, a multiply-add counted as 2."""
        V, E, C = self.vocab_size, self.embedding, self.hidden
        return 2 * (2 * E * C + (self.levels - 1) * 2 * C * C + C * V)


class Join(nn.Module):
    """tanh(BatchNorm(linear(two neighbours))). [..., 2 C_in] -> [..., C_out]

    BatchNorm averages over all leading dimensions, as the lecture mends its own, with eps 1e-5 and momentum 0.1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)
        nn.init.normal_(self.linear.weight, std=(2 * inputs) ** -0.5)

    def forward(self, pairs: Tensor) -> Tensor:
        x = self.linear(pairs)
        return torch.tanh(self.norm(x.flatten(0, -2)).view_as(x))


@dataclass
class CharWaveNetState:
    """The newest `context` ids [B, context], oldest first."""

    ids: Tensor = field(default_factory=lambda: torch.zeros((1, 0), dtype=torch.int64))


class CharWaveNet(nn.Module):
    """ids [B, T] -> logits [B, T, V]; position t sees the `context` ids up to and including t. What lies before the
    first id reads as id 0, the boundary that pads each name's start."""

    joins: Sequence[Join]

    def __init__(self, config: CharWaveNetConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.embedding)
        widths = [config.embedding] + [config.hidden] * config.levels
        self.joins = nn.ModuleList(Join(a, b) for a, b in pairwise(widths))  # pyright: ignore[reportAttributeAccessIssue]
        self.head = nn.Linear(config.hidden, config.vocab_size)
        nn.init.normal_(self.head.weight, std=0.1 * config.hidden**-0.5)  # less confident at the start
        nn.init.zeros_(self.head.bias)

    @property
    def context(self) -> int:
        """How many ids the model sees."""
        return self.config.context

    def forward(self, ids: Tensor, positions: Tensor | None = None, last_only: bool = False) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V]. With `last_only` the logits [B, 1, V] of the last position, by the tree
        alone. `positions` [B, T], where given, says how far each id is from its document's start; what lies before
        it reads as id 0."""
        if last_only:
            return self._tree(ids)[:, None]
        if positions is not None:
            return self._windows(ids, positions)
        x = self.table(F.pad(ids, (self.context - 1, 0)))
        for level, join in enumerate(self.joins):
            dilation = 2**level
            x = join(torch.cat((x[:, :-dilation], x[:, dilation:]), dim=-1))
        return self.head(x)

    def _tree(self, ids: Tensor) -> Tensor:
        """The newest `context` ids [B, T] -> logits [B, V]."""
        x = self.table(F.pad(ids[:, -self.context :], (max(0, self.context - ids.shape[1]), 0)))
        for join in self.joins:
            x = join(x.reshape(len(x), x.shape[1] // 2, -1))
        return self.head(x[:, 0])

    def _windows(self, ids: Tensor, positions: Tensor) -> Tensor:
        B, T = ids.shape
        windows = F.pad(ids, (self.context - 1, 0)).unfold(1, self.context, 1)  # [B, T, context]
        behind = torch.arange(self.context - 1, -1, -1, device=ids.device)
        windows = windows.masked_fill(behind > positions[..., None], 0)
        return self._tree(windows.reshape(B * T, -1)).view(B, T, -1)

    def init_state(self, batch: int) -> CharWaveNetState:
        """A state that has seen nothing but id 0."""
        shape = (batch, self.context)
        return CharWaveNetState(torch.zeros(shape, dtype=torch.int64, device=self.table.weight.device))

    def prefill(self, ids: Tensor, state: CharWaveNetState) -> tuple[Tensor, CharWaveNetState]:
        """Feed ids [B, T] at once -> logits [B, V] after the last of them; `state` is updated in place."""
        state.ids = torch.cat((state.ids, ids), dim=1)[:, -self.context :]
        return self._tree(state.ids), state

    def step(self, ids: Tensor, state: CharWaveNetState) -> tuple[Tensor, CharWaveNetState]:
        """Feed one id a sequence, ids [B] -> logits [B, V]; `state` is updated in place."""
        return self.prefill(ids[:, None], state)
