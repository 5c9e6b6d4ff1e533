"""Preparation: the right ids in the right split, whole or not at all, used again only while nothing has changed."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import tracemalloc
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.codecs import BPE, GPT2, Bytes, Chars, MuLaw, TextCodec
from dfcli.data.dataset import Dataset, Split, datasets_folder, list_datasets, remove_dataset, reopen
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.ingest import reuse, splits
from dfcli.ingest.prepare import prepare
from dfcli.ingest.reuse import unused_datasets
from dfcli.ingest.sources import Lines
from dfcli.ingest.texts import _merge_lines
from dfcli.system.events import Choice, Note, Progress
from tests.faults import dies, failing, until_it_passes
from tests.shared import shared_file

soundfile = pytest.importorskip("soundfile")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")


def ids(split: Split) -> np.ndarray:
    return split.read(0, split.tokens_count)


def decoded(dataset: Dataset, split: str) -> list[str]:
    """The documents of a split as texts, without their boundaries."""
    part, codec = dataset.splits[split], dataset.codec
    assert isinstance(codec, TextCodec)
    skip = dataset.boundary is not None
    return [codec.decode(part.document(k)[skip:]) for k in range(part.documents)]


def notes(events: list[object]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(".lock"))


def wav(path: Path, samples: np.ndarray, rate: int = 8000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


def tone(samples: int, pitch: float = 2 * np.pi / 100, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(np.arange(samples) * pitch)).astype(np.float32)


# One text ------------------------------------------------------------------------------------------------------------


def test_one_text_is_cut_as_nanogpt_cuts_it(tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abcdefg \nä€", k=12_345))
    (tmp_path / "a.txt").write_bytes(text.encode())
    events: list[object] = []
    dataset = prepare([str(tmp_path / "a.txt")], on_event=events.append)
    assert isinstance(dataset.codec, Chars)
    assert dataset.codec.alphabet == "".join(sorted(set(text)))
    assert decoded(dataset, "train") == [text[: int(0.9 * len(text))]]
    assert decoded(dataset, "val") == [text[int(0.9 * len(text)) :]]
    assert set(dataset.splits) == {"train", "val"}
    assert (dataset.kind, dataset.boundary, dataset.lines, dataset.lead) == ("text", None, False, 1)
    assert dataset.info["split_rule"] == "by position: the first 90% train, the last 10% validate"
    assert dataset.info["facts"] == {"characters": 12_345, "bytes": len(text.encode())}
    assert [event.what for event in events if isinstance(event, Choice)] == ["codec", "split"]
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total == len(text.encode())


def test_tiny_shakespeare_has_the_published_sizes() -> None:
    dataset = prepare([str(shared_file("tinyshakespeare.txt"))])
    assert dataset.codec.vocab_size == 65
    assert {name: split.tokens_count for name, split in dataset.splits.items()} == {"train": 1_003_854, "val": 111_540}


def test_gpt2_gives_the_published_sizes_of_tiny_shakespeare() -> None:
    text, bpe = shared_file("tinyshakespeare.txt"), shared_file("gpt2-bpe")
    dataset = prepare([str(text)], codec="gpt2", bpe=str(bpe))
    assert {name: split.tokens_count for name, split in dataset.splits.items()} == {"train": 301_966, "val": 36_059}
    assert (dataset.boundary, dataset.info["dtype"]) == (None, "uint16")
    assert isinstance(Dataset.open(dataset.name).codec, GPT2)


@pytest.mark.parametrize(("val", "test", "sizes"), [(0.1, 0.1, [80, 10, 10]), (0, 0.25, [75, 25]), (0, 0, [100])])
def test_fractions_of_one_text(tmp_path: Path, val: float, test: float, sizes: list[int]) -> None:
    (tmp_path / "a.txt").write_text("x" * 99 + "y")
    dataset = prepare([str(tmp_path / "a.txt")], val_fraction=val, test_fraction=test)
    assert [split.tokens_count for split in dataset.splits.values()] == sizes
    assert list(dataset.splits) == [name for name, share in (("train", 1), ("val", val), ("test", test)) if share]


def test_the_whole_of_a_text_in_one_split_that_does_not_stay(tmp_path: Path, home: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    with prepare([str(tmp_path / "a.txt")], codec=Bytes(), whole=True) as dataset:
        assert ids(dataset.splits["all"]).tobytes() == b"hello world"
        assert list(dataset.splits) == ["all"]
        assert dataset.path.exists()
        assert list_datasets() == []
        kept = ids(dataset.splits["all"])
    assert not dataset.path.exists()
    assert kept.tobytes() == b"hello world"  # what was handed out stays valid
    dataset = prepare([str(tmp_path / "a.txt")], whole=True)
    path = dataset.path
    del dataset
    assert not path.exists()


def test_a_text_may_be_piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    pipe("to be or not to be")
    first = prepare(["-"])
    pipe("to be or not to be")
    second = prepare(["-"])
    pipe("that is the question")
    third = prepare(["-"])
    assert first.name == second.name != third.name
    assert first.name.startswith("stdin-")
    assert "".join(decoded(first, "train") + decoded(first, "val")) == "to be or not to be"


# Several texts -------------------------------------------------------------------------------------------------------


def corpus(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    texts = [f"text number {k} " + "ab" * k for k in range(count)]
    for k, text in enumerate(texts):
        (folder / f"{k:03}.txt").write_text(text)
    return texts


def test_several_texts_are_dealt_out_whole(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "c", 40)
    dataset = prepare([str(tmp_path / "c")], test_fraction=0.2)
    parts = {name: decoded(dataset, name) for name in dataset.splits}
    assert {name: len(part) for name, part in parts.items()} == {"train": 28, "val": 4, "test": 8}
    assert sorted(chain(*parts.values())) == sorted(texts)
    assert all(part == sorted(part, key=texts.index) for part in parts.values())
    assert dataset.boundary is None
    assert "fixed shuffle of 40 texts" in dataset.info["split_rule"]
    again = prepare([str(tmp_path / "c")], test_fraction=0.2, name="again")
    assert {name: decoded(again, name) for name in again.splits} == parts
    assert again.fingerprint == dataset.fingerprint


def test_gpt2_texts_begin_with_the_end_of_text(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "c", 8)
    dataset = prepare([str(tmp_path / "c")], codec="gpt2", bpe=str(shared_file("gpt2-bpe")))
    assert dataset.boundary == 50256
    for split in dataset.splits.values():
        assert all(split.document(k)[0] == 50256 for k in range(split.documents))
    assert sorted(decoded(dataset, "train") + decoded(dataset, "val")) == sorted(texts)


def test_separate_sources(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "c", 6)
    (tmp_path / "new.txt").write_text("ÄÖ only here")
    events: list[object] = []
    dataset = prepare(
        [str(tmp_path / "c")], val=[str(tmp_path / "c" / "002.txt")], test=[str(tmp_path / "new.txt")],
        on_event=events.append,
    )  # fmt: skip
    assert decoded(dataset, "train") == texts[:2] + texts[3:]
    assert decoded(dataset, "val") == [texts[2]]
    assert decoded(dataset, "test") == ["ÄÖ only here"]
    assert "002.txt (used for validation)" in notes(events)
    assert dataset.info["split_rule"] == "all 5 texts train; 1 text given for it validates; 1 text given for it tests"


def test_one_of_something_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aa\n\nab")
    (tmp_path / "b.txt").write_text("ab\n")
    events: list[object] = []
    with prepare([str(tmp_path / "a.txt")], name="whole", val_fraction=0) as dataset:
        assert dataset.info["split_rule"] == "the only text trains"
    prepare([str(tmp_path / "a.txt")], name="lines", val_fraction=0, lines=True, on_event=events.append).close()
    assert "1 blank line was left out" in notes(events)
    with pytest.raises(UsageError, match=r"^1 line cannot be split into 2 parts"):
        prepare([str(tmp_path / "b.txt")], lines=True)

    def told(**rates: int) -> str:
        """What is said of recordings of these rates."""
        folder = tmp_path / "-".join(f"{name}{rate}" for name, rate in rates.items())
        folder.mkdir()
        for name, rate in rates.items():
            wav(folder / f"{name}.wav", tone(800), rate)
        events.clear()
        prepare([str(folder)], val_fraction=0, on_event=events.append).close()
        return notes(events) + " " + " ".join(event.reason for event in events if isinstance(event, Choice))

    one, two, three = told(a=8000), told(a=8000, b=44_100), told(a=22_050, b=22_050, c=8000)
    assert "the recording has it" in one
    assert "1 of 2 recordings has it, and as many have 44,100 Hz: the lower rate is taken" in two
    assert "2 of 3 recordings have 22,050 Hz, the most" in three


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "c", 6)
    (tmp_path / "c" / "bad.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "c" / "binary").write_bytes(b"\0\1")
    (tmp_path / "c" / "empty.txt").write_bytes(b"")
    (tmp_path / "c" / "short.txt").write_bytes(b"x")
    (tmp_path / "c" / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    wav(tmp_path / "c" / "a.wav", tone(10))
    events: list[object] = []
    dataset = prepare([str(tmp_path / "c")], on_event=events.append)
    assert sorted(decoded(dataset, "train") + decoded(dataset, "val")) == sorted(texts)
    skipped = dataset.info["skipped"]
    assert skipped["count"] == 6
    assert {Path(file["name"]).name: file["reason"] for file in skipped["files"]} == {
        "a.wav": "not text",
        "bad.txt": "is not UTF-8 at byte 2",
        "binary": "is not text: it has a NUL at byte 0",
        "empty.txt": "empty",
        "short.txt": "too short: 1 character",
        "mark.txt": "empty",
    }
    assert "6 files were left out" in notes(events)
    assert not set("größe\0") & set(dataset.codec.alphabet) - set("".join(texts))  # type: ignore[attr-defined]
    events.clear()
    prepare([str(tmp_path / "c")], on_event=events.append)
    assert "6 files were left out" in notes(events)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"x", "too short"),
        (b"\xef\xbb\xbf", "empty"),
        (b"ok \xff", "not UTF-8 at byte 3"),
        (b"ok \0", "NUL at byte 3"),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_a_named_file_that_cannot_be_used_is_an_error(tmp_path: Path, data: bytes, message: str, lines: bool) -> None:
    if data == b"x" and lines:
        pytest.skip("one character is a line")
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DfError) as error:
        prepare([str(tmp_path / "a.txt")], lines=lines)
    assert message in error.value.message + error.value.hint
    assert "a.txt" in error.value.message + error.value.hint
    assert tree(datasets_folder()) == []


def test_very_short_texts(tmp_path: Path) -> None:
    (tmp_path / "2").write_text("ab")
    with pytest.raises(DfError, match="too short"):
        prepare([str(tmp_path / "2")])
    events: list[object] = []
    for length in range(3, 25):
        (tmp_path / f"{length}").write_text("a" * length)
        dataset = prepare([str(tmp_path / f"{length}")], on_event=events.append)
        train = int(0.9 * length)
        assert dataset.splits["train"].tokens_count == train
        assert ("val" in dataset.splits) == (length - train > 1)
    assert "too short for a val split" in notes(events)


# Lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["chars", "bytes"])
def test_lines_are_documents(tmp_path: Path, codec: str) -> None:
    words = ["emma", "olivia", "ava", "zoé", "x"] * 20
    (tmp_path / "a.txt").write_bytes("\r\n \n\t".join(words).encode() + b"\n\n")
    events: list[object] = []
    dataset = prepare([str(tmp_path / "a.txt")], lines=True, codec=codec, on_event=events.append)
    assert dataset.lines
    assert isinstance(dataset.codec, TextCodec)
    assert dataset.boundary == dataset.codec.id_of_newline
    assert "\r" not in dataset.info["codec"].get("alphabet", "")
    parts = {name: decoded(dataset, name) for name in dataset.splits}
    assert {name: len(part) for name, part in parts.items()} == {"train": 90, "val": 10}
    assert sorted(line.strip() for line in chain(*parts.values())) == sorted(words)
    for split in dataset.splits.values():
        stored = ids(split)
        assert stored[-1] == dataset.boundary
        assert split.offsets[-1] == len(stored) - 1
        assert np.array_equal(np.flatnonzero(stored == dataset.boundary), split.offsets)
    assert dataset.info["facts"]["blank_lines"] == 100
    assert "100 blank lines were left out" in notes(events)


def test_lines_of_several_files_and_separate_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc")
    (tmp_path / "b.txt").write_text("d\n\ne\n")
    (tmp_path / "v.txt").write_text("f\ng")
    dataset = prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], val=[str(tmp_path / "v.txt")], lines=True)
    assert decoded(dataset, "train") == ["a", "b", "c", "d", "e"]
    assert decoded(dataset, "val") == ["f", "g"]
    with prepare([str(tmp_path / "v.txt")], codec=dataset.codec, lines=True, whole=True) as other:
        assert decoded(other, "all") == ["f", "g"]
        assert other.boundary == dataset.boundary


def test_the_counts_of_the_makemore_lecture() -> None:
    names = str(shared_file("names.txt"))
    dataset = prepare([names], lines=True, split_rule="makemore", lead=8)
    assert dataset.lead == 8
    targets = {name: int(split.offsets[-1]) for name, split in dataset.splits.items()}
    assert targets == {"train": 182_625, "val": 22_655, "test": 22_866}
    words = Path(names).read_text().splitlines()
    random.Random(42).shuffle(words)
    n1, n2 = int(0.8 * len(words)), int(0.9 * len(words))
    for split, expected in (("train", words[:n1]), ("val", words[n1:n2]), ("test", words[n2:])):
        assert sorted(decoded(dataset, split)) == sorted(expected)


def test_the_split_of_makemore_py() -> None:
    import torch

    names = str(shared_file("names.txt"))
    dataset = prepare([names], lines=True, split_rule="makemore-transformer")
    words = Path(names).read_text().splitlines()
    torch.manual_seed(3407)
    order = torch.randperm(len(words)).tolist()
    assert sorted(decoded(dataset, "train")) == sorted(words[i] for i in order[:-1000])
    assert sorted(decoded(dataset, "test")) == sorted(words[i] for i in order[-1000:])
    assert decoded(dataset, "val") == decoded(dataset, "test")


@cache
def gpt2() -> GPT2:
    return GPT2(shared_file("gpt2-bpe"))


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="ab \n\t.'1é", max_size=60), cut=st.integers(0, 60))
def test_merges_never_reach_over_a_lines_end(text: str, cut: int) -> None:
    codec = gpt2()
    got = np.concatenate(list(_merge_lines(codec, Lines().of([text[:cut], text[cut:]]))))
    lines = "".join(Lines().of([text])).split("\n")[1:]
    assert got.tolist() == [i for line in lines for i in [198, *codec.encode(line)]]


def test_an_unknown_character_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good enough\n")
    codec = prepare([str(tmp_path / "a.txt")]).codec
    for text, lines in (("good\ndo g€od", False), ("\ufeffgood\r\n\r\ndo g€od\n", True)):
        (tmp_path / "b.txt").write_text(text, newline="")
        with pytest.raises(DfError) as error:
            prepare([str(tmp_path / "b.txt")], codec=codec, lines=lines, val_fraction=0)
        before = text[: text.index("€")]
        assert error.value.message == (
            f"{tmp_path / 'b.txt'} holds '€' (U+20AC) at byte {len(before.encode())} "
            f"(line {1 + before.count(chr(10))}), which the alphabet lacks"
        )
    (tmp_path / "c.txt").write_text("good")
    with pytest.raises(DfError, match="line break"):
        prepare([str(tmp_path / "c.txt")], codec=Chars("dgo"), lines=True, whole=True)


# Audio ---------------------------------------------------------------------------------------------------------------


def test_recordings_are_kept_apart(tmp_path: Path) -> None:
    sounds = {f"{k}.wav": tone(500 + 10 * k, pitch=0.01 * (k + 1)) for k in range(10)}
    for name, samples in sounds.items():
        wav(tmp_path / "r" / name, samples)
    (tmp_path / "r" / "README").write_text("not sound")
    events: list[object] = []
    dataset = prepare([str(tmp_path / "r")], lead=100, on_event=events.append)
    codec = dataset.codec
    assert isinstance(codec, MuLaw)
    assert (codec.sample_rate, codec.quantizer, dataset.kind, dataset.boundary) == (8000, "torchaudio", "audio", 512)
    stored = [split.document(k) for split in dataset.splits.values() for k in range(split.documents)]
    assert all(document[0] == 512 for document in stored)
    pcm = [(samples * 32767).round().astype(np.int16) / np.float32(32768) for samples in sounds.values()]
    expected = {codec.encode(np.asarray(samples, np.float32)).tobytes() for samples in pcm}
    got = {document[1:].tobytes() for document in stored}
    assert len(got) == 10
    close = [min(int(np.abs(np.frombuffer(a, np.uint16).astype(int) - np.frombuffer(b, np.uint16)).max())
                 for b in expected if len(a) == len(b)) for a in got]  # fmt: skip
    assert max(close) <= 1
    assert (dataset.splits["train"].documents, dataset.splits["val"].documents, dataset.lead) == (9, 1, 100)
    assert dataset.info["facts"]["recordings"] == 10
    assert dataset.info["facts"]["seconds"] == pytest.approx(5450 / 8000)
    assert "README (not audio)" in notes(events)
    assert not (dataset.path / "recordings.ids").exists()


def test_one_recording_is_cut_by_position(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", tone(1000))
    dataset = prepare([str(path)])
    with prepare([str(path)], codec=dataset.codec, whole=True) as whole:
        everything = ids(whole.splits["all"])
    train, val = ids(dataset.splits["train"]), ids(dataset.splits["val"])
    assert (len(train), len(val), train[0], val[0]) == (901, 101, 512, 512)
    assert np.array_equal(np.concatenate([train[1:], val[1:]]), everything[1:])


def test_the_sample_rate_is_the_sources_own_or_the_most_common(tmp_path: Path) -> None:
    def rate(*rates: int, **options: int) -> int:
        folder = tmp_path / "-".join(map(str, rates))
        for k, hertz in enumerate(rates):
            wav(folder / f"{k}.wav", tone(hertz // 10), hertz)
        codec = prepare([str(folder)], **options).codec  # type: ignore[arg-type]
        assert isinstance(codec, MuLaw)
        return codec.sample_rate

    assert rate(11_025, 11_025) == 11_025
    assert rate(8000, 11_025, 11_025) == 11_025
    assert rate(8000, 11_025) == 8000
    assert rate(44_100, 44_100, 8000) == 16_000
    assert rate(44_100, 44_100) == 16_000
    assert rate(44_100, 22_050, sample_rate=22_050) == 22_050


def test_what_is_wrong_with_recordings_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "SETTLED", 0)
    folder = tmp_path / "r"
    for k in range(5):
        wav(folder / f"good{k}.wav", tone(400, pitch=2 * np.pi * (k + 1) / 100))
    wav(folder / "silent.wav", np.zeros(400, np.float32))
    wav(folder / "clipped.wav", np.sign(tone(400)))
    wav(folder / "shifted.wav", tone(400, level=0.2) + 0.3)
    (folder / "broken.wav").write_bytes((folder / "good0.wav").read_bytes()[:40])
    (folder / "cut.wav").write_bytes((folder / "good0.wav").read_bytes()[:300])
    soundfile.write(folder / "scale.wav", 20_000 * tone(400, pitch=0.3), 8000, subtype="FLOAT")
    (folder / "text.wav").write_text("this is not a wave")
    (folder / "empty.wav").write_bytes(b"")
    events: list[object] = []
    dataset = prepare([str(folder)], on_event=events.append)
    facts = dataset.info["facts"]
    assert {key: facts[key] for key in ("recordings", "silent", "clipped", "off_centre")} == {
        "recordings": 10,
        "silent": 1,
        "clipped": 1,
        "off_centre": facts["off_centre"],
    }
    text = notes(events)
    assert "1 of 10 recordings is louder than full scale, 1, with samples of up to 1e+04" in text
    assert f"1 of 10 recordings is not as its header says: {folder / 'cut.wav'} (it is cut off" in text
    for name in ("silent.wav", "clipped.wav", "shifted.wav", "3 files were left out", "broken.wav", "text.wav"):
        assert name in text
    assert sum(split.documents for split in dataset.splits.values()) == 10
    events.clear()
    prepare([str(folder)], on_event=events.append).close()  # again, from what is there
    assert "3 files were left out" in notes(events)
    assert "1 of 10 recordings is silent" in notes(events)
    assert "1 of 10 recordings is louder than full scale, 1, and cut off there" in notes(events)
    with pytest.raises(DfError, match=r"broken\.wav cannot be used"):
        prepare([str(folder / "broken.wav")])


def test_nothing_is_learned_from_white_space(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DfError, match="nothing to learn from") as error:
        prepare([str(tmp_path / "blank.txt")])
    assert error.value.hint == f"left out: {tmp_path / 'blank.txt'} (nothing but white space)"
    assert list_datasets() == []
    prepare([str(tmp_path / "blank.txt")], codec=Bytes(), whole=True).close()


def test_nothing_is_learned_from_silence(tmp_path: Path) -> None:
    for k in range(2):
        wav(tmp_path / "r" / f"{k}.wav", np.zeros(400 + k, np.float32))
    with pytest.raises(DfError, match=r"there is only silence to learn from: .*0\.wav") as error:
        prepare([str(tmp_path / "r")])
    assert error.value.hint == "give recordings with sound in them"
    assert list_datasets() == []
    prepare([str(tmp_path / "r")], codec=MuLaw(8000), whole=True).close()  # what a run is scored on


def test_quiet_recordings_are_told_how_to_become_louder(tmp_path: Path) -> None:
    for k in range(2):
        wav(tmp_path / "r" / f"{k}.wav", tone(400, 0.1 * (k + 1), 0.02 * (k + 1)))
    events: list[object] = []
    prepare([str(tmp_path / "r")], on_event=events.append)
    assert "the loudest reaches 4.0% of full scale" in notes(events)
    assert "--normalize peak`" in notes(events)
    events.clear()
    prepare([str(tmp_path / "r")], normalize="peak", name="loud", on_event=events.append)
    assert "quiet" not in notes(events)


def test_normalisation_and_quantiser_reach_the_codec(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", tone(1000, level=0.1))
    quiet = prepare([str(tmp_path / "a.wav")], val_fraction=0)
    loud = prepare([str(tmp_path / "a.wav")], val_fraction=0, normalize="peak")
    s4 = prepare([str(tmp_path / "a.wav")], val_fraction=0, normalize="minmax", quantizer="s4", lead=4093)
    assert int(ids(loud.splits["train"]).max()) == 1023 > int(ids(quiet.splits["train"]).max())
    assert (int(ids(s4.splits["train"]).min()), int(ids(s4.splits["train"]).max())) == (0, 255)
    assert s4.info["codec"]["quantizer"] == "s4"
    assert len({quiet.name, loud.name, s4.name}) == 3


def test_a_recording_may_be_piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = wav(tmp_path / "a.wav", tone(500)).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with prepare(["-"]) as piped, prepare([str(tmp_path / "a.wav")]) as named:
        assert (piped.kind, piped.fingerprint) == ("audio", named.fingerprint)


def test_recordings_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    """Also beside larger files of other kinds, and with other names."""
    for k, name in enumerate(["a", "b.txt", "c.mp3"]):
        wav(tmp_path / "r" / "x.wav", tone(500, pitch=0.01 * (k + 1))).rename(tmp_path / "r" / name)
    (tmp_path / "r" / "video.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100_000))
    (tmp_path / "r" / "long.txt").write_text("a long transcript " * 10_000)
    events: list[object] = []
    with prepare([str(tmp_path / "r")], val_fraction=0, on_event=events.append) as dataset:
        assert (dataset.kind, dataset.splits["train"].documents) == ("audio", 3)
    assert "long.txt (not audio)" in notes(events)
    for k in range(9):
        (tmp_path / "r" / f"{k}.txt").write_text("text " * (k + 2))
    assert prepare([str(tmp_path / "r")]).kind == "text"
    with prepare([str(tmp_path / "r")], kind="audio") as dataset:
        assert dataset.kind == "audio"


def test_text_or_audio(tmp_path: Path) -> None:
    wav(tmp_path / "m" / "a.wav", tone(50))
    (tmp_path / "m" / "a.txt").write_text("words " * 100)
    events: list[object] = []
    assert prepare([str(tmp_path / "m")], on_event=events.append).kind == "audio"
    assert any(isinstance(event, Choice) and event.what == "kind of data" for event in events)
    assert prepare([str(tmp_path / "m")], codec="chars").kind == "text"
    both = [str(tmp_path / "m" / "a.wav"), str(tmp_path / "m" / "a.txt")]
    with pytest.raises(UsageError, match="text and audio"):
        prepare(both)
    with pytest.raises(UsageError, match="is audio"):
        prepare(both[:1], codec="chars")
    with pytest.raises(DfError, match=r"a\.txt cannot be used"):
        prepare(both[1:], codec="mulaw")


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "morse"},
        {"normalize": "loud"},
        {"split_rule": "random"},
        {"split_rule": "makemore"},
        {"split_rule": "makemore", "lines": True, "val": ["a.txt"]},
        {"lead": 0},
        {"lead": 2**20 + 1},
        {"val_fraction": 1.0},
        {"val_fraction": -0.1},
        {"val_fraction": float("nan")},
        {"val_fraction": 0.5, "test_fraction": 0.5},
        {"sample_rate": 8000},
        {"normalize": "peak"},
        {"bpe": "x"},
        {"name": "../x"},
        {"name": ".x"},
        {"name": "con"},
    ],
)
def test_wrong_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, options: dict[str, object]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text of a file")
    with pytest.raises(UsageError):
        prepare(["a.txt"], **options)  # type: ignore[arg-type]
    assert not home.exists()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nothing to prepare"):
        prepare([])
    with pytest.raises(UsageError, match=r"no file, folder or dataset nowhere\.txt"):
        prepare(["nowhere.txt"])
    (tmp_path / "shakespeare.txt").write_text("text")
    for slip in ("shakespear.txt", str(tmp_path / "shakespeare.text")):
        with pytest.raises(UsageError) as error:
            prepare([slip])
        assert error.value.hint == f"did you mean `{Path(slip).parent / 'shakespeare.txt'}`?"
    monkeypatch.setenv("HOME", str(tmp_path))
    with prepare(["~/shakespeare.txt"]) as dataset:  # as in --data=~/shakespeare.txt
        assert dataset.info["facts"]["characters"] == 4
    with pytest.raises(UsageError) as error:
        prepare(["shakespeare"])
    assert "df data get shakespeare" in error.value.hint
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError) as error:
        prepare(["a.txt"], codec="gpt2")
    assert "df data get gpt2-bpe" in error.value.hint
    assert "`df data prepare FILE --codec gpt2 --bpe FOLDER`" in error.value.hint  # no other command has --bpe
    (tmp_path / "empty").mkdir()
    with pytest.raises(DfError, match="nothing to learn from"):
        prepare(["empty"])


def test_a_fetched_corpus_goes_by_its_name(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfcli.ingest import download

    monkeypatch.setattr(download, "corpus_path", lambda name: tmp_path / "s.txt" if name == "shakespeare" else None)
    (tmp_path / "s.txt").write_text("to be or not to be")
    assert prepare(["shakespeare"]).name.startswith("shakespeare-")


# Using again ---------------------------------------------------------------------------------------------------------


def age(path: Path, seconds: float = 100) -> None:
    """Make a file look as if it had been left alone for long; its ctime cannot be set, so readers see it changed."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))


def test_used_again_while_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = prepare([str(path)])
    created = first.info["created"], (first.path / "dataset.json").stat().st_ino
    first.close()  # an open dataset is never replaced

    def prepared(**options: object) -> tuple[bool, str]:
        events: list[object] = []
        dataset = prepare([str(path)], on_event=events.append, **options)  # type: ignore[arg-type]
        dataset.close()
        same = (dataset.info["created"], (dataset.path / "dataset.json").stat().st_ino) == created
        return same, notes(events)

    assert prepared() == (True, f"using {first.name}, prepared before from the same sources")
    os.utime(path)  # touched, but the same
    assert prepared()[0]
    assert not prepared(codec="bytes")[0]
    status = path.stat()
    path.write_text("some test")  # the same length, and the same time:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    same, text = prepared()
    assert not same
    assert "changed: preparing it again" in text
    assert "".join(decoded(Dataset.open(first.name), "train")) == "some tes"


def test_a_settled_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfcli.ingest import reuse as module
    from dfcli.ingest.sources import Source

    path = tmp_path / "a.txt"
    path.write_text("some text")
    prepare([str(path)])
    monkeypatch.setattr(module, "SETTLED", -(10**12))
    monkeypatch.setattr(Source, "sha256", lambda self: pytest.fail("it was read"))
    prepare([str(path)])
    os.utime(path, ns=(0, 0))
    with pytest.raises(pytest.fail.Exception):
        prepare([str(path)])


def test_a_folder_that_gained_or_lost_a_file_has_changed(tmp_path: Path) -> None:
    corpus(tmp_path / "c", 5)
    (tmp_path / "c" / "bad.txt").write_bytes(b"\xff\xff")
    counts = []
    for change in (lambda: None, (tmp_path / "c" / "000.txt").unlink, lambda: corpus(tmp_path / "c", 6),
                   lambda: (tmp_path / "c" / "bad.txt").write_text("now it is good")):  # fmt: skip
        change()
        dataset = prepare([str(tmp_path / "c")], val_fraction=0)
        counts.append(dataset.splits["train"].documents)
        dataset.close()
    assert counts == [5, 4, 6, 7]
    assert len(list_datasets()) == 1


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.txt").write_text("some text")
    (tmp_path / "mine").write_text("a file of that name")
    assert prepare(["a b.txt"]).name.startswith("a-b-")
    assert prepare(["a b.txt", "mine"]).name.startswith(tmp_path.name.replace(".", "-"))
    mine = prepare(["a b.txt"], name="mine")
    assert mine.name == "mine"
    assert prepare(["a b.txt"], name="mine").path == mine.path
    with pytest.raises(UsageError, match="other sources or options"):
        prepare(["a b.txt"], name="mine", codec="bytes")
    with pytest.raises(UsageError, match="case"):
        prepare(["a b.txt"], name="MINE")
    assert prepare(["mine"]).path == mine.path  # the name wins
    assert prepare(["./mine"]).path != mine.path
    assert prepare([str(mine.path)]).path == mine.path
    with pytest.raises(UsageError, match="another codec") as error:
        prepare(["mine"], codec="bytes")
    assert error.value.hint == "`./mine` means the file or folder of that name"
    (tmp_path / "mine").unlink()
    with pytest.raises(UsageError, match="another kind of document") as error:
        prepare(["mine"], lines=True)
    assert error.value.hint == f"give its source instead of its name: {tmp_path / 'a b.txt'}"
    assert prepare(["mine"], codec="chars").path == mine.path
    assert prepare(["mine"], codec=mine.codec).path == mine.path
    with pytest.raises(UsageError, match="cannot be joined"):
        prepare(["mine", "a b.txt"])


def test_a_damaged_dataset_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    dataset = prepare([str(tmp_path / "a.txt")])
    dataset.close()
    (dataset.path / "train.tokens").write_bytes(b"")
    with pytest.raises(CorruptError):
        Dataset.open(dataset.name)
    events: list[object] = []
    again = prepare([str(tmp_path / "a.txt")], on_event=events.append)
    assert "preparing it again" in notes(events)
    assert again.splits["train"].tokens_count == 8
    again.close()
    (again.path / "sources.jsonl").unlink()
    if os.name != "nt":
        os.mkfifo(again.path / "sources.jsonl")
    again = prepare([str(tmp_path / "a.txt")], on_event=events.append)
    assert notes(events).count("preparing it again") == 2


def trained_on(name: str, dataset: Dataset) -> None:
    """A run's folder that says it was trained on a dataset."""
    from dfcli.runs.run import Run

    record = {"name": dataset.name, "path": str(dataset.path), "fingerprint": dataset.fingerprint}
    Run.create(name, {"kind": "gpt", "core": {"name": "gpt", "config": {}}, "dataset": record}, dataset.codec)


def test_a_dataset_that_a_run_was_trained_on_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the first contents")
    with prepare([str(path)]) as first:
        trained_on("a", first)
    path.write_text("the second contents, longer")
    events: list[object] = []
    with prepare([str(path)], on_event=events.append) as second:
        assert second.name == f"{first.name}-2"
        assert "it is kept, because run `a` needs it" in notes(events)
    with Dataset.open(first.name) as kept:
        assert kept.fingerprint == first.fingerprint
    path.write_text("the third contents, that no run knows")
    with prepare([str(path)]) as third:  # nothing was trained on the second: it is replaced
        assert third.name == second.name
        assert third.fingerprint != second.fingerprint
    path.write_text("the first contents")
    with prepare([str(path)]) as restored:
        assert restored.name == first.name
    with prepare([str(path)], name="mine") as mine:
        trained_on("b", mine)
    path.write_text("other contents")
    with pytest.raises(UsageError, match="the sources of the dataset mine have changed, and run `b` needs it as it is"):
        prepare([str(path)], name="mine")
    assert unused_datasets() == [third.name]
    remove_dataset("mine")
    with prepare([str(path)], name="new") as new:
        again = {"name": "mine", "path": str(mine.path), "fingerprint": new.fingerprint}
        found = reopen(again)  # under another name
        assert found is not None
        assert found.name == "new"
        found.close()
    assert reopen(again | {"fingerprint": "0" * 64}) is None


def test_a_look_leaves_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with prepare([str(tmp_path / "a.txt")], keep=False) as look:
        assert look.name.startswith("a-")
        assert look.splits["train"].tokens_count == 8
    assert tree(datasets_folder()) == []
    prepare([str(tmp_path / "a.txt")]).close()
    with prepare([str(tmp_path / "a.txt")], keep=False) as there:
        assert there.path.name == there.name == look.name
    assert list_datasets()[0].name == look.name


def test_copies_never_stand_on_both_sides_of_a_split(tmp_path: Path) -> None:
    """Also copies in another form, and of what is given for validation."""
    folder = tmp_path / "c"
    texts = corpus(folder, 6)
    for k in range(10):
        (folder / f"copy{k}.txt").write_text(texts[0])
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbf" + texts[1].encode())
    events: list[object] = []
    with prepare([str(folder)], val_fraction=0.3, on_event=events.append) as dataset:
        assert sorted(decoded(dataset, "train") + decoded(dataset, "val")) == sorted(texts)
        assert dataset.info["skipped"]["count"] == 11
    assert f"copy0.txt (the same contents as {folder / '000.txt'})" in notes(events)
    (tmp_path / "v.txt").write_text(texts[2])
    with prepare([str(folder)], val=[str(tmp_path / "v.txt")]) as dataset:
        assert decoded(dataset, "val") == [texts[2]]
        assert texts[2] not in decoded(dataset, "train")
    with prepare([str(folder)], whole=True) as dataset:
        assert dataset.splits["all"].documents == 17  # what is scored is scored as it is

    sounds = tmp_path / "r"
    for k in range(8):
        wav(sounds / f"{k}.wav", tone(500, pitch=2 * np.pi * (k + 2) / 100))
        wav(sounds / f"copy{k}.wav", tone(500))
    soundfile.write(sounds / "copy.flac", soundfile.read(sounds / "copy0.wav", dtype="int16")[0], 8000)
    with prepare([str(sounds)], val_fraction=0.3) as dataset:
        stored = [split.document(k).tobytes() for split in dataset.splits.values() for k in range(split.documents)]
        assert len(stored) == len(set(stored)) == 9
        assert dataset.info["skipped"]["count"] == 8


# Faults --------------------------------------------------------------------------------------------------------------


def test_few_texts_of_unequal_size_are_each_cut_by_position(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("b" * 100)
    with prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], name="both") as dataset:
        assert decoded(dataset, "train") == ["a" * 900, "b" * 90]
        assert decoded(dataset, "val") == ["a" * 100, "b" * 10]
        assert dataset.info["split_rule"].startswith("each of 2 texts by position: the first 90%")


def test_what_is_held_out_is_named_with_its_true_share(tmp_path: Path) -> None:
    for k in range(20):
        wav(tmp_path / "many" / f"{k:02}.wav", tone(500 + 10 * k, pitch=0.01 * (k + 1)))
    for k, samples in enumerate((3000, 3000, 3000, 3000, 3000)):
        wav(tmp_path / "few" / f"{k}.wav", tone(samples, pitch=0.01 * (k + 1)))
    events: list[object] = []
    with prepare([str(tmp_path / "many")], on_event=events.append) as dataset:
        tokens = {name: split.tokens_count - split.documents for name, split in dataset.splits.items()}
        share = tokens["val"] / sum(tokens.values())
        rule = f"20 recordings (seed 1337): {1 - share:.1%} train, {share:.1%} validate"
        assert dataset.info["split_rule"].endswith(rule)
    assert f"held out to validate, {share:.1%} of the data: {tmp_path / 'many'}" in notes(events)
    with prepare([str(tmp_path / "few")]) as dataset:  # a whole one would say little of the other four
        assert [split.documents for split in dataset.splits.values()] == [5, 5]
        assert (
            dataset.info["split_rule"] == "each of 5 recordings by position: the first 90% train, the last 10% validate"
        )


def small_sources(folder: Path, kind: str) -> str:
    if kind == "audio":
        for k in range(6):
            wav(folder / "s" / f"{k}.wav", tone(50 + k))
    else:
        corpus(folder / "s", 6)
    return str(folder / "s")


@pytest.mark.parametrize(("kind", "error"), [("text", errno.ENOSPC), ("audio", errno.EIO)])
def test_any_write_may_fail(tmp_path: Path, kind: str, error: int) -> None:
    sources = small_sources(tmp_path, kind)

    def attempt(n: int) -> bool:
        with failing(n, error) as faults:
            try:
                prepare([sources], name="x").close()
                failure = None
            except DfError as found:
                failure = found
        if failure is not None:
            assert os.strerror(error) in failure.message
            assert [entry for entry in tree(datasets_folder()) if not entry.startswith(".tmp-")] == []
        with prepare([sources], name="x") as dataset:
            assert sum(split.documents for split in dataset.splits.values()) == 6
        assert all(entry.split(os.sep)[0] == "x" for entry in tree(datasets_folder()))
        remove_dataset("x")
        assert tree(datasets_folder()) == []
        return faults.fired

    assert until_it_passes(attempt) > 10


@posix
def test_it_may_die_at_any_write(tmp_path: Path) -> None:
    sources = small_sources(tmp_path, "text")
    prepare([sources], name="x").close()
    before = Dataset.open("x").fingerprint

    def attempt(n: int) -> bool:
        (tmp_path / "s" / "000.txt").write_text(f"changed for the {n}th time")
        died = dies(2 * n - 1, lambda: prepare([sources], name="x").close())
        with Dataset.open("x") as dataset:  # the old one or the new one, whole
            for split in dataset.splits.values():
                assert split.offsets[-1] == len(ids(split))
        with prepare([sources], name="x") as dataset:
            assert f"changed for the {n}th time" in decoded(dataset, "train") + decoded(dataset, "val")
            assert dataset.fingerprint != before
        assert all(entry.split(os.sep)[0] == "x" for entry in tree(datasets_folder()))
        return died

    assert until_it_passes(attempt) > 10


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path) -> None:
    sources = small_sources(tmp_path, "text")

    def interrupt(event: object) -> None:
        if isinstance(event, Progress) and event.what == "encoding":
            raise KeyboardInterrupt

    for whole in (False, True):
        with pytest.raises(KeyboardInterrupt):
            prepare([sources], whole=whole, on_event=interrupt)
        assert tree(datasets_folder()) == []


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")

    def change(event: object) -> None:
        if isinstance(event, Progress) and event.what == "encoding":
            path.write_text("another text")

    with pytest.raises(DfError, match=r"a\.txt changed while it was read"):
        prepare([str(path)], on_event=change)
    assert tree(datasets_folder()) == []


def test_two_at_once(tmp_path: Path) -> None:
    corpus(tmp_path / "c", 30)
    code = (
        "import sys; from dfcli.ingest.prepare import prepare\n"
        "d = prepare([sys.argv[1]], name='x'); print(d.fingerprint, len(d.splits['train'].read(0, 99)))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(outputs) == 1
    assert {entry.split(os.sep)[0] for entry in tree(datasets_folder())} == {"x"}


# Size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [True, False])
def test_memory_stays_flat(tmp_path: Path, lines: bool) -> None:
    """48 MB without a line break, characters of one to four bytes."""
    path = tmp_path / "a.txt"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(480):
            file.write("x" * 30_000 + "é " * 10_000 + "😀" * 10_000)
    prepare([str(path)], whole=True, lines=lines, codec="bytes").close()  # imports are not counted
    tracemalloc.start()
    try:
        with prepare([str(path)], whole=True, lines=lines) as dataset:
            assert dataset.splits["all"].tokens_count == 480 * 60_000 + 2 * lines
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_groups_of_lines_are_dealt_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "GROUP", 100)
    labels, _ = splits.by_shuffle(1050, 0.1, 0.05, "line")
    everything = labels(0, 1050)
    assert np.bincount(everything).tolist() == [1050 - 105 - 52, 105, 52]
    random_cuts = [0, 1, 99, 100, 101, 350, 999, 1050]
    parts = [labels(a, b) for a, b in pairwise(random_cuts)]
    assert np.array_equal(np.concatenate(parts), everything)
    assert np.array_equal(labels(120, 130), everything[120:130])


def test_the_shuffle_is_the_same_everywhere() -> None:
    labels, _ = splits.by_shuffle(20, 0.1, 0.2, "text")
    assert "".join(map(str, labels(0, 20).tolist())) == "00101200000022000002"


# Byte-pair encodings -------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_learned_from_the_training_split_alone(tmp_path: Path) -> None:
    text = "the cat sat on the mat. " * 90 + "zyx " * 60
    (tmp_path / "a.txt").write_text(text)
    events: list[object] = []
    dataset = prepare([str(tmp_path / "a.txt")], codec="bpe", vocab_size=300, on_event=events.append)
    assert isinstance(dataset.codec, BPE)
    assert decoded(dataset, "train") + decoded(dataset, "val") == [text[:2160], text[2160:]]
    assert not any("zy" in token for token in dataset.codec.longest(300))
    assert " cat" in dataset.codec.longest(300)
    assert (dataset.path / "tokenizer.json").is_file()
    assert any(isinstance(event, Choice) and event.value == f"bpe, {dataset.vocab_size} ids" for event in events)
    again = prepare([str(tmp_path / "a.txt")], codec="bpe", vocab_size=300, on_event=events.append)
    assert (again.fingerprint, "prepared before" in notes(events)) == (dataset.fingerprint, True)
    with pytest.raises(UsageError, match="another vocabulary size"):
        prepare([dataset.name], vocab_size=301, codec="bpe")
    given = prepare([str(tmp_path / "a.txt")], tokenizer=str(dataset.path / "tokenizer.json"))
    assert ids(given.splits["train"]).tolist() == ids(dataset.splits["train"]).tolist()


def test_lines_are_encoded_one_by_one(tmp_path: Path) -> None:
    lines = [f"word{i % 7}. and... (word)" for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n\n")
    dataset = prepare([str(tmp_path / "a.txt")], codec="bpe", lines=True)
    codec = dataset.codec
    assert isinstance(codec, BPE)
    assert sorted(decoded(dataset, "train") + decoded(dataset, "val")) == sorted(lines)
    assert not any("\n" in token for token in codec.longest(600) if token != "\n")
    assert dataset.splits["val"].document(0).tolist()[1:] == codec.encode(decoded(dataset, "val")[0]).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 300}, "`--vocab-size` is for the bpe codec"),
        ({"vocab_size": 12, "codec": "bpe"}, "--vocab-size must be from 257"),
        ({"tokenizer": "x.json", "codec": "gpt2"}, "`--tokenizer` is for the bpe codec"),
        ({"tokenizer": "x.json", "vocab_size": 300}, "`--tokenizer` fixes the vocabulary"),
    ],
)
def test_options_of_a_vocabulary_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(["a.txt"], **options)


def test_records_that_are_read_as_text_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 20)
    events: list[object] = []
    prepare([str(tmp_path / "a.jsonl")], on_event=events.append).close()
    assert "a.jsonl holds records: `--field NAME`" in notes(events)
    events.clear()
    prepare([str(tmp_path / "a.jsonl")], field="text", on_event=events.append).close()
    assert "records: " not in notes(events)
