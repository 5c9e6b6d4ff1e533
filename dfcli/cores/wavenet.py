"""WaveNet: a stack of dilated causal convolutions with gates, residual and skip paths (van den Oord et al. 2016,
arXiv 1609.03499), over token ids: 256 mu-law levels for audio, or any other vocabulary.

Each layer looks `dilation` positions back, and dilations double, so the receptive field grows exponentially with depth.
The tensors are laid out [B, T, C] and a convolution is a linear layer over the concatenated taps: on a CPU this is
faster than Conv1d, and it makes the incremental step the same code over one position (a queue per layer: Le Paine et
al. 2016, arXiv 1611.09482).

A condition (section 2.5) is what else the model is told: labels, such as who speaks, and a series beside the sound,
such as a mel spectrogram. It comes as F rows, and an index says which row each position uses: one row for a whole
clip, or one for each frame. A row is projected into each layer's gates, where it is one more bias:

    z = tanh(W_f * x + V_f [e | s]) sigmoid(W_g * x + V_g [e | s])

with e the sum of the labels' embeddings and s the row's part of the series. The projection runs once a row, however
many positions use it. Residual path, skip path and head are not conditioned.

Shapes: B sequences, T positions, R residual channels, S skip channels, K taps, L layers, V ids, F condition rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks

DOUBLING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class WaveNetConfig:
    """Everything that rebuilds a WaveNet. Raises ValueError where a value is out of bounds."""

    vocab_size: int = 256
    dilations: tuple[int, ...] = DOUBLING  # of one cycle, in positions
    cycles: int = 3  # how often the dilations are repeated
    kernel: int = 2  # taps of each convolution
    residual: int = 64
    skip: int = 256
    head: int = 256  # width between the head's two layers
    embedding: int = 0  # width of the id table; 0: straight into the residual channels
    decoder: int = 0  # width of one more linear layer before the logits; 0: none
    bias: bool = True  # in the layers (the head always has biases)
    norm: str = "none"  # none | rmsnorm, without gain, before each layer
    init: str = "torch"  # torch | zero: projections at zero, levels that are neighbours start alike
    labels: tuple[int, ...] = ()  # of each label, how many names it has
    condition: int = 0  # channels of the labels' embeddings
    series: int = 0  # channels of the series beside the sound

    def __post_init__(self) -> None:
        for name in ("dilations", "labels"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        checks.whole("vocab_size", self.vocab_size, 1, 10_000_000)
        checks.whole("number of dilations", len(self.dilations), 1, 1000)
        for dilation in self.dilations:
            checks.whole("a dilation", dilation, 1, 1_000_000)
        checks.whole("cycles", self.cycles, 1, 1000)
        checks.whole("kernel", self.kernel, 1, 1000)
        for name in ("residual", "skip", "head"):
            checks.whole(name, getattr(self, name), 1, 100_000)
        for name in ("embedding", "decoder"):
            checks.whole(name, getattr(self, name), 0, 100_000)
        checks.flag("bias", self.bias)
        checks.choice("norm", self.norm, ("none", "rmsnorm"))
        checks.choice("init", self.init, ("torch", "zero"))
        checks.whole("number of labels", len(self.labels), 0, 100)
        for names in self.labels:
            checks.whole("a label's number of names", names, 1, 1_000_000)
        checks.whole("condition", self.condition, int(bool(self.labels)), 100_000 if self.labels else 0)
        checks.whole("series", self.series, 0, 100_000)
        checks.whole("receptive field", self.context, 1, 100_000_000)
        checks.affordable(self.parameters())

    @property
    def all_dilations(self) -> tuple[int, ...]:
        """The dilation of every layer."""
        return self.dilations * self.cycles

    @property
    def layers(self) -> int:
        return len(self.dilations) * self.cycles

    @property
    def row(self) -> int:
        """Channels of a condition row before its projection; 0 without conditions."""
        return self.condition + self.series

    @property
    def context(self) -> int:
        """The receptive field in positions: each layer adds (kernel - 1) * dilation to the first."""
        return 1 + (self.kernel - 1) * sum(self.dilations) * self.cycles

    def parameters(self) -> int:
        """Trainable parameters. The last layer's residual projection is among them, as in the published models, though
        nothing comes after it."""
        R, S, b = self.residual, self.skip, int(self.bias)
        table = self.vocab_size * (self.embedding or R) + self.embedding * R + sum(self.labels) * self.condition
        layer = 2 * R * (self.kernel * R + self.row + b) + R * (R + b)
        skips = S * (self.layers * R + b)
        out = self.decoder or self.vocab_size
        head = self.head * (S + 1) + out * (self.head + 1)
        decoder = self.vocab_size * (self.decoder + 1) if self.decoder else 0
        return table + self.layers * layer + skips + head + decoder

    def flops_per_token(self) -> int:
        """FLOPs of one position's forward pass, a multiply-add counted as 2: the matrix products, look-ups left out.
        A training step costs about 3 times this. The projection of conditions is left out: it runs once a row, which
        hundreds of positions share."""
        R, S = self.residual, self.skip
        layers = self.layers * 2 * R * self.kernel * R + (self.layers - 1) * R * R + self.layers * R * S
        out = self.decoder or self.vocab_size
        head = S * self.head + self.head * out + self.decoder * self.vocab_size
        return 2 * (self.embedding * R + layers + head)


class Condition(NamedTuple):
    """What a WaveNet is told beside the ids, as F rows. A model takes exactly the parts that its config names.

    The row of a position is about the id that the position predicts, the next one."""

    labels: Tensor | None  # [F, labels] int64: the name's number of each label
    series: Tensor | None  # [F, series] float32
    index: Tensor  # [B, T] int64: the row of each position  # pyright: ignore[reportIncompatibleMethodOverride]

    def to(self, device: torch.device) -> Condition:
        """The same on another device."""
        return Condition(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # pyright: ignore[reportArgumentType]


def gated(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the halves a and b, section 2.3. [..., 2 R] -> [..., R]

    tanh by way of the sigmoid, which PyTorch computes three times as fast on a CPU; they differ by less than 1e-6."""
    a, b = x.chunk(2, dim=-1)
    return (2 * torch.sigmoid(2 * a) - 1) * torch.sigmoid(b)


class Layer(nn.Module):
    """One gated residual layer. [B, P + T, R] -> residual [B, T, R], gate [B, T, R], where the first
    P = (kernel - 1) * dilation positions are the past."""

    def __init__(self, config: WaveNetConfig, dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = config.kernel, dilation
        self.past = (config.kernel - 1) * dilation
        self.channels = config.residual
        self.normed = {"none": False, "rmsnorm": True}[config.norm]
        self.dilated = nn.Linear(config.kernel * config.residual, 2 * config.residual, bias=config.bias)
        self.residual = nn.Linear(config.residual, config.residual, bias=config.bias)
        self.condition = nn.Linear(config.row, 2 * config.residual, bias=False) if config.row else None

    def gate(self, x: Tensor, positions: Tensor | None, bias: Tensor | None) -> Tensor:
        """z = tanh(filter * x + bias) sigmoid(gate * x + bias). The taps run from the oldest to the newest; a tap that
        lies before its document's start (`positions` [B, T]) reads zero. bias [B, T, 2 R] is the condition's."""
        T = x.shape[1] - self.past
        taps = [x[:, tap * self.dilation : tap * self.dilation + T] for tap in range(self.kernel)]
        if positions is not None:
            for tap in range(self.kernel - 1):
                inside = positions >= self.past - tap * self.dilation
                taps[tap] = taps[tap] * inside[..., None]
        return self.gated(torch.cat(taps, dim=-1), bias)

    def gated(self, taps: Tensor, bias: Tensor | None) -> Tensor:
        """The gate of concatenated taps [..., K R], with a bias [..., 2 R] or none."""
        sums = self.dilated(taps)
        return gated(sums if bias is None else sums + bias)

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.channels,)) if self.normed else x


@dataclass
class WaveNetState:
    """What a WaveNet remembers between steps: a queue of inputs for each layer, used as a ring.

    `queues[l]` is [B, P_l, R] with P_l = (kernel - 1) * dilation; its oldest entry lies at `index % P_l`."""

    queues: list[Tensor] = field(default_factory=list)
    index: int = 0


class WaveNet(nn.Module):
    """ids [B, T] -> logits [B, T, V]; position t sees the `context` ids up to and including t."""

    layers: Sequence[Layer]

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__()
        self.config = config
        R = config.residual
        self.table = nn.Embedding(config.vocab_size, config.embedding or R)
        self.entry = nn.Linear(config.embedding, R, bias=False) if config.embedding else nn.Identity()
        self.labels = nn.ModuleList(nn.Embedding(names, config.condition) for names in config.labels)
        self.layers = nn.ModuleList(Layer(config, dilation) for dilation in config.all_dilations)  # pyright: ignore[reportAttributeAccessIssue]
        # The sum of every layer's skip projection is one matrix over the concatenated gates.
        self.skip = nn.Linear(config.layers * R, config.skip, bias=config.bias)
        self.head1 = nn.Linear(config.skip, config.head)
        self.head2 = nn.Linear(config.head, config.decoder or config.vocab_size)
        self.decoder = nn.Linear(config.decoder, config.vocab_size) if config.decoder else nn.Identity()
        if config.init == "zero":
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start each layer as the identity and the prediction as uniform: residual projections, conditions' projections
        and the last layer at zero. Ids are taken for mu-law levels, and levels that are neighbours look alike from the
        first step on: the first channels hold the amplitude a at four magnifications, 2 tanh(4^k a), and the others a
        cosine transform, cos(pi r (id + 1/2) / V) for r = 1, 2, ..."""
        last = self.decoder if self.config.decoder else self.head2
        conditions = [layer.condition for layer in self.layers if layer.condition is not None]
        for linear in (*(layer.residual for layer in self.layers), *conditions, last):
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
        V, width = self.table.weight.shape
        magnified = min(4, width // 4)
        y = torch.linspace(-1, 1, V)
        amplitude = y.sign() * (V ** y.abs() - 1) / max(1, V - 1)
        frequency = torch.arange(1, width - magnified + 1) * torch.pi / V
        self.table.weight[:, :magnified] = 2 * torch.tanh(torch.outer(amplitude, 4.0 ** torch.arange(magnified)))
        self.table.weight[:, magnified:] = 2**0.5 * torch.cos(torch.outer(torch.arange(V) + 0.5, frequency))

    @property
    def context(self) -> int:
        """How many ids the model can see: its receptive field."""
        return self.config.context

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, last_only: bool = False, condition: Condition | None = None
    ) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V], or [B, 1, V] of the last position with `last_only`. Before the first id
        every layer reads zeros.

        `positions` [B, T] says how far each id is from the start of its document, where a row holds several: none sees
        ids before its document's start. The index of `condition` is [B, T]."""
        past = [ids.new_zeros((), dtype=self.table.weight.dtype)] * len(self.layers)
        gates, _ = self._layers(ids, past, positions, condition)
        return self._head(self.skip(gates[:, -1:] if last_only else gates))

    def projected(self, condition: Condition | None) -> Tensor | None:
        """What a condition adds to the gates' sums, [L, F, 2 R]; None for a model without conditions. Raises
        ValueError where the condition's parts are not the model's."""
        c = self.config
        labels, series = (None, None) if condition is None else condition[:2]
        given = (0 if labels is None else labels.shape[-1], 0 if series is None else series.shape[-1])
        if given != (len(c.labels), c.series):
            raise ValueError(f"the model takes {len(c.labels)} labels and {c.series} channels of a series, not {given}")
        if not c.row:
            return None
        parts = []
        if labels is not None:
            tables = list(self.labels)
            parts.append(torch.stack([table(labels[:, i]) for i, table in enumerate(tables)]).sum(0))
        if series is not None:
            parts.append(series.to(self.table.weight.dtype))
        weights = torch.cat([layer.condition.weight for layer in self.layers if layer.condition is not None])
        return F.linear(torch.cat(parts, dim=-1), weights).unflatten(-1, (c.layers, -1)).transpose(0, 1)

    def gate_biases(self, condition: Condition | None) -> Tensor:
        """Each layer's own bias and the condition's together, [L, F, 2 R]; without conditions F is 1."""
        none = self.table.weight.new_zeros(2 * self.config.residual)
        own = torch.stack([layer.dilated.bias if self.config.bias else none for layer in self.layers])[:, None]
        projected = self.projected(condition)
        return own if projected is None else own + projected

    def _layers(
        self, ids: Tensor, past: list[Tensor], positions: Tensor | None, condition: Condition | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the stack after `past`, per layer [B, P, R] (or a scalar to fill it). Returns the concatenated gates
        [B, T, L R] and, per layer, its inputs with the past before them [B, P + T, R]."""
        biases = self._biases(condition)
        x = self.entry(self.table(ids))
        gates, inputs = [], []
        for i, (layer, before) in enumerate(zip(self.layers, past, strict=True)):
            h = layer.norm(x)
            h = torch.cat((before.expand(len(ids), layer.past, h.shape[-1]).to(h.dtype), h), dim=1)
            gate = layer.gate(h, positions, biases[i])
            if i + 1 < len(self.layers):
                x = x + layer.residual(gate)
            gates.append(gate)
            inputs.append(h)
        return torch.cat(gates, dim=-1), inputs

    def _biases(self, condition: Condition | None) -> list[Tensor | None]:
        """For each layer what the condition adds at each position, [..., 2 R] for an index [...], or None."""
        rows = self.projected(condition)
        if rows is None or condition is None:
            return [None] * len(self.layers)
        return [F.embedding(condition.index, layer) for layer in rows]

    def _head(self, skips: Tensor) -> Tensor:
        """Sum of skips -> ReLU -> 1x1 -> ReLU -> 1x1 -> logits (figure 4). [B, T, S] -> [B, T, V]"""
        return self.decoder(self.head2(F.relu(self.head1(F.relu(skips)))))

    def init_state(self, batch: int) -> WaveNetState:
        """Empty queues for `batch` sequences, on the model's device."""
        device = self.table.weight.device
        shapes = [(batch, layer.past, self.config.residual) for layer in self.layers]
        return WaveNetState([torch.zeros(shape, device=device) for shape in shapes])

    def prefill(
        self, ids: Tensor, state: WaveNetState, condition: Condition | None = None
    ) -> tuple[Tensor, WaveNetState]:
        """Feed ids [B, T] at once -> logits [B, V] after the last of them; `state` is updated in place. The index of
        `condition` is [B, T], of these ids."""
        past = [queue.roll(-(state.index % max(1, queue.shape[1])), dims=1) for queue in state.queues]
        gates, inputs = self._layers(ids, past, None, condition)
        state.queues = [h[:, h.shape[1] - q.shape[1] :].clone() for h, q in zip(inputs, state.queues, strict=True)]
        state.index = 0
        return self._head(self.skip(gates[:, -1])), state

    def step(self, ids: Tensor, state: WaveNetState, condition: Condition | None = None) -> tuple[Tensor, WaveNetState]:
        """Feed one id a sequence, ids [B] -> logits [B, V], in O(layers); `state` is updated in place. The index of
        `condition` is [B]."""
        biases = self._biases(condition)
        x = self.entry(self.table(ids))
        gates = []
        for i, (layer, queue) in enumerate(zip(self.layers, state.queues, strict=True)):
            h = layer.norm(x)
            taps = [queue[:, (state.index + tap * layer.dilation) % layer.past] for tap in range(layer.kernel - 1)]
            gate = layer.gated(torch.cat((*taps, h), dim=-1), biases[i])
            if layer.past:
                queue[:, state.index % layer.past] = h
            if i + 1 < len(self.layers):
                x = x + layer.residual(gate)
            gates.append(gate)
        state.index += 1
        return self._head(self.skip(torch.cat(gates, dim=-1))), state
