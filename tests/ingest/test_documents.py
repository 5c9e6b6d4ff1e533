"""Texts in the shape people have them: separators, records, packed files, line ends and encodings."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from dfcli.codecs import GPT2, TextCodec
from dfcli.data.dataset import Dataset
from dfcli.errors import DfError, UsageError
from dfcli.ingest import reading
from dfcli.ingest.documents import _long_enough, _parts
from dfcli.ingest.prepare import prepare
from dfcli.system.events import Note
from tests.shared import shared_file

TEXTS = [f"document {k},\nof two lines: é" + "x" * k for k in range(20)]


def all_documents(dataset: Dataset) -> list[str]:
    codec = dataset.codec
    assert isinstance(codec, TextCodec)
    skip = dataset.boundary is not None
    splits = dataset.splits.values()
    return sorted(codec.decode(split.document(k)[skip:]) for split in splits for k in range(split.documents))


def parquet(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"id": list(range(20)), "text": TEXTS}), path)


def zstd(data: bytes) -> bytes:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return pytest.importorskip(name).compress(data)


LINES = "".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(TEXTS)).encode()
QUOTED = "id;text\r\n" + "".join(f'{k};"{text}"\r\n' for k, text in enumerate(TEXTS))
WRITE: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.csv": lambda path: path.write_bytes(QUOTED.encode()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:300]) + gzip.compress(LINES[300:])),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(QUOTED.encode())),
    "a.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(LINES[:300]) + zstd(LINES[300:])),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITE)
def test_records_of_every_form(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 97)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    WRITE[name](tmp_path / "in" / "deep" / name)
    with prepare([str(tmp_path / "in")], field="text", val_fraction=0.2) as dataset:
        assert all_documents(dataset) == sorted(TEXTS)
        assert [split.documents for split in dataset.splits.values()] == [16, 4]
        assert (dataset.boundary, dataset.info["facts"]["documents"]) == (None, 20)
    events: list[object] = []
    prepare([str(tmp_path / "in")], field="text", val_fraction=0.2, on_event=events.append).close()
    assert any("prepared before" in event.text for event in events if isinstance(event, Note))


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n---\n", "%"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_separator_is_found_wherever_chunks_are_cut(separator: str, size: int) -> None:
    text = separator.join(["", *TEXTS, "x", ""])
    pieces = list(_long_enough(_parts((text[k : k + size] for k in range(0, len(text), size)), separator)))
    found: list[str] = []
    for begins, piece in pieces:
        if begins:
            found.append(piece)
        else:
            found[-1] += piece
    assert found == TEXTS


@pytest.mark.parametrize("codec", ["chars", "bytes", "gpt2", "bpe"])
def test_documents_between_separators(codec: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(TEXTS))
    options = {"bpe": str(shared_file("gpt2-bpe"))} if codec == "gpt2" else {}
    with prepare([str(tmp_path / "a.txt")], separator="<|endoftext|>", codec=codec, **options) as dataset:
        assert all_documents(dataset) == sorted(TEXTS)
        assert dataset.splits["val"].documents == 2
        if isinstance(dataset.codec, GPT2):
            assert dataset.boundary == 50256
            assert (
                np.count_nonzero(dataset.splits["train"].read(0, dataset.splits["train"].tokens_count) == 50256) == 18
            )
    events: list[object] = []
    prepare([str(tmp_path / "a.txt")], on_event=events.append).close()
    assert any('--separator "<|endoftext|>"' in event.text for event in events if isinstance(event, Note))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "ab"}\n', "a.jsonl, line 1: the record has no field `text`: it has the fields `body`"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: the field `text` holds a number, not text"),
        ("a.jsonl", b'{"text": "ab"}\n{"text"\n', "a.jsonl, line 2: this is not JSON"),
        ("a.jsonl", b'{"text": "ab"}\n\n[1]\n', "a.jsonl, line 3: the record is no object"),
        ("a.jsonl", b'{"text": "ab"}\n{"text": "a\\ud800"}\n', "line 2: in the field `text`, U+D800"),
        ("a.csv", b"id,body\n1,ab\n", "a.csv, line 2: the record has no field `text`: it has the fields `id`, `body`"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "a.jsonl.gz cannot be unpacked"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as Parquet"),
        ("b.parquet", b"{}\n", "b.parquet is no Parquet file"),
    ],
)
def test_wrong_records_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DfError) as error:
        prepare([str(tmp_path / name)], field="text")
    assert message in error.value.message


def test_a_packed_file_that_is_cut_off_is_an_error_not_a_shorter_text(tmp_path: Path) -> None:
    for name, pack in {"zst": zstd, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items():
        (tmp_path / f"a.jsonl.{name}").write_bytes(pack(LINES * 50)[:-20])
        with pytest.raises(DfError, match="cannot be unpacked"):
            prepare([str(tmp_path / f"a.jsonl.{name}")], field="text")


def test_parts_of_records_and_what_is_missing(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    inner = [{"text": "in one"}, None, {"text": None}, {"text": "in two"}, {"text": "in three"}]
    parquet.write_table(arrow.table({"meta": inner, "a.b": ["flat text"] * 5}), tmp_path / "a.parquet")
    lines = [*(json.dumps({"meta": meta}) for meta in inner), '{"meta": {"text": NaN}}', "", '{"meta": null}\r']
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    for name in ("a.parquet", "a.jsonl"):
        with prepare([str(tmp_path / name)], field="meta.text") as dataset:
            assert all_documents(dataset) == ["in one", "in three", "in two"]
        with pytest.raises(DfError, match=r"no field `meta\.nothing`"):
            prepare([str(tmp_path / name)], field="meta.nothing")
        with pytest.raises(DfError, match="holds an object") as caught:
            prepare([str(tmp_path / name)], field="meta")
        assert "--field meta.text" in caught.value.hint
    with prepare([str(tmp_path / "a.parquet")], field="a.b") as dataset:
        assert all_documents(dataset) == ["flat text"] * 5


def test_ways_to_make_documents_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        prepare([str(tmp_path)], field="text", lines=True)


@pytest.mark.parametrize(("end", "told"), [("\n", False), ("\r\n", True), ("\r", True)])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_line_ends_and_encodings_do_not_change_the_ids(end: str, told: bool, encoding: str, tmp_path: Path) -> None:
    text = "".join(chain.from_iterable(f"{line}\n" for line in TEXTS))
    (tmp_path / "plain.txt").write_text(text, newline="")
    (tmp_path / "a.txt").write_bytes(text.replace("\n", end).encode(encoding))
    events: list[object] = []
    with (
        prepare([str(tmp_path / "plain.txt")]) as plain,
        prepare([str(tmp_path / "a.txt")], on_event=events.append) as dataset,
    ):
        assert dataset.fingerprint == plain.fingerprint
    assert told == any("line ends" in event.text for event in events if isinstance(event, Note))


def test_records_without_the_field_are_left_out_and_said(tmp_path: Path) -> None:
    file, events = tmp_path / "a.jsonl", list[object]()
    rows = [{"id": k, "text": text} for k, text in enumerate(TEXTS)]
    rows[2:2] = [{"id": 7, "body": "another"}, {}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with prepare([str(file)], field="text", on_event=events.append) as dataset:
        assert all_documents(dataset) == sorted(TEXTS)
    said = [event.text for event in events if isinstance(event, Note)]
    assert (
        said.count(
            f"2 of 22 records of {file} have no field `text` and were left out; "
            f"the first is {file}, line 3: it has the fields `id`, `body`"
        )
        == 1
    )
    with pytest.raises(
        DfError, match=r"a\.jsonl, line 1: the record has no field `txt`: it has .*`id`, `text`"
    ) as caught:
        prepare([str(file)], field="txt")
    assert caught.value.hint == "did you mean `--field text`?"
    (tmp_path / "b.csv").write_text("id,text\n1,one two\n2\n3,three four\n")  # a short row
    with prepare([str(tmp_path / "b.csv")], field="text", val_fraction=0, on_event=events.append) as dataset:
        assert all_documents(dataset) == ["one two", "three four"]
    assert any("1 of 3 records" in event.text for event in events if isinstance(event, Note))
