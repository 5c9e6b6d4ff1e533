"""Small cores of every kind, for tests that hold for all of them."""

from __future__ import annotations

import torch

from dfcli.cores import Condition, Core, WaveNetConfig, build

VARIANTS: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt", dict(vocab_size=17, context=12, layers=2, heads=2, channels=8, activation="gelu_tanh")),
    "lecture": (
        "gpt",
        dict(
            vocab_size=17, context=12, layers=2, heads=2, channels=8, activation="relu", qkv_bias=False,
            head_bias=True, tied_head=False, embedding_dropout=False, init="normal",
        ),
    ),
    "nano": ("gpt", dict(vocab_size=17, context=12, layers=3, heads=4, channels=16, bias=False, qkv_bias=False)),
    "modern": (
        "gpt",
        dict(
            vocab_size=17, context=12, layers=2, heads=2, channels=8, position="rotary", norm="rmsnorm",
            activation="relu2", bias=False, qkv_bias=False, qk_norm=True, tied_head=False, init="zero",
        ),
    ),
    "n-grams": ("gpt", dict(vocab_size=17, context=12, layers=2, heads=2, channels=8, ngrams=4)),
    "makemore-gpt": (
        "gpt",
        dict(
            vocab_size=17, context=12, layers=2, heads=2, channels=8, activation="gelu_tanh", tied_head=False,
            init="torch",
        ),
    ),
    "paper": ("wavenet", dict(vocab_size=17, dilations=[1, 2, 4], cycles=2, residual=6, skip=5, head=7)),
    "kernel-3": ("wavenet", dict(vocab_size=17, dilations=[1, 3], cycles=1, kernel=3, residual=6, skip=5, head=7)),
    "kernel-1": ("wavenet", dict(vocab_size=17, dilations=[1], cycles=2, kernel=1, residual=6, skip=5, head=7)),
    "sc09": (
        "wavenet",
        dict(vocab_size=17, dilations=[1, 2], cycles=2, residual=6, skip=5, head=7, embedding=9, decoder=4, bias=False),
    ),
    "normed": ("wavenet", dict(vocab_size=17, dilations=[1, 2, 4], cycles=1, residual=6, norm="rmsnorm", init="zero")),
    "conditioned": (
        "wavenet",
        dict(
            vocab_size=17, dilations=[1, 2, 4], cycles=1, residual=6, skip=5, head=7, labels=[3, 2], condition=4,
            series=3, init="zero",
        ),
    ),
    "vocoder": ("wavenet", dict(vocab_size=17, dilations=[1, 3], cycles=1, kernel=3, residual=6, series=5, bias=False)),
    "charwavenet": ("charwavenet", dict(vocab_size=17, levels=3, embedding=5, hidden=7)),
}  # fmt: skip


def small(name: str, seed: int = 0) -> Core:
    """Variant `name` in eval mode with no parameter at zero, so that every path counts."""
    torch.manual_seed(seed)
    core = build(*VARIANTS[name]).eval()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return core


def told(core: Core, rows: torch.Tensor) -> dict:
    """What a core is called with beside ids: nothing, or a condition whose index is `rows`, each below 4."""
    config = core.config
    if not isinstance(config, WaveNetConfig) or not config.row:
        return {}
    generator = torch.Generator().manual_seed(8)
    labels = [torch.randint(names, (4,), generator=generator) for names in config.labels]
    series = torch.randn(4, config.series, generator=generator) if config.series else None
    return {"condition": Condition(torch.stack(labels, 1) if labels else None, series, rows)}
