from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import dfcli
from dfcli.ingest import download
from dfcli.ingest.prepare import prepare


def test_none_yet(here):
    shown = here("data", "list")
    assert (shown.code, shown.out) == (0, "")
    assert "df data prepare" in shown.err


def test_prepare_list_show_and_remove(here, tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 100)
    shown = here("data", "prepare", "a.txt", "--name", "abc", "--val-fraction", 0.25, "--test-fraction", 0.25)
    assert shown.code == 0, shown.err
    assert shown.out == ""
    assert "train 200, val 100, test 100" in shown.err
    assert "next: df train gpt --data abc" in shown.err
    listed = here("data", "list").out.splitlines()
    assert [row.split()[:5] for row in listed] == [
        ["NAME", "KIND", "CODEC", "TRAIN", "VAL"], ["abc", "text", "chars", "200", "100"],
    ]  # fmt: skip
    rows = dict(line.split(maxsplit=1) for line in here("data", "show", "abc").out.splitlines())
    assert rows["codec"] == "chars, 4 ids"
    assert rows["path"] == str(dfcli.Dataset.open("abc").path)
    assert rows["skipped"] == "0"
    removed = here("data", "remove", "abc", "--yes")
    assert (removed.code, removed.err) == (0, "removed the dataset `abc`\n")
    assert here("data", "show", "abc").code == 2
    for group in ("data", "runs"):  # before it is asked whether to remove it
        assert f"there is no {'dataset' if group == 'data' else 'run'}" in here(group, "remove", "abc").err
    assert here("data", "remove", "abc", "--yes").code == 2
    assert (tmp_path / "a.txt").exists()


def test_what_no_run_needs_is_listed_and_removed(here, trained, tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 100)
    assert here("data", "prepare", "a.txt", "--name", "alone").code == 0
    rows = {row.split()[0]: row.split()[-1] for row in here("data", "list").out.splitlines()[1:]}
    assert rows.pop("alone") == "-"
    assert "-" not in rows.values()
    assert here("data", "remove").code == 2
    assert here("data", "remove", "alone", "--unused").code == 2
    removed = here("data", "remove", "--unused", "--yes")
    assert (removed.code, removed.err) == (0, "removed the dataset `alone`\n")
    assert {row.split()[0] for row in here("data", "list").out.splitlines()[1:]} == set(rows)
    assert "no dataset without a run" in here("data", "remove", "--unused", "--yes").err


def test_documents_are_counted_as_they_were_given(here, tmp_path):
    (tmp_path / "names.txt").write_text("anna\nbob\nlea\n" * 10)
    (tmp_path / "text.txt").write_text("abc" * 100)
    prepare([str(tmp_path / "names.txt")], lines=True, split_rule="makemore-transformer", name="names").close()
    prepare([str(tmp_path / "text.txt")], name="text").close()
    listed = [row.split() for row in here("data", "list").out.splitlines()]
    assert [(row[0], row[5]) for row in listed] == [("NAME", "DOCUMENTS"), ("names", "30"), ("text", "1")]


def test_a_last_line_without_a_line_break_is_counted_as_it_is(here, tmp_path):
    (tmp_path / "names.txt").write_bytes(b"anna\nbob\n\nlea")
    assert here("data", "prepare", "names.txt", "--name", "names", "--lines", "--val-fraction", 0.4).code == 0
    shown = here("data", "show", "names").out
    assert "lines 3, characters in lines 10, bytes 13, blank lines 1\n" in shown
    assert "id 0, before each document and after the last of a split\n" in shown


def test_what_was_skipped_is_named(here, trained, tmp_path):
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes((trained / "tones" / "tone-0.wav").read_bytes())
    (tmp_path / "sounds" / "b.wav").write_bytes(b"")
    (tmp_path / "sounds" / "c.wav").write_bytes((trained / "tones" / "tone-1.wav").read_bytes())
    prepared = here("data", "prepare", "sounds", "--name", "sounds", "--normalize", "peak", "--val-fraction", "0.5")
    assert prepared.code == 0, prepared.err
    assert "b.wav" in prepared.err
    shown = here("data", "show", "sounds").out
    assert "1: sounds" in shown
    assert "b.wav (it is empty)" in shown
    assert "recordings 2" in shown


def test_standard_input_lines_and_codecs(here):
    shown = here("data", "prepare", "-", "--name", "piped", "--lines", "--codec", "bytes", stdin="ä\nb\n".encode() * 20)
    assert shown.code == 0, shown.err
    dataset = dfcli.Dataset.open("piped")
    assert (dataset.lines, dataset.codec.name) == (True, "bytes")
    assert sum(split.documents for split in dataset.splits.values()) == 40


def test_validation_from_another_source(here, tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 10)
    (tmp_path / "b.txt").write_text("cab\n" * 5)
    assert here("data", "prepare", "a.txt", "--val", "b.txt", "--name", "ab").code == 0
    splits = dfcli.Dataset.open("ab").splits
    assert {name: split.tokens_count for name, split in splits.items()} == {"train": 40, "val": 20}


@pytest.mark.parametrize(
    "words",
    [
        ["none.txt"], ["a.txt", "--val-fraction", "nan"], ["a.txt", "--val-fraction", "1"], ["a.txt", "--name", "../x"],
        ["a.txt", "--val-fraction", "-1"], ["a.txt", "--sample-rate", "0"], ["a.txt", "--codec", "morse"],
        ["a.txt", "--name", "con"],
    ],
)  # fmt: skip
def test_what_is_asked_wrongly(here, tmp_path, home: Path, words: list[str]):
    (tmp_path / "a.txt").write_text("abc\n" * 10)
    shown = here("data", "prepare", *words)
    assert shown.code == 2, shown.err
    assert not list(home.glob("datasets/[a-z]*"))


def test_text_that_is_none_is_named_with_its_place(here, tmp_path):
    (tmp_path / "bad\x1b.txt").write_bytes(b"abc\n\xff\n")
    shown = here("data", "prepare", "bad\x1b.txt")
    assert shown.code == 1
    assert "bad\\x1b.txt" in shown.err
    assert "4" in shown.err
    assert "\x1b" not in shown.err


def test_get(here, tmp_path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "served.txt"
    source.write_text("verse\n" * 100)
    content = source.read_bytes()
    file = download.RemoteFile("s.txt", source.as_uri(), len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(download.KNOWN, "shakespeare", [file])
    shown = here("data", "get", "shakespeare", "-o", "plain.txt")
    assert shown.code == 0, shown.err
    assert Path(shown.out.strip()) == Path("plain.txt")
    assert (tmp_path / "plain.txt").read_bytes() == content
    assert "verse" not in shown.err
    unknown = here("data", "get", "sonnets")
    assert unknown.code == 2
    assert "shakespeare" in unknown.err
