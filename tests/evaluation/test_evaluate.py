"""Evaluations of runs on disk: every figure is computed again here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from dfcli.codecs import MuLaw
from dfcli.cores import GPT, GPTConfig, WaveNet, WaveNetConfig
from dfcli.data.dataset import Dataset, remove_dataset
from dfcli.errors import DfError, UsageError
from dfcli.evaluation.evaluate import Evaluation, _bits, _bits_inside_levels, evaluate
from dfcli.ingest.prepare import prepare
from dfcli.runs.run import Run
from dfcli.system.events import Note

TEXT = "the quick brown fox – jumps över the lazy dog.\n" * 20
NAMES = ["anna", "bob", "cleo", "dörte", "eve", "finn", "gus", "hal", "ida", "jo"] * 3


def save(name: str, dataset: Dataset) -> Run:
    """An untrained run on a dataset."""
    torch.manual_seed(3)
    core: GPT | WaveNet
    if dataset.kind == "text":
        core = GPT(GPTConfig(dataset.codec.vocab_size, context=16, layers=1, heads=2, channels=16, init="torch"))
    else:
        core = WaveNet(WaveNetConfig(256, dilations=(1, 2, 4), cycles=2, residual=8, skip=8, head=8))
    kind = "gpt" if dataset.kind == "text" else "wavenet"
    info = {
        "kind": kind,
        "core": {"name": kind, "config": asdict(core.config)},
        "recipe": {},
        "dataset": {
            "name": dataset.name, "path": str(dataset.path), "fingerprint": dataset.fingerprint,
            "boundary": dataset.boundary, "lines": dataset.lines, "lead": dataset.lead, "normalize": "none",
            **{name: dataset.info["options"][name] for name in ("separator", "field")},
        },
        "seed": 0,
    }  # fmt: skip
    run = Run.create(name, info, dataset.codec)
    run.save(7, core.state_dict(), {}, {"val_loss": 1.0})
    return run


@pytest.fixture
def text(tmp_path: Path) -> Run:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with prepare([str(tmp_path / "text.txt")], name="text", val_fraction=0.2, test_fraction=0.1) as dataset:
        return save("text", dataset)


@pytest.fixture
def names(tmp_path: Path) -> Run:
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    with prepare([str(tmp_path / "names.txt")], name="names", lines=True, val_fraction=0.2) as dataset:
        return save("names", dataset)


@pytest.fixture
def sound(tmp_path: Path) -> Run:
    (tmp_path / "sound").mkdir()
    for i in range(10):
        tone = 0.5 * np.sin(np.arange(300 + 40 * i) * (0.1 + 0.01 * i))
        soundfile.write(tmp_path / "sound" / f"{i}.wav", tone, 8000)
    with prepare([str(tmp_path / "sound")], name="sound", val_fraction=0.2, levels=256) as dataset:
        return save("sound", dataset)


def measure(run: Run | str | None = None, data: Sequence[str] = (), **options: Any) -> Evaluation:
    return evaluate(run, data, device="cpu", **options)


@torch.no_grad()
def loss_of(run: Run, dataset: Dataset, split: str) -> tuple[float, list[int]]:
    """Nats per token in windows that do not overlap, or with all that was before (WaveNet), and the targets."""
    core, _ = run.build()
    part, losses, all_targets = dataset.splits[split], [], []
    for start, end in zip(part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(part.read(start, end + dataset.lines).astype(np.int64))
        window = 16 if isinstance(core, GPT) else len(ids)
        for begin in range(0, len(ids) - 1, window):
            inputs, targets = ids[begin : begin + window][: len(ids) - 1 - begin], ids[begin + 1 : begin + window + 1]
            losses.append(F.cross_entropy(core(inputs[None])[0], targets, reduction="none"))
            all_targets += targets.tolist()
    return float(torch.cat(losses).double().mean()), all_targets


def test_text(text: Run) -> None:
    with Dataset.open("text") as dataset:
        loss, targets = loss_of(text, dataset, "val")
        found = measure(text)
        decoded = dataset.codec.decode(targets)  # type: ignore[attr-defined]
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert (found.run, found.checkpoint, found.dataset, found.split) == ("text", 7, "text", "val")
    assert (found.tokens, found.context, found.stride) == (len(targets), 16, 16)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.bits_per_token == pytest.approx(loss / math.log(2), rel=1e-5)
    assert found.bits_per_character == pytest.approx(found.bits_per_token * len(targets) / len(decoded))
    assert found.bits_per_byte == pytest.approx(found.bits_per_token * len(targets) / len(decoded.encode()))
    assert len(decoded.encode()) > len(decoded)  # the text has characters of several bytes
    assert found.bits_per_sample is None
    assert list(found.baselines) == ["uniform", "unigram", "bigram", "trigram"]
    for figures in found.baselines.values():
        assert figures["bits_per_token"] == pytest.approx(figures["loss"] / math.log(2))
        bits = figures["loss"] / math.log(2) * len(targets)
        assert figures["bits_per_byte"] == pytest.approx(bits / len(decoded.encode()))
    assert found.tokens_per_second == found.tokens / found.seconds
    json.dumps(asdict(found), allow_nan=False)


def test_unigram_of_a_text(text: Run) -> None:
    with Dataset.open("text") as dataset:
        train = dataset.splits["train"].read(1, dataset.splits["train"].tokens_count)
        val = dataset.splits["val"].read(1, dataset.splits["val"].tokens_count)
        size = dataset.vocab_size
    counts = np.bincount(train, minlength=size) + 1
    expected = -np.log(counts[val] / counts.sum()).mean()
    assert measure(text).baselines["unigram"]["loss"] == pytest.approx(expected)


def test_lines(names: Run) -> None:
    with Dataset.open("names") as dataset:
        loss, targets = loss_of(names, dataset, "val")
        decoded = dataset.codec.decode(targets)  # type: ignore[attr-defined]
    found = measure(names)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.tokens == len(targets) == len(decoded)
    assert found.bits_per_byte == pytest.approx(found.bits_per_token * len(targets) / len(decoded.encode()))
    assert decoded.count("\n") == 6  # each line's end is a target
    assert "6 lines" in found.protocol


def test_sound(sound: Run) -> None:
    with Dataset.open("sound") as dataset:
        loss, targets = loss_of(sound, dataset, "val")
    events: list[Any] = []
    found = measure(sound, stride=5, on_event=events.append)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.tokens == len(targets)
    assert found.bits_per_sample == found.bits_per_token == pytest.approx(loss / math.log(2), rel=1e-5)
    assert (found.bits_per_byte, found.bits_per_character) == (None, None)
    assert (found.context, found.stride) == (15, 1)
    assert Note("the stride changes nothing: this model sees 15 ids at every position") in events
    assert "2 recordings" in found.protocol


def test_a_single_target_is_told_as_one(text: Run, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("ab")
    assert measure(text, [str(tmp_path / "two.txt")]).protocol.startswith("the 1 target in one text is scored once")


def test_a_stride_gives_more_context_and_is_stated(text: Run) -> None:
    whole, half = measure(text), measure(text, stride=4)
    assert half.stride == 4
    assert half.tokens == whole.tokens
    assert half.loss != whole.loss
    assert "windows of 16 ids that do not overlap" in whole.protocol
    assert "13 to 16 ids" in half.protocol
    assert whole.baselines == half.baselines
    with pytest.raises(UsageError, match="from 1 to the context of 16"):
        measure(text, stride=17)


def test_splits(text: Run) -> None:
    assert measure(text, split="test").split == "test"
    assert measure(text, split="train").tokens > measure(text).tokens
    for split in ("all", "tset"):  # what is not named is not taken either
        with pytest.raises(UsageError, match=f"there is no split `{split}`") as error:
            measure(text, split=split)
        assert error.value.hint.endswith("there are val, test, train")


def test_a_split_that_is_not_there_is_hinted_as_it_is_typed(sound: Run, tmp_path: Path) -> None:
    with prepare([str(tmp_path / "sound")], val_fraction=0, levels=256) as dataset:
        run = save("trained", dataset)
    with pytest.raises(UsageError, match="has no split 'val'") as error:
        measure(run)
    assert error.value.hint == "give `--split train`"


def test_figures_of_the_whole_split_do_not_stand_beside_a_part(sound: Run) -> None:
    whole, part = measure(sound), measure(sound, limit=50)
    assert whole.flac_bits_per_sample is not None
    assert whole.quantization_snr is not None
    assert (part.flac_bits_per_sample, part.quantization_snr) == (None, None)
    assert measure(sound, limit=10**6).flac_bits_per_sample == whole.flac_bits_per_sample


def test_files_are_scored_whole(text: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the lazy fox jumps.\n", encoding="utf-8")
    found = measure(text, [str(other)])
    assert (found.dataset, found.split, found.tokens) == (str(other), "all", 19)
    assert set(found.baselines) == {"uniform", "unigram", "bigram", "trigram"}  # counted on the run's train split
    assert measure(text, [str(other)]).loss == found.loss
    with pytest.raises(UsageError, match="scored whole"):
        measure(text, [str(other)], split="val")
    other.write_text("äÄ", encoding="utf-8")
    with pytest.raises(DfError, match="knows none of the characters"):
        measure(text, [str(other)])
    assert sorted(path.name for path in (tmp_path / "home" / "datasets").iterdir() if path.is_dir()) == ["text"]


def test_documents_of_files_are_told_apart_as_in_the_runs_own_data(tmp_path: Path) -> None:
    own, other, plain = tmp_path / "own.jsonl", tmp_path / "other.jsonl", tmp_path / "plain.txt"
    own.write_text("".join(json.dumps({"text": f"ab {k}", "id": k}) + "\n" for k in range(10)))
    other.write_text(json.dumps({"text": "ab 1", "id": 99}) + "\n" + json.dumps({"text": "b 23", "id": 98}) + "\n")
    plain.write_text("ab 1")
    with prepare([str(own)], name="records", field="text") as dataset:
        run = save("records", dataset)
    run.info["dataset"]["field"] = "text"
    found = measure(run, [str(other)])
    assert (found.tokens, found.unknown_characters) == (2 * 3, 0)
    assert measure(run, [str(plain)]).tokens == 3


def test_lines_of_files(names: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("bob\nanna\n", encoding="utf-8")
    assert measure(names, [str(other)]).tokens == 4 + 5


def test_other_datasets_by_name(text: Run, names: Run, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(TEXT[100:600], encoding="utf-8")
    prepare([str(tmp_path / "b.txt")], name="b", codec=text.codec).close()
    found = measure(text, ["b"])
    assert (found.dataset, found.split) == ("b", "val")
    with pytest.raises(UsageError, match="another codec"):
        measure(text, ["names"])


def test_data_that_is_gone_or_changed(text: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the lazy fox jumps.\n", encoding="utf-8")
    remove_dataset("text")
    with pytest.raises(DfError, match="the dataset text that run text was trained on is gone"):
        measure(text)
    events: list[Any] = []
    found = measure(text, [str(other)], on_event=events.append)
    assert list(found.baselines) == ["uniform"]
    assert any(isinstance(event, Note) and "only the uniform baseline" in event.text for event in events)

    prepare([str(other)], name="text").close()
    with pytest.raises(DfError, match="the dataset text that run text was trained on is gone or has changed"):
        measure(text)


def test_data_of_another_kind_hold_nothing_to_score(text: Run, sound: Run, tmp_path: Path) -> None:
    with pytest.raises(DfError, match="the sources hold nothing to score"):
        measure(text, [str(tmp_path / "sound")])


def test_the_newest_run_is_taken_and_named(text: Run, names: Run) -> None:
    events: list[Any] = []
    assert measure(on_event=events.append).run == "names"
    assert Note("the newest run is names") in events
    assert measure("text").run == "text"
    assert measure(str(text.path)).run == "text"


def test_a_broken_model(text: Run) -> None:
    core, _ = text.build()
    torch.nn.init.constant_(core.norm.weight, float("nan"))  # type: ignore[union-attr]
    text.save(8, core.state_dict(), {}, {"val_loss": 0.5})
    with pytest.raises(DfError, match="not finite"):
        measure(text)
    assert measure(text, checkpoint=7).checkpoint == 7


def test_bits_of_16_bit_samples_do_not_depend_on_the_levels(tmp_path: Path) -> None:
    """A uniform model of levels codes a 16-bit sample by its level and its place among the level's 16-bit values."""
    samples = np.random.default_rng(0).integers(-20000, 20000, 4000).astype(np.int16)
    soundfile.write(tmp_path / "noise.wav", samples, 8000)
    for levels in (256, 1024):
        with prepare([str(tmp_path / "noise.wav")], levels=levels, whole=True) as dataset:
            codec = dataset.codec
            assert isinstance(codec, MuLaw)
            values = codec.values_of_16_bits[codec.encode(samples / np.float32(1 << 15))]
            inside = _bits_inside_levels(codec, dataset, "all", None)
            assert inside == pytest.approx(np.log2(np.maximum(values, 1)).mean(), abs=1e-9)
            found = _bits(math.log(levels), {"bits_per_token": 4000, "bits_per_sample": 4000}, inside)
            # By f's slope: log2 of its inverse's slope times 2^16, which does not depend on the number of levels
            slope = np.log(256) * (1 + 255 * np.abs(samples / 32768)) / 255
            assert found["bits_per_16bit_sample"] == pytest.approx(np.log2(65536 * slope).mean(), abs=0.03)


def test_hints_about_other_data_name_nothing_that_only_a_preparation_takes(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"{name} and {name}"}) + "\n" for name in NAMES), encoding="utf-8")
    with prepare([str(data)], field="text", val_fraction=0.2) as dataset:
        run = save("field", dataset)
    other = tmp_path / "other.jsonl"
    other.write_text('{"texts": "anna"}\n')
    with pytest.raises(DfError, match="no field `text`") as error:
        measure(run, [str(other)])
    assert error.value.hint == "the data are read as those of run field were, by `field` 'text'"
    with prepare([str(data)], name="plain") as dataset:
        run = save("plain", dataset)
    events: list[Any] = []
    measure(run, [str(data)], on_event=events.append)
    assert not any("--" in event.text for event in events if isinstance(event, Note))
