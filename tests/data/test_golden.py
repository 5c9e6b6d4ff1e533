"""A dataset of format 1, as the first version wrote it, is read for ever.

It was written by `python -m tests.data.test_golden`; a new format gets a golden dataset of its own beside this one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from dfcli.codecs import TextCodec
from dfcli.data.dataset import Dataset
from dfcli.ingest.prepare import prepare
from dfcli.system.files import read_json, write_json

GOLDEN = Path(__file__).parent / "golden" / "format-1"
NAMES = ["ada", "bo", "carl", "dee", "eve", "flo", "gus", "hal", "ida", "joe"]
SPLITS = {"train": ["ada", "bo", "dee", "gus", "hal", "ida", "joe"], "val": ["carl", "eve"], "test": ["flo"]}
"""How the lines were dealt out."""


def texts(dataset: Dataset) -> dict[str, list[str]]:
    codec = dataset.codec
    assert isinstance(codec, TextCodec)
    return {
        name: [codec.decode(split.document(k)).strip() for k in range(split.documents)]
        for name, split in dataset.splits.items()
    }


def test_it_is_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    with Dataset.open(tmp_path / "golden") as dataset:
        assert dataset.info["format"] == 1
        assert (dataset.name, dataset.kind, dataset.lines, dataset.lead) == ("golden", "text", True, 1)
        assert dataset.boundary == 0
        assert texts(dataset) == SPLITS
        for split in dataset.splits.values():
            assert split.read(split.tokens_count - 1, split.tokens_count)[0] == dataset.boundary


def test_what_is_written_today_has_the_same_ids(tmp_path: Path) -> None:
    with write(tmp_path) as dataset, Dataset.open(GOLDEN) as golden:
        assert dataset.fingerprint == golden.fingerprint
        assert dataset.info.keys() == golden.info.keys()
        assert dataset.info["splits"] == golden.info["splits"]
        assert sorted(os.listdir(dataset.path)) == sorted(os.listdir(GOLDEN))
        for path in GOLDEN.iterdir():
            if path.suffix not in (".json", ".jsonl"):  # they tell of the day and the place
                assert (dataset.path / path.name).read_bytes() == path.read_bytes()


def write(folder: Path) -> Dataset:
    (folder / "names.txt").write_bytes("\n".join(NAMES).encode() + b"\n")
    return prepare([str(folder / "names.txt")], name="golden", lines=True, val_fraction=0.2, test_fraction=0.1)


if __name__ == "__main__":
    if GOLDEN.exists():
        pytest.exit(f"{GOLDEN} is there, and stays as it is")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DFCLI_HOME"] = scratch
        with write(Path(scratch)) as made:
            print(texts(made))
            shutil.copytree(made.path, GOLDEN)
        sources = (GOLDEN / "sources.jsonl").read_bytes().replace(scratch.encode(), b"/data")
        (GOLDEN / "sources.jsonl").write_bytes(sources)
        info = read_json(GOLDEN / "dataset.json")
        info["sources"]["sha256"] = hashlib.sha256(sources).hexdigest()
        write_json(GOLDEN / "dataset.json", info)
