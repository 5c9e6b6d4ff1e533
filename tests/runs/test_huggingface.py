"""Models made elsewhere: transformers' own folders in, with transformers as the judge, and folders that are not what
they should be."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dfcli.codecs import BPE
from dfcli.cores import GPTConfig
from dfcli.errors import DfError
from dfcli.evaluation.evaluate import evaluate
from dfcli.generation.sample import sample_text
from dfcli.runs import Run, layouts
from dfcli.runs.huggingface import Folder, import_folder, start
from dfcli.runs.run import runs_home

transformers = pytest.importorskip("transformers")

TEXT = "the cat sat on the mat, and the dog ran after the cat.\n" * 12


def make(folder: Path, vocab_size: int = 288, **values: Any) -> Any:
    """A random GPT-2 of transformers with a vocabulary of 280 ids, stored in `folder`."""
    torch.manual_seed(0)
    shape = {"n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, **shape | values)).eval()
    for parameter in model.parameters():  # biases at zero would hide a missing one
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    BPE.train([TEXT], 280).save_files(folder)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def plain(folder: Path) -> None:
    pass


def without_prefix(folder: Path) -> None:
    """As the published files of 2019: no prefix, mask buffers, keys that transformers no longer has."""
    mask = torch.ones(24, 24).tril().view(1, 1, 24, 24)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = (("bias", mask), ("masked_bias", mask[0, 0, 0, 0]))
        buffers = {f"h.{i}.attn.{name}": value.clone() for i in range(2) for name, value in masks}
        return found | buffers

    rewrite(folder, change)
    config(folder, n_ctx=24, n_special=0, summary_type="cls_index", task_specific_params={"x": 1})


def sharded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def with_a_copy_of_the_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})


def two_files_of_a_vocabulary(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(found["vocab"] | {"<|endoftext|>": len(found["vocab"])}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in found["merges"]) + "\n")


def half_precision(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "plain": ({}, plain),
    "no padding": ({"vocab_size": 280}, plain),
    "untied": ({"tie_word_embeddings": False}, plain),
    "gelu by erf": ({"activation_function": "gelu"}, plain),
    "relu": ({"activation_function": "relu", "n_inner": 96}, plain),
    "without prefix": ({}, without_prefix),
    "sharded": ({}, sharded),
    "a copy of the head": ({}, with_a_copy_of_the_head),
    "vocab.json and merges.txt": ({}, two_files_of_a_vocabulary),
    "half precision": ({}, half_precision),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_are_those_of_transformers(
    tmp_path: Path, layout: tuple[dict[str, Any], Callable[[Path], None]]
) -> None:
    values, change = layout
    make(tmp_path / "m", **values)
    change(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    run = import_folder(tmp_path / "m", "m")
    core, saved = run.build()
    ids = torch.randint(0, run.codec.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, reference = core(ids), theirs(ids).logits
    assert reference.abs().max() > 1
    assert (ours - reference).abs().max() < 1e-4
    assert (saved.step, run.codec.vocab_size, core.config.parameters()) == (
        0, values.get("vocab_size", 288), theirs.num_parameters(),
    )  # fmt: skip


SIZES = {  # layers, heads, channels, parameters: Radford et al. 2019 and Sanh et al. 2019
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
    "distilgpt2": (6, 12, 768, 81_912_576),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_published_sizes_have_the_tensors_of_transformers(size: tuple[int, int, int, int]) -> None:
    layers, heads, channels, parameters = size
    shape = transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=channels)
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(shape)
    ours = GPTConfig(50_257, 1024, layers, heads, channels, activation="gelu_tanh")
    named = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {slot.name: slot.shape for slot in layouts.slots(ours)} == named
    assert ours.parameters() == parameters == theirs.num_parameters()


def test_an_imported_run_samples_and_is_measured_on_text(tmp_path: Path) -> None:
    model = make(tmp_path / "tiny gpt2")
    (tmp_path / "text.txt").write_text(TEXT)
    run = import_folder(tmp_path / "tiny gpt2")
    assert run.name == "tiny-gpt2"
    found = evaluate(run, [str(tmp_path / "text.txt")], device="cpu")
    ids = torch.from_numpy(run.codec.encode(TEXT).astype("int64"))
    nats, count = 0.0, 0
    for begin in range(0, len(ids) - 1, 24):
        window = ids[begin : begin + 25]
        with torch.no_grad():
            nats += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
        count += len(window) - 1
    scored = len(run.codec.decode(ids[1:].numpy()).encode())
    assert (found.tokens, found.loss) == (count, pytest.approx(nats / count, abs=1e-4))
    assert found.bits_per_byte == pytest.approx(nats / scored / math.log(2), rel=1e-4)
    greedy = sample_text(run, prompt="the cat", tokens=12, temperature=0, device="cpu", engine="plain")
    prompt = torch.from_numpy(run.codec.encode("the cat").astype("int64"))[None]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :]
    assert greedy.samples == ["the cat" + run.codec.decode(expected.numpy())]
    with pytest.raises(DfError, match="imported without the data") as caught:
        evaluate(run)
    assert "--data" in caught.value.hint


def test_what_training_starts_from(tmp_path: Path) -> None:
    make(tmp_path / "m")
    assert isinstance(start(str(tmp_path / "m")), Folder)
    run = import_folder(tmp_path / "m", "m")
    assert isinstance(start("m"), Run)
    assert start(str(tmp_path / "m")).info["core"] == run.info["core"]
    with pytest.raises(DfError, match="there is no run"):
        start("nothing")


# Folders that are not what they should be ----------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def setting(**values: Any) -> Callable[[Path], None]:
    return lambda folder: config(folder, **values)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        def changed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            change(found)
            return found

        rewrite(folder, changed)

    return apply


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


def index(places: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return apply


WTE = "transformer.wte.weight"
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (pickled, "pytorch_model.bin alone, a format that can run code"),
    "no weights": (remove("model.safetensors"), "has no model.safetensors"),
    "no config": (remove("config.json"), "neither a run nor a Hugging Face folder"),
    "no vocabulary": (remove("tokenizer.json"), "has no vocabulary"),
    "another model": (setting(model_type="llama"), "a model of type 'llama'"),
    "activation": (setting(activation_function="silu"), 'has activation_function "silu", which the GPT core has not'),
    "norm": (setting(layer_norm_epsilon=1e-6), "has layer_norm_epsilon 1e-06"),
    "inner width": (setting(n_inner=100), "has n_inner 100"),
    "scaling": (setting(scale_attn_weights=False), "has scale_attn_weights false"),
    "scaling by layer": (setting(scale_attn_by_inverse_layer_idx=True), "has scale_attn_by_inverse_layer_idx true"),
    "cross attention": (setting(add_cross_attention=True), "has add_cross_attention true"),
    "absurd layers": (setting(n_layer=10**9), "layers must be a whole number from 1 to 1,000"),
    "absurd rows": (setting(vocab_size=10**7 + 1), "vocab_size must be a whole number"),
    "absurd product": (setting(n_embd=99_999, n_head=3, n_layer=999), "parameters, more than"),
    "not a number": (setting(n_head="3"), "heads must be a whole number"),
    "a list": (setting(n_embd=[24]), "channels must be a whole number"),
    "no untied head": (setting(tie_word_embeddings=False), "lacks the tensor lm_head.weight"),
    "a missing tensor": (
        tensors(lambda found: found.pop("transformer.h.1.ln_2.bias")),
        r"lacks the tensor h\.1\.ln_2\.bias",
    ),
    "no token table": (tensors(lambda found: found.pop(WTE)), r"lacks the tensor wte\.weight"),
    "a wrong shape": (
        tensors(lambda found: found.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(96, 24)})),
        r"c_fc\.weight of .* is \[96, 24\] where config\.json asks for \[24, 96\]",
    ),
    "integers": (
        tensors(lambda found: found.update({WTE: torch.zeros(288, 24, dtype=torch.int8)})),
        "is stored as int8",
    ),
    "a strange tensor": (tensors(lambda found: found.update({"score.weight": torch.zeros(2)})), "holds 'score.weight'"),
    "a tensor twice": (tensors(lambda found: found.update({"wte.weight": found[WTE].clone()})), "holds a tensor twice"),
    "not finite": (tensors(lambda found: found[WTE].fill_(float("nan"))), "not finite"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is damaged"),
    "an absurd header": (write("model.safetensors", (10**12).to_bytes(8, "little") + b"{}"), "is damaged"),
    "no JSON": (write("config.json", b"{"), "config.json is damaged"),
    "a deep config": (write("config.json", b'{"a":' + b"[" * 100_000), "config.json is damaged"),
    "a huge config": (lambda folder: os.truncate(folder / "config.json", 1 << 30), "config.json is damaged"),
    "a path in the index": (index({WTE: "../m/x.safetensors"}), "is not a file of the folder"),
    "an absolute path": (index({WTE: "/etc/passwd"}), "is not a file of the folder"),
    "a list as index": (index([1]), "does not say which file holds which tensor"),
    "a file that is not there": (index({WTE: "x.safetensors"}), "is missing"),
    "a link that leaves": (linked, "is a link that leaves the folder"),
    "a vocabulary too large": (setting(vocab_size=100), r"wte\.weight of .* is \[288, 24\]"),
    "another vocabulary": (write("tokenizer.json", b'{"model": {"type": "Unigram"}}'), "not a byte-pair encoding"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "m"
    make(folder)
    return folder


@pytest.mark.skipif(os.name == "nt", reason="needs links")
@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_folder_that_is_wrong_ends_in_a_sentence(
    sound: Path, tmp_path: Path, case: tuple[Callable[[Path], None], str]
) -> None:
    change, message = case
    shutil.copytree(sound, tmp_path / "m")
    change(tmp_path / "m")
    before = sorted((tmp_path / "m").iterdir())
    with pytest.raises(DfError) as caught:
        import_folder(tmp_path / "m", "m")
    assert re.search(message, caught.value.message), caught.value.message
    assert sorted((tmp_path / "m").iterdir()) == before
    assert not runs_home().exists() or not list(runs_home().iterdir())


def test_the_links_of_hugging_faces_cache_are_followed(sound: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(sound, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert import_folder(snapshot, "cached").steps() == [0]
