"""Runs that transformers opens: the same logits, the same greedy text, the same loss, the same ids."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dfcli import cores
from dfcli.codecs import BPE, GPT2, Bytes, Chars, Codec, MuLaw, TextCodec
from dfcli.codecs.tokenizer_json import beginning, tokenizer_json, with_beginning
from dfcli.cores import GPTConfig
from dfcli.errors import DfError, UsageError
from dfcli.evaluation.evaluate import evaluate
from dfcli.generation.sample import sample_text
from dfcli.ingest.prepare import prepare
from dfcli.runs import Run
from dfcli.runs.export import architecture, export
from dfcli.runs.huggingface import import_folder
from dfcli.runs.layouts import APERTUS
from dfcli.runs.layouts import GPT2 as GPT2_MODEL
from dfcli.runs.run import runs_home
from dfcli.training.train import plan
from tests.codecs.test_gpt2 import write_vocabulary
from tests.faults import failing

transformers = pytest.importorskip("transformers")

TEXT = "the cat sat on the mat; 12 dogs don't.\n\n  Then\tit ran – naïve 😀👩‍👧 日本語!\r\n end  \n" * 6

MODERN = {
    "position": "rotary", "norm": "rmsnorm", "activation": "relu2", "bias": False, "qkv_bias": False, "qk_norm": True,
    "tied_head": False,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "modern": (MODERN, APERTUS),
    "modern, tied, gelu": (MODERN | {"tied_head": True, "activation": "gelu"}, APERTUS),
    "nano": ({"bias": False, "qkv_bias": False}, GPT2_MODEL),
    "gpt2": ({"activation": "gelu_tanh"}, GPT2_MODEL),
    "makemore": ({"activation": "gelu_tanh", "tied_head": False, "dropout": 0.1}, GPT2_MODEL),
    "no bias of queries": ({"activation": "relu2", "qkv_bias": False}, GPT2_MODEL),
}


def make_run(codec: TextCodec, name: str = "r", data: dict[str, Any] | None = None, **values: Any) -> Run:
    """A run of random weights."""
    config = GPTConfig(codec.vocab_size, 64, 2, 2, 24, **values)
    record = {"name": "", "path": "", "fingerprint": "", "boundary": None, "lines": False, "lead": 1}
    data = {**record, "normalize": "none", **(data or {})}
    run = Run.create(name, {"kind": "gpt", "core": {"name": "gpt", "config": asdict(config)}, "dataset": data}, codec)
    torch.manual_seed(0)
    core = cores.GPT(config)
    for parameter in core.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    run.save(0, core.state_dict(), {}, {"val_loss": None})
    return run


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_transformers_computes_the_same(tmp_path: Path, model: tuple[dict[str, Any], str]) -> None:
    values, form = model
    codec = Chars(TEXT)
    run = make_run(codec, **values)
    assert export(run, tmp_path / "hf").architecture == form
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == form
    core, _ = run.build()
    ids = torch.randint(0, codec.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, reference = core(ids), theirs.eval()(ids).logits
    assert reference.abs().max() > 0.5
    assert (ours - reference).abs().max() < 1e-4

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode(TEXT) == codec.encode(TEXT).tolist()
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    made = theirs.generate(prompt, max_new_tokens=50, do_sample=False)
    greedy = sample_text(run, prompt="the cat", tokens=50, temperature=0, device="cpu", engine="plain")
    assert [tokenizer.decode(made[0])] == greedy.samples

    (tmp_path / "text.txt").write_text(TEXT, newline="")
    found = evaluate(run, [str(tmp_path / "text.txt")], device="cpu")
    read = TEXT.replace("\r\n", "\n")  # as a text that is learnt from
    ids, nats = torch.tensor(codec.encode(read).astype("int64")), 0.0
    for begin in range(0, len(ids) - 1, 64):
        window = ids[begin : begin + 65]
        with torch.no_grad():
            nats += F.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    assert found.loss == pytest.approx(nats / (len(ids) - 1), abs=5e-5)


@pytest.mark.parametrize("values", [{"activation": "gelu_tanh"}, MODERN, MODELS["modern, tied, gelu"][0]])
def test_what_was_exported_comes_back(tmp_path: Path, values: dict[str, Any]) -> None:
    run = make_run(Chars(TEXT), **values | {"init": "zero" if "position" in values else "gpt2"})
    export(run, tmp_path / "hf")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(
        tmp_path / "hf"
    )  # as it rewrites
    again = import_folder(tmp_path / "hf", "again")
    assert (again.codec.to_json(), again.info["core"]) == (run.codec.to_json(), run.info["core"])
    before, after = run.load().model, again.load().model
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def rewritten(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | values))
    return folder


def test_an_apertus_that_the_core_cannot_compute_is_refused_by_name(tmp_path: Path) -> None:
    export(make_run(Chars(TEXT), **MODERN), tmp_path / "hf")
    for key, value in {
        "rms_norm_eps": 1e-5, "num_key_value_heads": 1, "hidden_act": "silu", "intermediate_size": 100,
        "attention_bias": True, "head_dim": 24, "rope_parameters": {"rope_type": "llama3", "rope_theta": 12e6},
        "hidden_size": "x",
    }.items():  # fmt: skip
        folder = rewritten(Path(shutil.copytree(tmp_path / "hf", tmp_path / key)), **{key: value})
        with pytest.raises(DfError, match="intermediate_size" if key == "hidden_size" else f"has {key} "):
            import_folder(folder)
    for name, what in {"self_attn.q_norm.weight": "gains", "mlp.act_fn.alpha_p": "an activation"}.items():
        folder = Path(shutil.copytree(tmp_path / "hf", tmp_path / name))
        tensors = load_file(folder / "model.safetensors")
        tensors[f"model.layers.1.{name}"] += 0.5
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(DfError, match=f"{name} of .* holds {what} that the GPT core has not"):
            import_folder(folder, "again")
    assert [path.name for path in runs_home().iterdir()] == ["r"]


def codecs(tmp_path: Path) -> dict[str, TextCodec]:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("t", "he"), ("Ġ", "the"), ("Ċ", "Ċ"), ("Ã", "©"), ("Ġ", "Ġ")]
    return {
        "chars": Chars(TEXT), "bytes": Bytes(), "bpe": BPE.train([TEXT], 300),
        "gpt2": GPT2(write_vocabulary(tmp_path / "bpe", merges)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["chars", "bytes", "bpe", "gpt2"])
def test_tokenizers_give_the_same_ids(tmp_path: Path, name: str) -> None:
    codec = codecs(tmp_path)[name]
    export(make_run(codec), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == codec.vocab_size
    for text in (TEXT, " a  b ", "\n\n", "  ", "👧", "don't", "e", TEXT[::-1]):
        if name == "chars" and not set(text) <= set(TEXT):
            continue
        ids = codec.encode(text).tolist()
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == codec.end_of_text
    if name == "chars":
        with pytest.raises(Exception, match="vocabulary"):
            tokenizer.encode("ω")


def test_the_published_vocabulary_gives_the_same_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from tests.shared import shared_file

    codec = GPT2(shared_file("gpt2-bpe"))
    theirs = Tokenizer.from_str(tokenizer_json(codec).decode())
    text = shared_file("tinyshakespeare.txt").read_text("utf-8")[:200_000] + TEXT
    assert theirs.encode(text).ids == codec.encode(text).tolist()


def test_ends_of_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("ab\nba\naab\n" * 20)
    with prepare([str(tmp_path / "lines.txt")], lines=True) as dataset:
        data = {"boundary": dataset.boundary, "lines": True}
        run = make_run(dataset.codec, data=data)  # pyright: ignore[reportArgumentType]
    export(run, tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "n-gram tables": (MODERN | {"ngrams": 3}, "ngrams=1"),
    "bias of the head": ({"head_bias": True}, "head_bias=false"),
    "learned with RMSNorm": ({"norm": "rmsnorm"}, "norm=layernorm"),
    "learned with QK-norm": ({"qk_norm": True}, "qk_norm=false"),
    "rotary with LayerNorm": (MODERN | {"norm": "layernorm"}, "norm=rmsnorm"),
    "rotary without QK-norm": (MODERN | {"qk_norm": False}, "qk_norm=true"),
    "rotary with biases": (MODERN | {"bias": True}, "bias=false"),
    "rotary with biases of queries": (MODERN | {"qkv_bias": True}, "qkv_bias=false"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_go_is_refused_with_the_way_round_it(tmp_path: Path, case: tuple[dict[str, Any], str]) -> None:
    values, instead = case
    field, value = instead.split("=")
    run = make_run(Bytes(), **values)
    with pytest.raises(UsageError, match=f"with {field}=.* cannot be exported") as caught:
        export(run, tmp_path / "hf")
    assert f"`df train gpt --set {instead}`" in caught.value.hint
    assert not (tmp_path / "hf").exists()
    changed = values | {field: int(value) if value.isdigit() else {"true": True, "false": False}.get(value, value)}
    assert architecture("gpt", GPTConfig(256, 32, 2, 2, 24, **changed))  # the way round it leads somewhere
    with pytest.raises(UsageError, match="a wavenet cannot be exported"):
        architecture("wavenet", cores.WaveNetConfig(256))


class Later(TextCodec):
    """A codec that is added later, and that the exporter has no case for."""

    name, vocab_size = "later", 256
    encode, decode, decoder, id_of_newline = Bytes.encode, Bytes.decode, Bytes.decoder, Bytes.id_of_newline
    to_json, from_json = Bytes.to_json, Bytes.from_json


@pytest.mark.parametrize("codec", [Later(), MuLaw(8000)])
def test_a_codec_without_a_tokenizer_json_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec
) -> None:
    run = make_run(Bytes())
    monkeypatch.setattr(Run, "codec", codec)
    with pytest.raises(UsageError, match=f"a model with the codec {codec.name} cannot be exported") as caught:
        export(run, tmp_path / "hf")
    assert "--codec chars" in caught.value.hint
    assert not (tmp_path / "hf").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = make_run(Bytes())
    for n in count(1):
        folder = tmp_path / f"hf{n}"
        with failing(n, errno.ENOSPC) as faults:
            try:
                export(run, folder)
                whole = True
            except DfError:
                whole = False
        assert len(list(folder.iterdir())) == 5 if whole else not folder.exists()
        if not faults.fired:
            break
    assert whole
    with pytest.raises(UsageError, match="exists already"):
        export(run, folder)


def test_a_plan_says_whether_it_can_be_exported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 1000)
    shown = plan("gpt", [str(tmp_path / "a.txt")], steps=10, device="cpu")
    assert shown.export[0] is None
    assert "ngrams" in shown.export[1]
    assert "`df train gpt --set ngrams=1`" in shown.export[1]
    shown = plan("gpt", [str(tmp_path / "a.txt")], steps=10, device="cpu", overrides={"ngrams": "1"})
    assert shown.to_json()["exportable"] == APERTUS
    assert plan("gpt", preset="nano", device="cpu").to_json()["exportable"] == GPT2_MODEL


@pytest.mark.parametrize("name", ["chars", "bytes", "bpe", "gpt2"])
def test_a_text_begins_as_a_document_does(tmp_path: Path, name: str) -> None:
    """A model of several documents reads their boundary before a prompt, there as here; also after the way back."""
    codec = codecs(tmp_path)[name]
    ids = codec.encode(TEXT[:9]).tolist()
    free = next(i for i in range(codec.vocab_size) if i not in ids)
    boundary = free if codec.end_of_text is None else codec.end_of_text
    run = make_run(codec, data={"boundary": boundary, "lead": 1})
    export(run, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode(TEXT[:9]) == [boundary, *ids]
    assert tokenizer.encode(TEXT[:9], add_special_tokens=False) == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    given = tokenizer(TEXT[:9], return_tensors="pt").input_ids
    options = {"attention_mask": torch.ones_like(given), "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(given, max_new_tokens=20, do_sample=False, **options)[0].tolist()
    ends = codec.end_of_text is not None and boundary in made[1:]  # there `df` ends a text
    made = made[1 : made.index(boundary, 1)] if ends else made[1:]
    assert len(made) > len(ids)
    for each in (run, import_folder(tmp_path / "hf", "back")):
        assert (each.dataset["boundary"], each.dataset["lead"]) == (boundary, 1)
        here = sample_text(each, TEXT[:9], tokens=20, temperature=0, device="cpu").samples[0]
        assert here == codec.decode(made)


def test_a_tokenizer_that_only_trims_places_begins_a_text_too() -> None:
    """GPT-2's published tokenizer.json has such a post-processor. One that adds something is left alone."""
    from tokenizers import Tokenizer

    codec = BPE.train([TEXT], 300)
    values = json.loads(tokenizer_json(codec))
    values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made = with_beginning(json.dumps(values).encode(), [299, 299])
    assert beginning(made) == [299, 299]
    assert Tokenizer.from_str(made.decode()).encode(TEXT).ids == [299, 299, *codec.encode(TEXT).tolist()]
    assert with_beginning(made, [5]) == made
    assert beginning(tokenizer_json(codec)) == []
    for damaged in (b"[]", b"{", b'{"post_processor": {"single": 3}}', b"[" * 100_000):
        assert beginning(damaged) == []
