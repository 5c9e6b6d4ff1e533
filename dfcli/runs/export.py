"""A run as a folder that `transformers` opens: AutoModelForCausalLM for the weights, AutoTokenizer for the codec.

What the two architectures hold: `layouts.py`.

Why Apertus and not Qwen3, which fits too when gate and up projection are the same matrix and its activation is ReLU:
for 12 layers of 768 channels Qwen3 has 28.3 million more parameters (a quarter more), and vLLM and llama.cpp compute
SiLU for Qwen3 whatever its config says, while vLLM, SGLang, mlx-lm and llama.cpp's converter read Apertus with the
xIELU parameters that the file holds. One warning: transformers' experimental CUDA kernel for xIELU, a package of its
own, ignores beta.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfcli.codecs import TextCodec
from dfcli.codecs.bpe import FILE as TOKENIZER
from dfcli.codecs.bytelevel import END_OF_TEXT
from dfcli.codecs.tokenizer_json import check_exportable, tokenizer_json, with_beginning
from dfcli.errors import UsageError
from dfcli.runs import layouts
from dfcli.runs.huggingface import CONFIG, WEIGHTS
from dfcli.runs.layouts import APERTUS, GPT2
from dfcli.runs.run import Run
from dfcli.system.files import building


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
        f"train one that can: `df train gpt --set {instead}`",
    )


def export(run: Run, folder: Path, checkpoint: str | int = "best") -> Exported:
    """Write a checkpoint of a run and its codec into a new folder, whole or not at all.

    UsageError where the model cannot be exported, naming the field or the codec, or the folder exists; DfError where it
    cannot be written; CorruptError for a damaged checkpoint.
    """
    from dfcli import cores
    from dfcli.runs import tensors

    description = run.info["core"]
    config: Any = cores.config(description["name"], description["config"])
    form = architecture(description["name"], config)
    codec = run.codec
    check_exportable(codec)
    assert isinstance(codec, TextCodec)
    saved = run.load(checkpoint)
    ends = {"bos_token_id": run.dataset["boundary"], "eos_token_id": _end(run, codec), "pad_token_id": None}
    values = {"architectures": [form], **layouts.to_json(config), **ends, "dtype": "float32"}
    names: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": config.context}
    if codec.end_of_text is not None:
        names |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    with building(folder) as temporary:
        tensors.write(temporary / WEIGHTS, {slot.name: slot.of(saved.model) for slot in layouts.slots(config)})
        (temporary / TOKENIZER).write_bytes(with_beginning(tokenizer_json(codec), _begins(run)))
        _write(temporary / CONFIG, values)
        _write(temporary / "generation_config.json", ends)
        _write(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return Exported(form, folder, saved.step, size)


def _begins(run: Run) -> list[int]:
    """What stands before a document's first id, and so before a prompt."""
    data = run.dataset
    return [] if data["boundary"] is None else [data["boundary"]] * data["lead"]


def _end(run: Run, codec: TextCodec) -> int | None:
    """The id that ends a text: the boundary of lines, else the codec's."""
    return run.dataset["boundary"] if run.dataset["lines"] else codec.end_of_text


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
