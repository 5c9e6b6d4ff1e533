"""Labels and levels of recordings, and what hostile names and rules come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from dfcli.codecs import MuLaw
from dfcli.data.dataset import Dataset
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.ingest.labels import Labelling
from dfcli.ingest.prepare import prepare
from dfcli.ingest.sources import Source

DIGITS = r"(?P<digit>\d)_(?P<speaker>[a-z]+)_"


def recordings(folder: Path, names: list[str], seconds: float = 0.1) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * random.standard_normal(round(8000 * seconds)), 8000)
    return folder


def test_labels_are_those_of_the_names_in_every_split(tmp_path: Path) -> None:
    names = [f"{digit}_{speaker}_{k}.wav" for digit in (7, 3) for speaker in ("zoe", "al") for k in range(3)]
    data = recordings(tmp_path / "digits", names)
    held_out = [str(data / name) for name in names if name.endswith("_0.wav")]
    with prepare([str(data)], label=DIGITS, val=held_out, name="labelled") as dataset:
        assert dataset.labels == {"digit": ["3", "7"], "speaker": ["al", "zoe"]}
        assert sorted(map(tuple, dataset.splits["val"].labels.tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        # in the order of the paths: 3_al_1, 3_al_2, 3_zoe_1, ...
        assert dataset.splits["train"].labels.tolist() == [[d, s] for d in (0, 1) for s in (0, 1) for _ in range(2)]
        fingerprint = dataset.fingerprint
    with prepare(["labelled"]) as again, prepare([str(data)], val=held_out) as unlabelled:
        assert again.fingerprint == fingerprint != unlabelled.fingerprint
        assert unlabelled.labels == {}
        assert unlabelled.splits["val"].labels.shape == (4, 0)
    with pytest.raises(UsageError, match="prepared with another label"):
        prepare(["labelled"], label="folder")


def test_a_folder_is_a_label(tmp_path: Path) -> None:
    data = recordings(tmp_path / "all", ["cat/a.wav", "cat/deep/b.wav", "dog/c.wav"])
    with prepare([str(data)], label="folder", val_fraction=0) as dataset:
        assert dataset.labels == {"folder": ["cat", "dog"]}
        assert dataset.splits["train"].labels.tolist() == [[0], [0], [1]]
    recordings(data, ["loose.wav"])
    with pytest.raises(DfError, match=r"loose\.wav has no label `folder`"):
        prepare([str(data)], label="folder")


def test_damaged_labels_are_noticed(tmp_path: Path) -> None:
    data = recordings(tmp_path / "all", ["cat/a.wav", "dog/b.wav", "dog/c.wav"])
    with prepare([str(data)], label="folder", name="pets") as dataset:
        file = dataset.path / "train.labels"
    file.write_bytes(bytes(len(file.read_bytes())))
    with Dataset.open("pets") as dataset, pytest.raises(CorruptError, match=r"train\.labels was changed"):
        _ = dataset.splits["train"].labels


def source(below: str) -> Source:
    return Source(Path(below), ascii(below), "audio", 1, False, below)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("(", "no regular expression: missing"),
        (r"\d", "no named group"),
        ("(?P<a>x)(?P<a>y)", "no regular expression: redefinition"),
        ("\x1b[31m(", r"`--label '\\x1b\[31m\('` is no regular"),
    ],
)
def test_bad_rules_are_refused_in_a_sentence(rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Labelling(rule)


@pytest.mark.parametrize(
    ("below", "message"),
    [
        (["a\nb/x.wav"], r"has the label 'a\\nb', which cannot be shown"),
        (["a\x1b[31m/x.wav"], r"has the label 'a\\x1b\[31m', which cannot be shown"),
        (["a\udcff/x.wav"], r"has the label 'a\\udcff', which cannot be shown"),
        (["Jo/x.wav", "jo/x.wav"], "'Jo' and 'jo' differ only by case"),
        (["x.wav"], "'x.wav' has no label `folder`: it lies in no folder"),
    ],
)
def test_hostile_names_are_refused_in_a_sentence(below: list[str], message: str) -> None:
    with pytest.raises(DfError, match=message):
        Labelling("folder").number([source(path) for path in below])


def test_ten_thousand_names_are_numbered() -> None:
    sources = [source(f"{k:05}/x.wav") for k in range(10_000)]
    names, numbers = Labelling("folder").number(sources)
    assert names["folder"][1234] == "01234"
    assert numbers[sources[1234]] == (1234,)


def test_an_optional_group_that_finds_nothing_is_a_missing_label() -> None:
    with pytest.raises(DfError, match="has no label `b`: the pattern finds none"):
        Labelling("(?P<a>x)(?P<b>y)?").of(source("x.wav"))


def test_finer_levels_keep_the_recording_closer(tmp_path: Path) -> None:
    data = recordings(tmp_path / "noise", ["a.wav", "b.wav"], seconds=2)
    with prepare([str(data)], levels=256) as coarse, prepare([str(data)]) as fine:
        assert (coarse.vocab_size, fine.vocab_size, fine.boundary) == (256, 1024, 512)
        assert fine.info["dtype"] == "uint16"
        ids = fine.splits["train"].document(0)[1:]
        samples, _ = soundfile.read(data / "a.wav", dtype="float32")
        assert isinstance(fine.codec, MuLaw)
        assert np.abs(fine.codec.decode(ids) - samples[: len(ids)]).max() < 0.002
        gained = fine.info["fidelity"]["train"]["snr"] - coarse.info["fidelity"]["train"]["snr"]
        assert gained == pytest.approx(12, abs=0.3)
        # White noise at 0.1 has log2(0.1 * 32768 sqrt(2 pi e)) bits a sample, and FLAC comes close.
        assert coarse.info["fidelity"]["train"]["flac_bits_per_sample"] == pytest.approx(13.72, abs=0.15)
    with pytest.raises(UsageError, match="there is no number of levels 300"):
        prepare([str(data)], levels=300)
