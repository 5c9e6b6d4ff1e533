"""Finding files and reading text: everything is used or named with a reason, wherever chunks are cut."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dfcli.errors import DfError, UsageError
from dfcli.ingest import reading as module
from dfcli.ingest.prepare import prepare
from dfcli.ingest.reading import BadText, read_text
from dfcli.ingest.sources import Lines, Source, discover, list_some, shown

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")


def source(path: Path) -> Source:
    return Source(path, str(path), "text", path.stat().st_size, True)


def text_of(path: Path) -> str:
    return "".join(read_text(source(path), lambda data: None))


def names(found: list[Source], folder: Path) -> list[str]:
    return [str(s.path.relative_to(folder)) for s in found if s.path]


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.txt", "a/b/c.py", "a.txt", ".hidden", ".git/x", "d/e.wav"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found, skipped = discover([str(tmp_path)])
    assert names(found, tmp_path) == ["a/b/c.py", "a/z.txt", "a.txt", "b.txt", "d/e.wav"]
    assert [s.kind for s in found] == ["text"] * 4 + ["audio"]
    assert not any(s.given for s in found)
    assert skipped == []


def test_what_may_not_be_looked_at_is_not_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lstat(path: str) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(DfError, match=r"could not read locked.a\.txt: Permission denied"):
        discover([str(Path("locked", "a.txt"))])


@posix
def test_what_is_left_out_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "evil\n\x1b[2J.txt").write_text("text")
    found, skipped = discover([str(tmp_path)])
    assert names(found, tmp_path) == ["a.txt", "evil\n\x1b[2J.txt"]
    reasons = {Path(file.name).name: file.reason for file in skipped}
    assert reasons["link.txt"] == reasons["hard.txt"] == f"the same file as {tmp_path / 'a.txt'}"
    assert reasons["dangling"] == "a link that leads nowhere"
    assert "unreadable" in reasons["self"]
    assert reasons["pipe"] == "not a regular file"
    assert reasons["up"] == "a folder that was entered before"
    assert all(s.name.isprintable() for s in found)


@posix
def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "x.txt").write_text("x")
    (outside / "deep" / "y.txt").write_text("y")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.txt").symlink_to(outside / "x.txt")
    (folder / "deep").symlink_to(outside / "deep")
    found, _ = discover([str(folder)])
    assert names(found, folder) == ["deep/y.txt", "link.txt"]


@posix
def test_what_is_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for item in [tmp_path / "missing", tmp_path / "dangling", tmp_path / "pipe", "/dev/null", "a\0b", "x" * 5000]:
        with pytest.raises(UsageError):
            discover([str(item)])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    _, skipped = discover([str(tmp_path)])
    assert "unreadable" in skipped[0].reason


def test_a_file_with_an_unusual_name_is_looked_into_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "recording").write_bytes(b"RIFF....WAVE")
    (tmp_path / "notes").write_text("RI")
    found, _ = discover([str(tmp_path / "recording"), str(tmp_path / "notes")])
    assert [s.kind for s in found] == ["audio", "text"]


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes("héllo".encode())
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        found, _ = discover(["-"])
        with pytest.raises(UsageError, match="once"):
            discover(["-", "-"])
    for _ in range(2):
        assert "".join(read_text(found[0], lambda data: None)) == "héllo"
    assert (found[0].size, found[0].stamp(), found[0].identity) == (6, None, "-")


# Text ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])), chunk=st.integers(1, 9)
)
def test_text_is_the_same_wherever_it_is_cut(text: str, chunk: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        seen = []
        got = "".join(read_text(source(path), seen.append))
    assert b"".join(seen) == text.encode()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert got == text.encode().decode("utf-8-sig" if chunk >= 3 else "utf-8")


@settings(max_examples=100, deadline=None)
@given(
    before=st.text(alphabet="aé€😀", max_size=9),
    bad=st.sampled_from([b"\xff", b"\xc3(", b"\xe2\x82", b"\xf0\x9f\x98a", b"\xed\xa0\x80", b"\xc0\xaf", b"\x80"]),
    after=st.text(alphabet="aé€😀", max_size=9),
    chunk=st.integers(1, 7),
)
def test_what_is_not_utf8_is_named_with_its_byte(
    before: str, bad: bytes, after: str, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    data = before.encode() + bad + after.encode()
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as expected:
        data.decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        with pytest.raises(BadText) as error:
            text_of(path)
    assert error.value.message == f"{path} is not UTF-8 at byte {expected.value.start:,}"


def test_marks_nul_and_utf16(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert text_of(path) == "abc"
    path.write_bytes(b"\xef\xbb\xbf")
    assert text_of(path) == ""
    path.write_bytes(b"abc\0d")
    with pytest.raises(BadText, match="NUL at byte 3"):
        text_of(path)
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes("abc".encode(encoding))
        assert text_of(path) == "abc"
    path.write_bytes("abc".encode("utf-16-le"))
    with pytest.raises(BadText, match="looks like UTF-16LE") as error:
        text_of(path)
    assert "iconv -f UTF-16LE -t UTF-8" in error.value.hint
    path.write_bytes("“abc”".encode("cp1252"))
    with pytest.raises(BadText) as error:
        text_of(path)
    assert f"iconv -f WINDOWS-1252 -t UTF-8 {path} > {path}.utf8" in error.value.hint
    for encoding in ("cp1251", "koi8-r", "gbk"):  # their letters would become others
        path.write_bytes("Привет мир, это текст. ".encode(encoding))
        with pytest.raises(BadText) as error:
            text_of(path)
        assert f"find out its encoding, for example with `file -i {path}`" in error.value.hint
    path.write_bytes("abc".encode("utf-32-be"))
    with pytest.raises(BadText, match="looks like UTF-32BE"):
        text_of(path)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(__file__, "a.py")
    with pytest.raises(BadText, match="is a tar archive") as error:
        text_of(tmp_path / "a.tar.gz")
    assert f"`tar -xOf {tmp_path / 'a.tar.gz'} >" in error.value.hint
    gone = source(path)
    path.unlink()
    with pytest.raises(DfError, match="No such file"):
        list(read_text(gone, lambda data: None))


def reference_lines(text: str) -> tuple[list[str], int]:
    """The definition: lines end at \\n or \\r\\n, and those of nothing but blanks are dropped."""
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()  # what ends with a line break has no line behind it
    kept = [line for line in lines if line.strip(" \t\r")]
    return kept, len(lines) - len(kept)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab \t\r\n", max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
@example(text="a\r\r\na", cuts=[4])
@example(text="a\r\r\na", cuts=[1, 2, 3])
def test_lines(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    lines = Lines()
    got = "".join(lines.of(text[a:b] for a, b in pairwise(places)))
    kept, blank = reference_lines(text)
    assert got == "".join("\n" + line for line in kept)
    assert lines.blank == blank


def test_a_line_of_any_length_needs_little_memory() -> None:
    chunk = "x" * 1000 + " " * 1000
    longest = max(len(piece) for piece in Lines().of(chunk for _ in range(5000)))
    assert longest < 10_000
    blanks = list(Lines().of(" " * 100_000 for _ in range(50)))
    assert max(map(len, blanks), default=0) < 2 << 20


def test_names_are_shown_safely() -> None:
    assert shown("a b.txt") == "a b.txt"
    assert shown("größe") == "größe"
    assert shown("a\x1b[2J\n") == "'a\\x1b[2J\\n'"
    assert shown("a\udc80") == "'a\\udc80'"
    assert list_some(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert list_some(["a"], 5000) == "a and 4,999 more"


def test_sound_and_video_that_cannot_be_decoded_are_refused_with_the_line_that_converts(tmp_path: Path) -> None:
    (tmp_path / "my clip.webm").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(range(90)))
    (tmp_path / "call").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(90))  # by its content
    (tmp_path / "line.gsm").write_bytes(bytes(range(200)))
    (tmp_path / "some.bin").write_bytes(bytes(range(200)))
    for name, flac in (("my clip.webm", "my clip.flac"), ("call", "call.flac"), ("line.gsm", "line.flac")):
        source = str(tmp_path / name)
        for kind in ("audio", None):
            with pytest.raises(DfError, match="a sound or video file of a kind that cannot be decoded") as caught:
                prepare([source], kind=kind)
            assert shlex.join(["ffmpeg", "-i", source, str(tmp_path / flac)]) in caught.value.hint
    with pytest.raises(DfError, match="neither sound that can be decoded here nor text"):
        prepare([str(tmp_path / "some.bin")], kind="audio")
    with pytest.raises(DfError, match="not text"):
        prepare([str(tmp_path / "some.bin")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "my clip.webm").rename(tmp_path / "folder" / "a.webm")
    with pytest.raises(DfError, match="hold nothing") as caught:
        prepare([str(tmp_path / "folder")], kind="audio")
    assert f"ffmpeg -i {tmp_path}/folder/a.webm" in caught.value.hint
    (tmp_path / "folder" / "notes.txt").write_text("some words\n" * 30)
    with prepare([str(tmp_path / "folder")]) as dataset:  # a video beside a text does not make it sound
        assert dataset.kind == "text"
        assert dataset.info["skipped"]["count"] == 1


def test_files_of_other_tools_are_named_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files: dict[str, tuple[bytes, dict[str, Any], str, str]] = {
        "a.mid": (b"MThd\0\0\0\6", {"kind": "audio"}, "MIDI: it holds notes", "synthesiser"),
        "b.zip": (b"PK\3\4\xff\0", {"kind": "audio"}, "is a zip archive", "`unzip b.zip -d b`"),
        "c.wav": (b"<html>404 Not Found</html>\n", {}, "it begins with '<html>404 Not", "fetch this one again"),
        "d.pcm": (bytes(range(256)), {"codec": "mulaw"}, "cannot be used", "-f s16le -ar 16000 -ac 1 -i d.pcm d.flac"),
        "e.docx": (b"PK\3\4\xff\0", {}, "an office program", "`pandoc e.docx -t plain -o e.docx.txt`"),
        "f.pdf": (b"%PDF-1.4\n\xff\0", {}, "is a PDF", "`pdftotext f.pdf f.pdf.txt`"),
        "g.json": (b'["a", "b"]', {"field": "text"}, "no object with fields", "jq -c '.[]' g.json > g-lines.jsonl"),
        "h.csv": (b"1,a b\n2,c d\n", {"field": "text"}, "has no field `text`", "the first line of the file names them"),
        "i.jsonl": (b'{"text": ["a"]}\n', {"field": "text"}, "holds a list, not text", "whose values are texts"),
        "j.txt": (b"a b\n" * 20, {"separator": "\\n\\n"}, "does not occur in j.txt", "--separator $'\\n\\n'"),
    }
    for name, (data, options, message, hint) in files.items():
        Path(name).write_bytes(data)
        with pytest.raises(DfError) as caught:
            prepare([name], **options)
        assert message in caught.value.message, name
        assert hint in caught.value.hint, name
    with pytest.raises(UsageError) as caught:
        prepare(["h.csv,j.txt"])
    assert caught.value.hint == "give each by its own option: `--data h.csv --data j.txt`"
