"""Datasets on disk: what was written is read, and whatever else is found there is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dfcli.codecs import Bytes
from dfcli.data.dataset import (
    BLOCK,
    Dataset,
    SplitWriter,
    datasets_folder,
    find_dataset,
    list_datasets,
    remove_dataset,
)
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.system.events import Note
from dfcli.system.files import building, read_json, write_json

DESCRIPTION = {
    "facts": {}, "skipped": {"count": 0, "files": []}, "options": {}, "sources": {}, "split_rule": "", "created": "",
    "key": "",
}  # fmt: skip


def write(name: str, documents: list[list[int]], *, lines: bool = False, boundary: int | None = None) -> Path:
    """A dataset of one split `train` with these stored documents."""
    folder = datasets_folder() / name
    with building(folder) as temporary:
        writer = SplitWriter(temporary, "train", np.dtype("u1"))
        for document in documents:
            writer.append(np.array(document))
            assert writer.end_document()
        info = {
            "format": 1,
            "name": name,
            "kind": "text",
            "codec": Bytes().to_json(),
            "dtype": "uint8",
            "vocab_size": 256,
            "boundary": boundary,
            "lines": lines,
            "lead": 1,
            "fingerprint": "0" * 64,
            "splits": {"train": writer.finish(boundary if lines else None)},
            **DESCRIPTION,
        }
        write_json(temporary / "dataset.json", info)
    return folder


def test_reads_what_was_written() -> None:
    documents = [[10, 1, 2, 3], [10, 4], [10, 5, 6]]
    write("names", documents, lines=True, boundary=10)
    with Dataset.open("names") as dataset:
        split = dataset.splits["train"]
        assert (dataset.name, dataset.kind, dataset.boundary, dataset.lines) == ("names", "text", 10, True)
        assert split.offsets.tolist() == [0, 4, 6, 9]
        assert [split.document(k).tolist() for k in range(3)] == documents
        assert split.tokens_count == 10
        assert split.read(0, 10).tolist() == [10, 1, 2, 3, 10, 4, 10, 5, 6, 10]
        assert split.take(np.array([[9, 1], [2, 4]])).tolist() == [[10, 1], [2, 10]]
        assert (split.documents, split.shortest, split.longest) == (3, 2, 4)
        assert isinstance(dataset.codec, Bytes)


def test_documents_of_less_than_two_ids_are_taken_back(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", np.dtype("<u2"))
    kept = []
    for length in [1, BLOCK, 0, 1, 2, 1]:
        writer.append(np.arange(length))
        kept.append(writer.end_document())
    record = writer.finish()
    assert kept == [False, True, False, False, True, False]
    assert record is not None
    assert (record["tokens"], record["documents"], record["shortest"]) == (BLOCK + 2, 2, 2)
    stored = np.fromfile(tmp_path / "train.tokens", "<u2")
    assert np.array_equal(stored[:BLOCK], np.arange(BLOCK) % 65536)
    assert stored[BLOCK:].tolist() == [0, 1]
    assert len(np.fromfile(tmp_path / "train.checksums", "<u4")) == 3


def test_a_split_without_documents_leaves_no_files(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "val", np.dtype("u1"))
    assert writer.finish(10) is None
    assert list(tmp_path.iterdir()) == []


def test_documents_may_come_in_any_cut(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [[10, *random.integers(11, 99, random.integers(1, 9))] for _ in range(200)]
    ids = np.concatenate(documents)
    starts = np.cumsum([0] + [len(document) for document in documents])[:-1]
    writer = SplitWriter(tmp_path, "train", np.dtype("u1"))
    cuts = [0, *np.sort(random.integers(len(ids), size=60)).tolist(), len(ids)]
    for a, b in pairwise(cuts):
        writer.append_documents(ids[a:b], starts[(starts >= a) & (starts < b)] - a)
    record = writer.finish(10)
    assert record is not None
    lengths = [len(document) for document in documents]
    assert (record["documents"], record["shortest"], record["longest"]) == (200, min(lengths), max(lengths))
    assert np.fromfile(tmp_path / "train.offsets", "<i8").tolist() == [*starts.tolist(), len(ids)]
    assert np.fromfile(tmp_path / "train.tokens", "u1").tolist() == [*ids.tolist(), 10]


def read_all(name: str) -> None:
    dataset = Dataset.open(name)
    split = dataset.splits["train"]
    assert len(split.offsets) == split.documents + 1
    split.read(0, split.tokens_count)
    assert dataset.codec.vocab_size == 256


def test_any_flipped_bit_is_noticed_when_it_is_read() -> None:
    random = np.random.default_rng(1)
    folder = write("a", [random.integers(0, 256, 2 * BLOCK + 100).tolist()])
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    for name, size in sizes.items():
        for place in {0, size // 2, size - 1, *random.integers(size, size=4).tolist()}:
            data = bytearray((folder / name).read_bytes())
            data[place] ^= 1 << int(random.integers(8))
            original = (folder / name).read_bytes()
            (folder / name).write_bytes(data)
            with pytest.raises(CorruptError) as error:
                read_all("a")
            assert str(folder / name) in error.value.message
            (folder / name).write_bytes(original)
    read_all("a")


def test_a_block_is_checked_only_when_it_is_read() -> None:
    folder = write("a", [[1] * (3 * BLOCK)])
    with (folder / "train.tokens").open("r+b") as file:
        file.seek(BLOCK + 7)
        file.write(b"\xff")
    split = Dataset.open("a").splits["train"]
    assert split.read(0, BLOCK).sum() == BLOCK
    assert split.take(np.array([2 * BLOCK, 5])).tolist() == [1, 1]
    with pytest.raises(CorruptError, match=r"train\.tokens"):
        split.read(BLOCK - 1, BLOCK + 1)
    with pytest.raises(CorruptError, match=r"train\.tokens"):
        split.take(np.array([0, BLOCK]))


@pytest.mark.parametrize("part", ["tokens", "offsets", "checksums"])
@pytest.mark.parametrize("change", ["cut", "grown", "empty", "gone", "fifo"])
def test_wrong_lengths_are_noticed(part: str, change: str) -> None:
    file = write("a", [[1, 2, 3]]) / f"train.{part}"
    data = file.read_bytes()
    if change in ("gone", "fifo"):
        file.unlink()
        if change == "fifo":
            getattr(os, "mkfifo", Path)(file)  # Windows has none
    else:
        file.write_bytes({"cut": data[:-1], "grown": data + b"\0", "empty": b""}[change])
    with pytest.raises(CorruptError, match=f"train.{part}"):
        Dataset.open("a")
    remove_dataset("a")


@pytest.mark.parametrize(
    "change",
    [
        {"splits": {}},
        {"splits": None},
        {"splits": {"../x": {}}},
        {"kind": "video"},
        {"dtype": "float64"},
        {"boundary": "x"},
        {"format": None},
        {"format": -1},
        {"vocab_size": 3},
        {"codec": {"name": "nonsense"}},
    ],
)
def test_a_wrong_description_is_noticed(change: dict[str, object]) -> None:
    file = write("a", [[1, 2, 3]]) / "dataset.json"
    write_json(file, read_json(file) | change)
    with pytest.raises(CorruptError):
        read_all("a")


@pytest.mark.parametrize("key", ["tokens", "documents", "shortest", "longest", "offsets_sha256"])
@pytest.mark.parametrize("value", [-1, 0, 1, 2**62, "x", None])
def test_wrong_figures_of_a_split_are_noticed(key: str, value: object) -> None:
    file = write("a", [[1, 2, 3], [1, 2]]) / "dataset.json"
    info = read_json(file)
    info["splits"]["train"][key] = value
    write_json(file, info)
    with pytest.raises(CorruptError):
        _ = Dataset.open("a").splits["train"].offsets


def test_a_newer_format_is_refused() -> None:
    file = write("a", [[1, 2, 3]]) / "dataset.json"
    write_json(file, read_json(file) | {"format": 2})
    with pytest.raises(DfError, match="format 2") as error:
        Dataset.open("a")
    assert not isinstance(error.value, CorruptError)


def test_reading_outside_is_refused() -> None:
    write("a", [[1, 2, 3]])
    split = Dataset.open("a").splits["train"]
    for start, stop in [(-1, 2), (0, 4), (3, 2)]:
        with pytest.raises(IndexError):
            split.read(start, stop)


def test_a_name_wins_over_a_path_and_a_path_can_be_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = write("a", [[1, 2, 3]])
    shutil.copytree(named, tmp_path / "a")
    shutil.copytree(named, tmp_path / "b")
    assert find_dataset("a") == named
    assert find_dataset("./a") == Path("a")
    assert find_dataset("b") == Path("b")
    assert find_dataset("c") is None
    for strange in ["", ".", "..", "a/../..", "x" * 5000, "a\0b", "*", "-a"]:
        assert find_dataset(strange) is None
    with pytest.raises(DfError, match="no dataset 'c'"):
        Dataset.open("c")


@pytest.mark.parametrize(
    "changes",
    [
        {"boundary": 256}, {"boundary": 10**30}, {"boundary": 1.0}, {"lead": 0}, {"lead": 10**9}, {"lead": True},
        {"codec": []}, {"codec": {}}, {"facts": {"n": "x"}}, {"skipped": {"count": 1, "files": [1]}}, {"skipped": {}},
        {"created": None},
    ],
)  # fmt: skip
def test_a_description_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    file = write("a", [[1, 2, 3]]) / "dataset.json"
    write_json(file, read_json(file) | changes)
    with pytest.raises(CorruptError, match=r"dataset\.json does not describe"):
        Dataset.open("a")


def test_listing_tells_what_it_cannot_read() -> None:
    assert list_datasets() == []
    write("b", [[1, 2, 3]])
    write("a", [[1, 2, 3]])
    (write("broken", [[1, 2, 3]]) / "train.tokens").write_bytes(b"")
    (datasets_folder() / "stray").mkdir()
    (datasets_folder() / "file").write_text("")
    events: list[object] = []
    assert [dataset.name for dataset in list_datasets(events.append)] == ["a", "b"]
    assert [isinstance(event, Note) and event.text.split()[1] for event in events] == ["broken", "stray"]


def test_removal_is_by_name_and_never_of_what_is_in_use() -> None:
    folder = write("a", [[1, 2, 3]])
    for name in ["b", "../a", str(folder), "", "."]:
        with pytest.raises(UsageError):
            remove_dataset(name)
    dataset = Dataset.open("a")
    if os.name != "nt":
        with pytest.raises(DfError, match="in use"):
            remove_dataset("a")
    dataset.close()
    remove_dataset("a")
    assert not folder.exists()
    assert [file.name for file in folder.parent.iterdir()] in ([".a.lock"], [])


def test_a_broken_dataset_can_be_removed() -> None:
    folder = write("a", [[1, 2, 3]])
    (folder / "dataset.json").unlink()
    remove_dataset("a")
    assert not folder.exists()


@pytest.mark.parametrize(
    "read",
    [
        lambda: [Dataset.open("a")],
        list_datasets,
        lambda: [Dataset.open(find_dataset("a") or "")],
        lambda: [Dataset.open(datasets_folder() / "a")],
    ],
    ids=["open", "list", "find", "path"],
)
def test_what_a_replacement_that_was_cut_off_leaves_is_found(
    read: Callable[[], list[Dataset]],
) -> None:
    folder = write("a", [[1, 2, 3]])
    code = "import os; print(os.getpid())"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    with building(datasets_folder() / "probe") as temporary:
        _, _, host, random = temporary.name.rsplit("-", 3)
    folder.rename(folder.with_name(f".old-a-{dead.strip()}-{host}-{random}"))
    (found,) = (dataset for dataset in read() if dataset.name == "a")
    assert found.splits["train"].tokens_count == 3
    assert folder.exists()


def test_no_torch_is_needed_to_list() -> None:
    code = "import sys, dfcli.data.dataset; print('torch' in sys.modules, 'soundfile' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_json_alone_describes_it() -> None:
    """dataset.json is plain JSON: nothing of ours is needed to read it."""
    info = json.loads((write("a", [[1, 2, 3]]) / "dataset.json").read_text())
    assert info["splits"]["train"]["tokens"] == 3
