"""How `transformers` stores a GPT: config.json and the tensors, in both directions.

Two architectures hold what a GPT here computes, to the last digits of float32:

- GPT2LMHeadModel: learned positions, LayerNorm. The four Conv1D matrices of a layer are stored [in, out]. Biases that
  a model lacks are written as zeros. Old files lack the prefix `transformer.`.
- ApertusForCausalLM: rotary positions, RMSNorm, QK-norm, no biases (the default recipe without n-gram tables). Gains
  that a model lacks are written as ones. Squared ReLU is written as xIELU with alpha_p = 1, alpha_n = 0 and beta = 0,
  which is the same function and the only activation that the other readers of Apertus accept.

Sources: models/gpt2, models/apertus and activations.py of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from dfcli.cores import GPTConfig

GPT2, APERTUS = "GPT2LMHeadModel", "ApertusForCausalLM"
PREFIX = "transformer."  # of GPT-2's tensors; old files lack it
TABLES = {"gpt2": "wte.weight", "apertus": "model.embed_tokens.weight"}  # the token table, by the type of the model
HEAD = "lm_head.weight"
WRITTEN = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
ACTIVATIONS = {name: ours for ours, name in WRITTEN.items()} | {
    "gelu_python": "gelu", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
XIELU = {"alpha_p": math.log(math.e - 1), "alpha_n": -100.0, "beta": 0.0, "eps": -1e-6}  # softplus: 1 and 0
RMS_EPSILON = 1.1920928955078125e-07  # float32's, which F.rms_norm takes for every type
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


class Slot(NamedTuple):
    """A tensor that transformers stores, and the tensor of the core that it holds."""

    name: str  # as transformers stores it
    shape: tuple[int, ...]
    ours: str | None = None  # the tensor of the core; None: it has none
    third: int | None = None  # which third of its rows: queries, keys or values
    transposed: bool = False
    constant: float = 0.0  # every element, where the core has no such tensor

    def of(self, model: dict[str, Tensor]) -> Tensor:
        """What is stored for a model."""
        import torch

        if (tensor := model.get(self.ours or "")) is None:
            return torch.full(self.shape, self.constant)
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return (tensor.T if self.transposed else tensor).contiguous()

    def put(self, tensor: Tensor, model: dict[str, Tensor]) -> bool:
        """Take the stored tensor into a model, in float32. False where the core has none and another constant."""
        import torch

        tensor = (tensor.T if self.transposed else tensor).float()
        if self.ours is None:
            return torch.allclose(tensor, torch.full(self.shape, self.constant), rtol=1e-6, atol=0)
        if self.third is None:
            model[self.ours] = tensor.contiguous()
            return True
        rows, *rest = self.shape
        whole = model.setdefault(self.ours, torch.empty(3 * rows, *rest))
        whole[self.third * rows :][:rows] = tensor
        return True


def short(name: str) -> str:
    """A tensor's name without the prefix that old files lack."""
    return name.removeprefix(PREFIX)


def slots(config: GPTConfig) -> Iterator[Slot]:
    """Every tensor that transformers stores for a core; a tied head is not stored."""
    yield from (_gpt2_slots if config.position == "learned" else _apertus_slots)(config)
    if not config.tied_head:
        yield Slot(HEAD, (config.vocab_size, config.channels), "head.weight")


def _gpt2_slots(config: GPTConfig) -> Iterator[Slot]:
    C = config.channels
    yield Slot(f"{PREFIX}wte.weight", (config.vocab_size, C), "tokens.weight")
    yield Slot(f"{PREFIX}wpe.weight", (config.context, C), "positions.weight")
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    matrices = {
        "attention.qkv": ("attn.c_attn", C, 3 * C),
        "attention.projection": ("attn.c_proj", C, C),
        "mlp.expansion": ("mlp.c_fc", C, 4 * C),
        "mlp.projection": ("mlp.c_proj", 4 * C, C),
    }
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"{PREFIX}h.{i}"
        for name, (stored, inputs, outputs) in matrices.items():
            yield Slot(f"{theirs}.{stored}.weight", (inputs, outputs), f"{ours}.{name}.weight", transposed=True)
            yield Slot(f"{theirs}.{stored}.bias", (outputs,), f"{ours}.{name}.bias")
        for name, stored in norms.items():
            for part in ("weight", "bias"):
                yield Slot(f"{theirs}.{stored}.{part}", (C,), f"{ours}.{name}.{part}")
    for part in ("weight", "bias"):
        yield Slot(f"{PREFIX}ln_f.{part}", (C,), f"norm.{part}")


def _apertus_slots(config: GPTConfig) -> Iterator[Slot]:
    C = config.channels
    yield Slot(TABLES["apertus"], (config.vocab_size, C), "tokens.weight")
    yield Slot("model.norm.weight", (C,), constant=1.0)
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for third, name in enumerate("qkv"):
            yield Slot(f"{theirs}.self_attn.{name}_proj.weight", (C, C), f"{ours}.attention.qkv.weight", third)
        yield Slot(f"{theirs}.self_attn.o_proj.weight", (C, C), f"{ours}.attention.projection.weight")
        yield Slot(f"{theirs}.mlp.up_proj.weight", (4 * C, C), f"{ours}.mlp.expansion.weight")
        yield Slot(f"{theirs}.mlp.down_proj.weight", (C, 4 * C), f"{ours}.mlp.projection.weight")
        for name in ("q_norm", "k_norm"):
            yield Slot(f"{theirs}.self_attn.{name}.weight", (C // config.heads,), constant=1.0)
        for name in ("attention_layernorm", "feedforward_layernorm"):
            yield Slot(f"{theirs}.{name}.weight", (C,), constant=1.0)
        if config.activation == "relu2":
            for name, value in XIELU.items():
                shape = (1,) if name.startswith("alpha") else ()
                yield Slot(f"{theirs}.mlp.act_fn.{name}", shape, constant=value)


# config.json ---------------------------------------------------------------------------------------------------------


def to_json(config: GPTConfig) -> dict[str, Any]:
    """What config.json says of a core's arithmetic."""
    if config.position == "learned":
        return {
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.context,
            "n_ctx": config.context,  # for tools older than transformers 5
            "n_embd": config.channels,
            "n_layer": config.layers,
            "n_head": config.heads,
            "activation_function": WRITTEN[config.activation],
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout if config.embedding_dropout else 0.0,
            "attn_pdrop": config.dropout,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": config.tied_head,
        }
    return {
        "model_type": "apertus",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.channels,
        "intermediate_size": 4 * config.channels,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "xielu" if config.activation == "relu2" else WRITTEN[config.activation],
        "rms_norm_eps": RMS_EPSILON,
        "rope_parameters": ROPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_head,
        # What other readers than transformers ask for.
        "rope_theta": ROPE["rope_theta"],
        "rope_scaling": None,
        "mlp_bias": False,
        "qk_norm": True,
        "post_norm": False,
    }


def strangers(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a config.json whose value the core does not compute, and the values that it does. Keys that say
    nothing of the arithmetic are ignored."""
    if values.get("model_type", "gpt2") == "gpt2":
        channels = values.get("n_embd", 768)
        inner = 4 * channels if isinstance(channels, int) else 0
        known = ", ".join(ACTIVATIONS)
        wanted = {
            "activation_function": (_in(values.get("activation_function", "gelu_new"), ACTIVATIONS), known),
            "layer_norm_epsilon": (values.get("layer_norm_epsilon", 1e-5) == 1e-5, "1e-05"),
            "n_inner": (values.get("n_inner") in (None, inner), "4 n_embd"),
            "scale_attn_weights": (values.get("scale_attn_weights", True) is True, "true"),
            "scale_attn_by_inverse_layer_idx": (not values.get("scale_attn_by_inverse_layer_idx"), "false"),
            "add_cross_attention": (not values.get("add_cross_attention"), "false"),
        }
    else:
        channels, heads = values.get("hidden_size"), values.get("num_attention_heads")
        inner = 4 * channels if isinstance(channels, int) else 0
        shown = ", ".join(["xielu", *ACTIVATIONS])
        wanted = {
            "hidden_act": (_in(values.get("hidden_act"), ["xielu", *ACTIVATIONS]), shown),
            "rms_norm_eps": (values.get("rms_norm_eps") == RMS_EPSILON, str(RMS_EPSILON)),
            "rope_parameters": (values.get("rope_parameters") == ROPE, "those of the type default, theta 10,000"),
            "intermediate_size": (values.get("intermediate_size") == inner, "4 hidden_size"),
            "num_key_value_heads": (values.get("num_key_value_heads") in (None, heads), "num_attention_heads"),
            "head_dim": (values.get("head_dim") is None, "hidden_size / num_attention_heads"),
            "attention_bias": (not values.get("attention_bias"), "false"),
        }
    for key, (good, known) in wanted.items():
        if not good:
            yield key, known


def _in(value: object, names: Any) -> bool:
    return isinstance(value, str) and value in names


def from_json(values: dict[str, Any], tied: bool) -> GPTConfig:
    """The core's config of a config.json in which nothing is strange. ValueError and TypeError as of GPTConfig."""
    from dfcli.cores import GPTConfig

    if values.get("model_type", "gpt2") == "gpt2":
        return GPTConfig(
            vocab_size=values.get("vocab_size", 50_257),
            context=values.get("n_positions", 1024),
            layers=values.get("n_layer", 12),
            heads=values.get("n_head", 12),
            channels=values.get("n_embd", 768),
            activation=ACTIVATIONS[values.get("activation_function", "gelu_new")],
            tied_head=tied,
        )
    names = {
        "vocab_size": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "channels": "hidden_size",
    }  # fmt: skip
    return GPTConfig(
        **{ours: values.get(theirs) for ours, theirs in names.items()},  # pyright: ignore[reportArgumentType]
        position="rotary", norm="rmsnorm", bias=False, qkv_bias=False, qk_norm=True, tied_head=tied, init="zero",
        activation="relu2" if values["hidden_act"] == "xielu" else ACTIVATIONS[values["hidden_act"]],
    )  # fmt: skip
