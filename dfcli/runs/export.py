"""A run as a folder that `transformers` opens: AutoModelForCausalLM for the weights, AutoTokenizer for the codec.

Two architectures hold what a GPT here computes, to the last digits of float32:

- GPT2LMHeadModel: learned positions, LayerNorm. Biases that a model lacks are written as zeros.
- ApertusForCausalLM: rotary positions, RMSNorm, QK-norm, no biases (the default recipe without n-gram tables). Gains
  that a model lacks are written as ones. Squared ReLU is written as xIELU with alpha_p = 1, alpha_n = 0 and beta = 0,
  which is the same function and the only activation that the other readers of Apertus accept.

Why Apertus and not Qwen3, which fits too when gate and up projection are the same matrix and its activation is ReLU:
for 12 layers of 768 channels Qwen3 has 28.3 million more parameters (a quarter more), and vLLM and llama.cpp compute
SiLU for Qwen3 whatever its config says, while vLLM, SGLang, mlx-lm and llama.cpp's converter read Apertus with the
xIELU parameters that the file holds. One warning: transformers' experimental CUDA kernel for xIELU, a package of its
own, ignores beta.

Sources: models/gpt2, models/apertus and activations.py of transformers 5.24.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfcli.codecs import TextCodec
from dfcli.codecs.bpe import END_OF_TEXT
from dfcli.codecs.tokenizer_json import tokenizer_json
from dfcli.errors import UsageError
from dfcli.runs.huggingface import CONFIG, TOKENIZER, WEIGHTS, gpt2_names
from dfcli.runs.run import Run
from dfcli.system.files import building

if TYPE_CHECKING:
    from torch import Tensor

    from dfcli.cores import GPTConfig

GPT2, APERTUS = "GPT2LMHeadModel", "ApertusForCausalLM"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
RMS_EPSILON = 1.1920928955078125e-07  # float32's, which F.rms_norm takes for every type
XIELU = {"alpha_p": [math.log(math.e - 1)], "alpha_n": [-100.0], "beta": 0.0, "eps": -1e-6}  # softplus: 1 and 0


@dataclass(frozen=True)
class Exported:
    """What was written."""

    architecture: str
    folder: Path
    checkpoint: int  # its step
    size: int  # bytes


def architecture(core: str, config: Any) -> str:
    """The architecture that holds a core. UsageError that names the field no architecture has, and the way round it."""
    if core != "gpt":
        raise UsageError(f"a {core} cannot be exported: transformers has no architecture for it")
    if config.ngrams > 1:
        _refuse("ngrams", config.ngrams, "n-gram tables", "ngrams=1")
    if config.head_bias:
        _refuse("head_bias", "true", "a bias of the head", "head_bias=false")
    if config.position == "learned":
        if config.norm != "layernorm":
            _refuse("norm", config.norm, "learned positions with it", "norm=layernorm")
        if config.qk_norm:
            _refuse("qk_norm", "true", "learned positions with it", "qk_norm=false")
        return GPT2
    if config.norm != "rmsnorm":
        _refuse("norm", config.norm, "rotary positions with it", "norm=rmsnorm")
    if not config.qk_norm:
        _refuse("qk_norm", "false", "its other choices without it", "qk_norm=true")
    for name in ("bias", "qkv_bias"):
        if getattr(config, name):
            _refuse(name, "true", "rotary positions with biases", f"{name}=false")
    return APERTUS


def _refuse(field: str, value: object, what: str, instead: str) -> None:
    raise UsageError(
        f"a model with {field}={value} cannot be exported: no architecture of transformers has {what}",
        f"train one that can: `--set {instead}`",
    )


def export(run: Run, folder: Path, checkpoint: str | int = "best") -> Exported:
    """Write a checkpoint of a run and its codec into a new folder, whole or not at all.

    UsageError where the model cannot be exported, naming the field, or the folder exists; DfError where it cannot be
    written; CorruptError for a damaged checkpoint.
    """
    from dfcli import cores
    from dfcli.runs import tensors

    description = run.info["core"]
    config: Any = cores.config(description["name"], description["config"])
    form = architecture(description["name"], config)
    codec = run.codec
    assert isinstance(codec, TextCodec)
    saved = run.load(checkpoint)
    ends = {"bos_token_id": run.dataset["boundary"], "eos_token_id": _end(run, codec), "pad_token_id": None}
    if form == GPT2:
        values, weights = _gpt2_config(config), _gpt2_weights(config, saved.model)
    else:
        values, weights = _apertus_config(config), _apertus_weights(config, saved.model)
    values = {"architectures": [form], **values, **ends, "dtype": "float32"}
    names: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": config.context}
    if codec.end_of_text is not None:
        names |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    with building(folder) as temporary:
        tensors.write(temporary / WEIGHTS, weights)
        (temporary / TOKENIZER).write_bytes(tokenizer_json(codec))
        _write(temporary / CONFIG, values)
        _write(temporary / "generation_config.json", ends)
        _write(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return Exported(form, folder, saved.step, size)


def _end(run: Run, codec: TextCodec) -> int | None:
    """The id that ends a text: the boundary of lines, else the codec's."""
    return run.dataset["boundary"] if run.dataset["lines"] else codec.end_of_text


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _gpt2_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_ctx": config.context,  # for tools older than transformers 5
        "n_embd": config.channels,
        "n_layer": config.layers,
        "n_head": config.heads,
        "activation_function": ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout if config.embedding_dropout else 0.0,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied_head,
    }


def _gpt2_weights(config: GPTConfig, model: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    found: dict[str, Tensor] = {}
    for ours, theirs in gpt2_names(config):
        if (tensor := model.get(ours)) is None:  # a bias of a linear layer [out] or of a norm [C]
            tensor = torch.zeros(len(model[ours.removesuffix("bias") + "weight"]))
        elif ".c_" in theirs and tensor.ndim == 2:
            tensor = tensor.T.contiguous()
        found[theirs if theirs.startswith("lm_head") else f"transformer.{theirs}"] = tensor
    return found


def _apertus_config(config: GPTConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "model_type": "apertus",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.channels,
        "intermediate_size": 4 * config.channels,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "xielu" if config.activation == "relu2" else ACTIVATIONS[config.activation],
        "rms_norm_eps": RMS_EPSILON,
        "rope_parameters": rope,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_head,
        # What other readers than transformers ask for.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "mlp_bias": False,
        "qk_norm": True,
        "post_norm": False,
    }


def _apertus_weights(config: GPTConfig, model: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    C = config.channels
    found = {"model.embed_tokens.weight": model["tokens.weight"], "model.norm.weight": torch.ones(C)}
    if not config.tied_head:
        found["lm_head.weight"] = model["head.weight"]
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        q, k, v = model[f"{ours}.attention.qkv.weight"].split(C)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": model[f"{ours}.attention.projection.weight"],
            "self_attn.q_norm": torch.ones(C // config.heads),
            "self_attn.k_norm": torch.ones(C // config.heads),
            "attention_layernorm": torch.ones(C),
            "feedforward_layernorm": torch.ones(C),
            "mlp.up_proj": model[f"{ours}.mlp.expansion.weight"],
            "mlp.down_proj": model[f"{ours}.mlp.projection.weight"],
        }
        found |= {f"{theirs}.{name}.weight": tensor.contiguous() for name, tensor in parts.items()}
        if config.activation == "relu2":
            found |= {f"{theirs}.mlp.act_fn.{name}": torch.tensor(value) for name, value in XIELU.items()}
    return found
