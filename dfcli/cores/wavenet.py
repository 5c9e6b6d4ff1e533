"""WaveNet: a stack of dilated causal convolutions with gates, residual and skip paths (van den Oord et al. 2016,
arXiv 1609.03499), over token ids: 256 mu-law levels for audio, or any other vocabulary.

Each layer looks `dilation` positions back, and dilations double, so the receptive field grows exponentially with depth.
The tensors are laid out [B, T, C] and a convolution is a linear layer over the concatenated taps: on a CPU this is
faster than Conv1d, and it makes the incremental step the same code over one position (a queue per layer: Le Paine et
al. 2016, arXiv 1611.09482).

Shapes: B sequences, T positions, R residual channels, S skip channels, K taps, L layers, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))  # JSON gives a list
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
    def context(self) -> int:
        """The receptive field in positions: each layer adds (kernel - 1) * dilation to the first."""
        return 1 + (self.kernel - 1) * sum(self.dilations) * self.cycles

    def parameters(self) -> int:
        """Trainable parameters. The last layer's residual projection is among them, as in the published models, though
        nothing comes after it."""
        R, S, b = self.residual, self.skip, int(self.bias)
        table = self.vocab_size * (self.embedding or R) + self.embedding * R
        layer = 2 * R * (self.kernel * R + b) + R * (R + b)
        skips = S * (self.layers * R + b)
        out = self.decoder or self.vocab_size
        head = self.head * (S + 1) + out * (self.head + 1)
        decoder = self.vocab_size * (self.decoder + 1) if self.decoder else 0
        return table + self.layers * layer + skips + head + decoder

    def flops_per_token(self) -> int:
        """FLOPs of one position's forward pass, a multiply-add counted as 2: the matrix products, look-ups left out.
        A training step costs about 3 times this."""
        R, S = self.residual, self.skip
        layers = self.layers * 2 * R * self.kernel * R + (self.layers - 1) * R * R + self.layers * R * S
        out = self.decoder or self.vocab_size
        head = S * self.head + self.head * out + self.decoder * self.vocab_size
        return 2 * (self.embedding * R + layers + head)


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
        self.normed = config.norm == "rmsnorm"
        self.dilated = nn.Linear(config.kernel * config.residual, 2 * config.residual, bias=config.bias)
        self.residual = nn.Linear(config.residual, config.residual, bias=config.bias)

    def gate(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """z = tanh(filter * x) sigmoid(gate * x). The taps run from the oldest to the newest; a tap that
        lies before its document's start (`positions` [B, T]) reads zero."""
        T = x.shape[1] - self.past
        taps = [x[:, tap * self.dilation : tap * self.dilation + T] for tap in range(self.kernel)]
        if positions is not None:
            for tap in range(self.kernel - 1):
                inside = positions >= self.past - tap * self.dilation
                taps[tap] = taps[tap] * inside[..., None]
        return gated(self.dilated(torch.cat(taps, dim=-1)))

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
        """Start each layer as the identity and the prediction as uniform: residual projections and the last layer at
        zero. Ids are taken for mu-law levels, and levels that are neighbours look alike from the first step on: the
        first channels hold the amplitude a at four magnifications, 2 tanh(4^k a), and the others a cosine transform,
        cos(pi r (id + 1/2) / V) for r = 1, 2, ..."""
        last = self.decoder if self.config.decoder else self.head2
        for linear in (*(layer.residual for layer in self.layers), last):
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

    def forward(self, ids: Tensor, positions: Tensor | None = None, last_only: bool = False) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V], or [B, 1, V] of the last position with `last_only`. Before the first id
        every layer reads zeros.

        `positions` [B, T] says how far each id is from the start of its document, where a row holds several: none sees
        ids before its document's start."""
        past = [ids.new_zeros((), dtype=self.table.weight.dtype)] * len(self.layers)
        gates, _ = self._layers(ids, past, positions)
        return self._head(self.skip(gates[:, -1:] if last_only else gates))

    def _layers(self, ids: Tensor, past: list[Tensor], positions: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Run the stack after `past`, per layer [B, P, R] (or a scalar to fill it). Returns the concatenated gates
        [B, T, L R] and, per layer, its inputs with the past before them [B, P + T, R]."""
        x = self.entry(self.table(ids))
        gates, inputs = [], []
        for i, (layer, before) in enumerate(zip(self.layers, past, strict=True)):
            h = layer.norm(x)
            h = torch.cat((before.expand(len(ids), layer.past, h.shape[-1]).to(h.dtype), h), dim=1)
            gate = layer.gate(h, positions)
            if i + 1 < len(self.layers):
                x = x + layer.residual(gate)
            gates.append(gate)
            inputs.append(h)
        return torch.cat(gates, dim=-1), inputs

    def _head(self, skips: Tensor) -> Tensor:
        """Sum of skips -> ReLU -> 1x1 -> ReLU -> 1x1 -> logits (figure 4). [B, T, S] -> [B, T, V]"""
        return self.decoder(self.head2(F.relu(self.head1(F.relu(skips)))))

    def init_state(self, batch: int, dtype: torch.dtype = torch.float32) -> WaveNetState:
        """Empty queues for `batch` sequences, on the model's device."""
        device = self.table.weight.device
        shapes = [(batch, layer.past, self.config.residual) for layer in self.layers]
        return WaveNetState([torch.zeros(shape, dtype=dtype, device=device) for shape in shapes])

    def prefill(self, ids: Tensor, state: WaveNetState) -> tuple[Tensor, WaveNetState]:
        """Feed ids [B, T] at once -> logits [B, V] after the last of them; `state` is updated in place."""
        past = [queue.roll(-(state.index % max(1, queue.shape[1])), dims=1) for queue in state.queues]
        gates, inputs = self._layers(ids, past, None)
        state.queues = [h[:, h.shape[1] - q.shape[1] :].clone() for h, q in zip(inputs, state.queues, strict=True)]
        state.index = 0
        return self._head(self.skip(gates[:, -1])), state

    def step(self, ids: Tensor, state: WaveNetState) -> tuple[Tensor, WaveNetState]:
        """Feed one id a sequence, ids [B] -> logits [B, V], in O(layers); `state` is updated in place."""
        x = self.entry(self.table(ids))
        gates = []
        for i, (layer, queue) in enumerate(zip(self.layers, state.queues, strict=True)):
            h = layer.norm(x)
            taps = [queue[:, (state.index + tap * layer.dilation) % layer.past] for tap in range(layer.kernel - 1)]
            gate = gated(layer.dilated(torch.cat((*taps, h), dim=-1)))
            if layer.past:
                queue[:, state.index % layer.past] = h
            if i + 1 < len(self.layers):
                x = x + layer.residual(gate)
            gates.append(gate)
        state.index += 1
        return self._head(self.skip(torch.cat(gates, dim=-1))), state
