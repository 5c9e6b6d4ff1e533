"""GPT: a decoder-only transformer over token ids.

One module covers the published models and the modern ones by a few orthogonal choices:
- positions: learned (GPT, GPT-2) or rotary (Su et al. 2021, arXiv 2104.09864)
- norm before each block: LayerNorm, or RMSNorm without gain (Zhang & Sennrich 2019, arXiv 1910.07467)
- activation: ReLU, GELU by erf (nanoGPT), GELU by tanh (GPT-2), squared ReLU (So et al. 2021, arXiv 2109.08668)
- biases or none, tied or untied head, QK-norm, dropout
- n-gram tables or none: the last 2, 3, ... ids looked up together
- init: as published for GPT-2, as in the lecture, torch's own (makemore), or with zeroed projections

Shapes: B sequences, T positions, C channels, H heads, D = C / H channels a head, V ids, L layers.
Sources: Radford et al. 2019 (GPT-2) and Andrej Karpathy's nanoGPT, makemore and video lecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks


def _square(x: Tensor) -> Tensor:
    return x * x  # in x's precision, where autocast would take a power in float32


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: _square(F.relu(x)),
}


NGRAM_ROWS = 32_749  # a prime


@dataclass(frozen=True)
class GPTConfig:
    """Everything that rebuilds a GPT. Raises ValueError where a value is out of bounds."""

    vocab_size: int
    context: int = 256  # how many ids it sees
    layers: int = 6
    heads: int = 6
    channels: int = 384
    position: str = "learned"  # learned | rotary
    norm: str = "layernorm"  # layernorm | rmsnorm
    activation: str = "gelu"  # relu | gelu | gelu_tanh | relu2
    bias: bool = True  # in the linear layers and LayerNorm
    qkv_bias: bool = True  # in the query, key and value projections
    head_bias: bool = False
    tied_head: bool = True  # the head is the token table
    qk_norm: bool = False  # RMSNorm on queries and keys
    dropout: float = 0.0
    embedding_dropout: bool = True  # dropout on the embeddings too (nanoGPT yes, the lecture no)
    ngrams: int = 1  # 2 to 8: tables for the last 2, ... ids together; 1: none
    ngram_dropout: float = 0.0  # of whole n-grams
    init: str = "gpt2"  # gpt2 | normal | torch | zero

    def __post_init__(self) -> None:
        checks.whole("vocab_size", self.vocab_size, 1, 10_000_000)
        checks.whole("context", self.context, 1, 1_000_000)
        checks.whole("layers", self.layers, 1, 1000)
        checks.whole("heads", self.heads, 1, 1000)
        checks.whole("channels", self.channels, 1, 100_000)
        checks.choice("position", self.position, ("learned", "rotary"))
        checks.choice("norm", self.norm, ("layernorm", "rmsnorm"))
        checks.choice("activation", self.activation, ACTIVATIONS)
        checks.choice("init", self.init, ("gpt2", "normal", "torch", "zero"))
        checks.whole("ngrams", self.ngrams, 1, 8)
        for name in ("bias", "qkv_bias", "head_bias", "tied_head", "qk_norm", "embedding_dropout"):
            checks.flag(name, getattr(self, name))
        if self.channels % self.heads:
            raise ValueError(f"channels ({self.channels}) must be a multiple of heads ({self.heads})")
        if self.position == "rotary" and (self.channels // self.heads) % 2:
            raise ValueError("rotary positions need an even number of channels a head")
        for name in ("dropout", "ngram_dropout"):
            share = getattr(self, name)
            if not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {share!r}")
        table = self.context * self.channels // self.heads if self.position == "rotary" else 0
        checks.affordable(self.parameters() + table)

    @property
    def ngram_rows(self) -> tuple[int, ...]:
        """Rows of the tables for 2, ... `ngrams` ids: one for each n-gram there can be, or at most NGRAM_ROWS."""
        return tuple(min(self.vocab_size**n, NGRAM_ROWS) for n in range(2, self.ngrams + 1))

    def parameters(self) -> int:
        """Trainable parameters: tied weights once, position and n-gram tables included."""
        C, V = self.channels, self.vocab_size
        norm = {"layernorm": C * (1 + self.bias), "rmsnorm": 0}[self.norm]
        attention = 3 * C * (C + self.qkv_bias) + C * (C + self.bias)
        mlp = 4 * C * (C + self.bias) + C * (4 * C + self.bias)
        positions = self.context * C if self.position == "learned" else 0
        head = (0 if self.tied_head else V * C) + V * self.head_bias
        tables = V + sum(self.ngram_rows)
        return tables * C + positions + self.layers * (attention + mlp + 2 * norm) + norm + head

    def flops_per_token(self) -> int:
        """FLOPs of one position's forward pass, a multiply-add counted as 2: the matrix products and
        the causal half of attention, averaged over a full context. A training step costs about 3 times this."""
        C = self.channels
        attention = 2 * C * (self.context + 1)  # scores and weighted sum over (context + 1) / 2 ids
        return self.layers * (2 * 12 * C * C + attention) + 2 * C * self.vocab_size


class Norm(nn.Module):
    """LayerNorm with or without bias, or RMSNorm without gain. [..., C] -> [..., C]"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.rms = {"layernorm": False, "rmsnorm": True}[config.norm]
        self.weight = None if self.rms else nn.Parameter(torch.ones(config.channels))
        self.bias = nn.Parameter(torch.zeros(config.channels)) if config.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, (self.channels,))
        return F.layer_norm(x, (self.channels,), self.weight, self.bias, 1e-5)


def rotary_table(context: int, channels: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [context, channels / 2]."""
    frequency = base ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by their position's angle. x [B, H, T, D]; cos, sin [T, D/2]"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class NGrams(nn.Module):
    """What an id means after those before it, from a table in place of a layer: the embeddings of the last 2, ... n ids
    together, summed. Where a table has fewer rows than there are n-grams, several share one (the hash is the remainder
    of the n-gram's number). Dropout leaves out whole n-grams, so that the model cannot rely on having seen the longest.
    Source: over-encoding, Huang et al. 2025, arXiv 2501.16975."""

    tables: Sequence[nn.Embedding]

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.tables = nn.ModuleList(nn.Embedding(rows, config.channels) for rows in config.ngram_rows)  # pyright: ignore[reportAttributeAccessIssue]
        self.dropout = nn.Dropout1d(config.ngram_dropout)

    def forward(self, ids: Tensor, before: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids [B, T] after the ids `before` [B, S] -> [B, T, C]. Beyond these, and before a document's start
        (`positions` [B, T]), stand zeros."""
        n, T = len(self.tables), ids.shape[1]
        history = F.pad(torch.cat((before, ids), dim=1), (n, 0))
        number, total = ids, 0
        for k, table in enumerate(self.tables, 1):
            earlier = history[:, history.shape[1] - T - k : history.shape[1] - k]
            if positions is not None:
                earlier = earlier * (positions >= k)
            number = number * self.vocab_size + earlier
            total = total + self.dropout(table(number % table.num_embeddings))
        assert isinstance(total, Tensor)
        return total


@dataclass
class GPTState:
    """What a GPT remembers between steps: keys and values of every layer, and the ids they came from."""

    keys: Tensor  # [L, B, H, context, D]
    values: Tensor  # [L, B, H, context, D]
    ids: Tensor  # [B, context] int64
    length: int = 0  # positions filled


class Attention(nn.Module):
    """Causal multi-head self-attention. [B, T, C] -> [B, T, C]"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.qk_norm, self.dropout = config.heads, config.qk_norm, config.dropout
        self.qkv = nn.Linear(config.channels, 3 * config.channels, bias=config.qkv_bias)
        self.projection = nn.Linear(config.channels, config.channels, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """`mask` [B or 1, 1, T, K] bool says which of the K keys a query sees; None means causal.
        `cache` holds the keys and values [B, H, context, D] of the positions before `start`, and takes the new ones."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = F.rms_norm(q, (q.shape[-1],)), F.rms_norm(k, (k.shape[-1],))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            keys, values = cache
            keys[:, :, start : start + T] = k
            values[:, :, start : start + T] = v
            k, v = keys[:, :, : start + T], values[:, :, : start + T]
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.projection(y.transpose(1, 2).reshape(B, T, C))


class Head(nn.Linear):
    """The output layer. Under autocast its products are made for whole groups of GROUP ids: with 50,257 ids they run at
    92 TFLOP/s, with 50,304 at 700 (H200, bfloat16). [..., C] -> [..., V]"""

    GROUP = 64

    def forward(self, input: Tensor) -> Tensor:
        spare = -self.out_features % self.GROUP
        if not spare or not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        bias = None if self.bias is None else F.pad(self.bias, (0, spare))
        return F.linear(input, F.pad(self.weight, (0, 0, 0, spare)), bias)[..., : self.out_features]


class MLP(nn.Module):
    """Two linear layers with an activation between, four times as wide inside. [B, T, C] -> [B, T, C]"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.channels, 4 * config.channels, bias=config.bias)
        self.projection = nn.Linear(4 * config.channels, config.channels, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.activation(self.expansion(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, T, C] -> [B, T, C]"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *attention_arguments) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), *attention_arguments))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """ids [B, T] -> logits [B, T, V]; position t sees ids up to and including t, never beyond."""

    blocks: Sequence[Block]
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.channels)
        if config.position == "learned":
            self.positions = nn.Embedding(config.context, config.channels)
        else:
            cos, sin = rotary_table(config.context, config.channels // config.heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if config.ngrams > 1:
            self.ngrams = NGrams(config)
        self.dropout = nn.Dropout(config.dropout if config.embedding_dropout else 0.0)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))  # pyright: ignore[reportAttributeAccessIssue]
        self.norm = Norm(config)
        self.head = Head(config.channels, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.tokens.weight
        self.initialise()

    @property
    def context(self) -> int:
        """How many ids the model can see."""
        return self.config.context

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the initial weights from torch's global generator.

        gpt2: N(0, 0.02), biases 0, projections into the residual stream divided by sqrt(2 L) (GPT-2 paper, 2.3).
        normal: N(0, 0.02), biases 0 (the video lecture). torch: torch's defaults (makemore).
        zero: N(0, 1 / sqrt(fan in)) with projections into the residual stream and the untied head at zero, so that
        each block starts as the identity; tokens N(0, 1), or N(0, 0.02) where the head is tied (modded-nanogpt).
        The n-gram tables always start at zero."""
        kind = self.config.init
        if self.config.ngrams > 1:
            for table in self.ngrams.tables:
                nn.init.zeros_(table.weight)
        if kind == "torch":
            return
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if kind == "zero" else 0.02
                if name.endswith("projection"):
                    std *= {"gpt2": (2 * self.config.layers) ** -0.5, "zero": 0.0}.get(kind, 1.0)
                if kind == "zero" and module is self.head:
                    std = 0.0
                if not (module is self.head and self.config.tied_head):
                    nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding) and not name.startswith("ngrams"):
                nn.init.normal_(module.weight, std=1.0 if kind == "zero" and not self.config.tied_head else 0.02)

    def forward(self, ids: Tensor, positions: Tensor | None = None, last_only: bool = False) -> Tensor:
        """ids [B, T] int64, T <= context -> logits [B, T, V], or [B, 1, V] of the last position with `last_only`.

        `positions` [B, T] says how far each id is from the start of its document, where a row holds several: none sees
        ids before its document's start."""
        T = ids.shape[1]
        if T > self.context:
            raise ValueError(f"{T} ids are more than the context of {self.context}")
        mask = None
        if positions is not None:
            behind = torch.arange(T, device=ids.device)[:, None] - torch.arange(T, device=ids.device)
            mask = ((behind >= 0) & (behind <= positions[:, :, None]))[:, None]
        x = self._embed(ids, ids[:, :0], positions)
        rotary = self._rotary(0, T)
        for block in self.blocks:
            x = block(x, rotary, mask)
        return self.head(self.norm(x[:, -1:] if last_only else x))

    def _embed(self, ids: Tensor, before: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids [B, T], after the ids `before` [B, S] of the same context -> [B, T, C]"""
        x = self.tokens(ids)
        if self.config.ngrams > 1:
            x = x + self.ngrams(ids, before, positions)
        if self.config.position == "learned":
            if positions is None:
                start = before.shape[1]
                positions = torch.arange(start, start + ids.shape[1], device=ids.device)
            x = x + self.positions(positions)
        return self.dropout(x)

    def _rotary(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        return (self.cos[start:stop], self.sin[start:stop]) if self.config.position == "rotary" else None

    def init_state(self, batch: int) -> GPTState:
        """An empty cache for `batch` sequences, on the model's device."""
        c, device = self.config, self.tokens.weight.device
        shape = (c.layers, batch, c.heads, c.context, c.channels // c.heads)
        return GPTState(
            keys=torch.zeros(shape, device=device),
            values=torch.zeros(shape, device=device),
            ids=torch.zeros((batch, c.context), dtype=torch.int64, device=device),
        )

    def prefill(self, ids: Tensor, state: GPTState) -> tuple[Tensor, GPTState]:
        """Feed ids [B, T] at once -> logits [B, V] after the last of them. Of ids beyond the context only the
        newest are kept; a full cache keeps the newest half of the context, which is computed again."""
        C = self.context
        if state.length + ids.shape[1] > C:
            # Learned positions cannot slide, so the rule is one for all: start anew with the newest half, and pay for
            # it once in context / 2 ids. Fed id by id or all at once, the same ids are kept.
            history = torch.cat((state.ids[:, : state.length], ids), dim=1)
            half = max(1, C // 2)
            keep = half + (history.shape[1] - C - 1) % (C - half + 1)
            ids, state.length = history[:, -keep:], 0
        start, T = state.length, ids.shape[1]
        mask = None
        if start and T > 1:
            mask = torch.ones((T, start + T), dtype=torch.bool, device=ids.device).tril(start)[None, None]
        x = self._embed(ids, state.ids[:, :start])
        rotary = self._rotary(start, start + T)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, mask, (state.keys[i], state.values[i]), start)
        state.ids[:, start : start + T] = ids
        state.length = start + T
        return self.head(self.norm(x[:, -1])), state

    def step(self, ids: Tensor, state: GPTState) -> tuple[Tensor, GPTState]:
        """Feed one id a sequence, ids [B] -> logits [B, V]; `state` is updated in place."""
        return self.prefill(ids[:, None], state)
