"""A run as one file to give away, and files that only look like one."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

import dfcli
from dfcli.errors import CorruptError
from dfcli.runs.pack import without_paths


@pytest.fixture
def packed(here, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run `talk` in talk.df.zip, on a machine that has nothing else."""
    shown = here("runs", "pack", "talk", "-o", "talk.df.zip")
    assert shown.code == 0, shown.err
    monkeypatch.setenv("DFCLI_HOME", str(tmp_path / "elsewhere"))
    return tmp_path / "talk.df.zip"


def test_a_friend_samples_and_evaluates(here, packed, trained, tmp_path, monkeypatch):
    words = ["sample", "gpt", "--prompt", "It", "--tokens", 20, "--seed", 1, "--json", "--run"]
    theirs = json.loads(here(*words, "talk.df.zip").out)
    measured = here("eval", "--run", "talk.df.zip", "--json")
    assert "measured when it was packed" in measured.err
    monkeypatch.setenv("DFCLI_HOME", str(trained / "home"))
    mine = json.loads(here(*words, "talk").out)
    assert (theirs["samples"], theirs["run"]) == (mine["samples"], "talk")
    own = json.loads(here("eval", "--run", "talk", "--json").out)
    for key in ("loss", "baselines", "bits_per_byte", "protocol", "tokens", "run"):
        assert json.loads(measured.out)[key] == own[key]
    assert "measured when" not in here("eval", "--run", "talk.df.zip").err  # here the data is at hand


def test_it_holds_one_checkpoint_and_no_paths(packed, trained):
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        assert sorted(names) == [
            "figures.json", "metrics.jsonl", "run.json", "step-00000012/model.safetensors", "step-00000012/state.json",
        ]  # fmt: skip
        everything = b"".join(archive.read(name) for name in names)
    assert str(trained).encode() not in everything
    assert str(Path.home()).encode() + b"/" not in everything
    assert b"/tmp/" not in everything


def test_other_data_an_unpacked_folder_and_what_it_cannot(here, packed, trained, tmp_path):
    (tmp_path / "other.txt").write_text("It was the age of times.\n" * 9)
    assert here("eval", "--run", "talk.df.zip", "--data", "other.txt").code == 0
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "friend")
    assert here("sample", "gpt", "--run", "friend", "--tokens", 3).code == 0
    shutil.make_archive(str(tmp_path / "again"), "zip", tmp_path, "friend")  # zipped by hand, with its folder
    assert here("sample", "gpt", "--run", "again.zip", "--tokens", 3).code == 0
    assert here("eval", "--run", "talk.df.zip", "--split", "train").code == 2
    assert here("runs", "pack", "talk.df.zip", "-o", "other.txt").code == 2  # it is there
    assert [path for path in (tmp_path / "elsewhere" / "runs").iterdir() if not path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "step-00000012/../../evil", ".hidden", "a/b/c", "C:evil"])
def test_nothing_is_extracted_outside(packed, name: str, tmp_path):
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(CorruptError):
        dfcli.Run.open(packed)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_bomb_a_cut_file_and_another_zip_are_refused(packed, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run.json", b"{}")
        archive.writestr("metrics.jsonl", b"0" * 50_000_000)
    (tmp_path / "cut.zip").write_bytes(packed.read_bytes()[:-100])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    broken = bytearray(packed.read_bytes())
    broken[len(broken) // 2] ^= 1  # within the weights
    (tmp_path / "broken.zip").write_bytes(broken)
    for name in ("bomb.zip", "cut.zip", "other.zip", "broken.zip"):
        with pytest.raises(CorruptError):
            dfcli.Run.open(tmp_path / name).load()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/secret/t.txt", "t.txt"), ("C:\\Users\\Ann\\t.txt", "t.txt"), ("~/music/a b/c.wav", "c.wav"),
        ("read from /home/ann/my notes/t.txt, whole", "read from t.txt, whole"), ("10 nats/token", "10 nats/token"),
        ("../private/x", "x"), ("and/or", "and/or"),
    ],
)  # fmt: skip
def test_paths_are_cut_to_their_names(text: str, shown: str):
    assert without_paths({"a": [text]}) == {"a": [shown]}


def test_folders_of_opened_files_are_removed_at_the_end(df, packed, tmp_path):
    assert df("sample", "gpt", "--run", "talk.df.zip", "--tokens", 2).code == 0
    assert os.listdir(tmp_path / "elsewhere" / "runs") == []
