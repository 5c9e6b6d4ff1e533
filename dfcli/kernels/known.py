"""Which fields and values of a core's config the kernels compute. What a core learns later is not computed wrongly: the
kernels leave it to PyTorch until they have learned it too, and its name is added here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dfcli.cores.gpt import GPTConfig
from dfcli.cores.wavenet import WaveNetConfig

# Of each core, whether its kernels compute a norm as RMSNorm. The kernels look it up here: a norm that is only added to
# FIELDS raises KeyError, and is not computed as LayerNorm, or left out.
RMS: dict[Any, dict[str, bool]] = {
    GPTConfig: {"layernorm": False, "rmsnorm": True},
    WaveNetConfig: {"none": False, "rmsnorm": True},
}

# Of each core, the fields; with the values that are known, where they are words.
FIELDS: dict[Any, dict[str, tuple[str, ...]]] = {
    GPTConfig: {
        "position": ("learned", "rotary"),
        "norm": ("layernorm", "rmsnorm"),
        "activation": ("relu", "gelu", "gelu_tanh", "relu2"),
        "init": ("gpt2", "normal", "torch", "zero"),
    }
    | dict.fromkeys((
        "vocab_size", "context", "layers", "heads", "channels", "bias", "qkv_bias", "head_bias", "tied_head", "qk_norm",
        "dropout", "embedding_dropout", "ngrams", "ngram_dropout",
    ), ()),
    WaveNetConfig: {"norm": ("none", "rmsnorm"), "init": ("torch", "zero")}
    | dict.fromkeys((
        "vocab_size", "dilations", "cycles", "kernel", "residual", "skip", "head", "embedding", "decoder", "bias",
        "labels", "condition", "series",
    ), ()),
}  # fmt: skip


def unknown(config: GPTConfig | WaveNetConfig) -> str | None:
    """The reason against kernels for a config that sets what they do not know, a clause; else None."""
    known = next(names for kind, names in FIELDS.items() if isinstance(config, kind))
    for field in fields(config):
        value, words = getattr(config, field.name), known.get(field.name)
        new = value != field.default if words is None else bool(words) and value not in words
        if new:
            return f"the kernels do not know {field.name}={value}"
    return None
