from __future__ import annotations

import hashlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from dfcli.errors import DfError, UsageError
from dfcli.ingest import download
from dfcli.ingest.download import RemoteFile, corpus_path, get, known_corpora
from dfcli.system.events import Note, Progress

CONTENT = bytes(range(256)) * 1000


class Server(http.server.ThreadingHTTPServer):
    """Sends `content` in the manner of `mode` and remembers what was asked for."""

    content = CONTENT
    mode = "honest"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked, content, mode = self.headers["Range"], self.server.content, self.server.mode
        self.server.asked.append(asked)
        if mode == "missing":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and mode != "no ranges" else 0  # type: ignore[index]
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if mode != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mode in ("truncated", "no length") else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        hashed = hashlib.sha256(CONTENT).hexdigest()
        one = [RemoteFile("one.txt", f"{url}/one", len(CONTENT), hashed)]
        pair = [RemoteFile(f"pair/{name}", f"{url}/{name}", len(CONTENT), hashed) for name in "ab"]
        monkeypatch.setattr(download, "KNOWN", {"one": one, "pair": pair})
        yield server
        server.shutdown()


def stored(home: Path) -> set[str]:
    """Files below the downloads, apart from locks."""
    files = (home / "downloads").rglob("*")
    return {path.name for path in files if path.is_file() and not path.name.endswith(".lock")}


def test_a_file_is_fetched_once_with_progress(server: Server, home: Path) -> None:
    events: list[object] = []
    assert corpus_path("one") is None
    path = get("one", on_event=events.append)
    assert path == home / "downloads" / "one.txt" == corpus_path("one")
    assert path.read_bytes() == CONTENT
    assert stored(home) == {"one.txt"}
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    assert progress[-1] == Progress("fetching one", len(CONTENT), len(CONTENT), "bytes")
    assert get("one", on_event=events.append) == path
    assert events[-1] == Note(f"one is here already: {path}")
    assert server.asked == [None]


def test_a_copy_is_written_where_it_is_wanted(server: Server, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "copy.txt"
    assert get("one", out) == out
    assert out.read_bytes() == CONTENT
    assert get("pair", tmp_path / "folder") == tmp_path / "folder"
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"a", "b"}
    assert corpus_path("pair") == home / "downloads" / "pair"
    with pytest.raises(UsageError, match="is a folder"):
        get("one", tmp_path)


@pytest.mark.parametrize("mode", ["truncated", "no length"])
def test_what_broke_off_is_continued(mode: str, server: Server, home: Path) -> None:
    server.mode = mode
    with pytest.raises(DfError, match="broke off") as caught:
        get("one")
    assert "continues" in caught.value.hint
    assert stored(home) == {"one.txt.part"}
    assert corpus_path("one") is None
    server.mode = "honest"
    assert get("one").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={len(CONTENT) // 2}-"]
    assert stored(home) == {"one.txt"}


def test_a_server_without_ranges_sends_it_all_again(server: Server, home: Path) -> None:
    server.mode = "truncated"
    with pytest.raises(DfError):
        get("one")
    server.mode = "no ranges"
    assert get("one").read_bytes() == CONTENT
    assert stored(home) == {"one.txt"}


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
def test_a_wrong_part_cannot_do_lasting_harm(part: bytes, server: Server, home: Path) -> None:
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / "one.txt.part").write_bytes(part)
    if len(part) <= len(CONTENT):
        with pytest.raises(DfError, match="checksum is wrong"):
            get("one")
        assert stored(home) == set()
    assert get("one").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"x", CONTENT * 50])
def test_other_content_is_refused(content: bytes, server: Server, home: Path) -> None:
    server.content = content
    events: list[object] = []
    with pytest.raises(DfError, match="not the one that was published") as caught:
        get("one", on_event=events.append)
    assert f"at {home / 'downloads' / 'one.txt'} by hand" in caught.value.hint
    assert stored(home) == set()
    assert max(event.done for event in events if isinstance(event, Progress)) <= len(CONTENT)


def test_no_more_is_taken_than_the_file_has(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = download._receive

    def receive(*arguments: Any) -> bytes:
        chunk = real(*arguments)
        taken.append(len(chunk))
        return chunk

    monkeypatch.setattr(download, "_receive", receive)
    server.content = CONTENT * 50
    with pytest.raises(DfError, match="not the one that was published"):
        get("one")
    assert sum(taken) == len(CONTENT) + 1  # one byte more tells that it is another file


def test_a_shorter_file_never_ends_well(server: Server, home: Path) -> None:
    server.content = CONTENT[:-1]
    with pytest.raises(DfError, match="broke off after 255,999 of 256,000 bytes"):
        get("one")
    assert corpus_path("one") is None


def test_a_damaged_file_is_fetched_again(server: Server, home: Path) -> None:
    path = get("one")
    path.write_bytes(b"x" * len(CONTENT))
    events: list[object] = []
    assert get("one", on_event=events.append).read_bytes() == CONTENT
    assert events[0] == Note(f"{path} is not what was published; it is fetched again")


def test_the_server_has_no_such_file(server: Server) -> None:
    server.mode = "missing"
    with pytest.raises(DfError, match=r"could not fetch one: http.*/one answered 404 Not Found"):
        get("one")


def test_no_connection(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/one"
        monkeypatch.setattr(download, "KNOWN", {"one": [RemoteFile("one.txt", url, 3, "0" * 64)]})
        with pytest.raises(DfError, match=r"could not fetch one from http.*refused") as caught:
            get("one")
    assert f"put the file from {url} at {home / 'downloads' / 'one.txt'} by hand" in caught.value.hint
    assert caught.value.exit_code == 1


def test_a_server_that_falls_silent(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/one"
        monkeypatch.setattr(download, "KNOWN", {"one": [RemoteFile("one.txt", url, 3, "0" * 64)]})
        with pytest.raises(DfError, match="timed out"):
            get("one")


def test_two_at_once(server: Server, home: Path) -> None:
    (home / "downloads").mkdir(parents=True)
    with filelock.FileLock(home / "downloads" / ".one.txt.lock"), pytest.raises(DfError, match="another process"):
        get("one")


def test_a_disk_that_cannot_be_written(server: Server, home: Path) -> None:
    home.write_text("a file where the data dir should be")
    with pytest.raises(DfError, match="home is not a folder"):
        get("one")


def test_unknown_names_are_listed() -> None:
    with pytest.raises(UsageError, match="'moby-dick'") as caught:
        get("moby-dick")
    assert caught.value.hint == "there are gpt2-bpe, names, shakespeare"
    assert caught.value.exit_code == 2
    assert corpus_path("moby-dick") is None
    assert corpus_path("../x") is None
    assert known_corpora() == ["names", "shakespeare"]


def test_what_is_known_is_well_formed() -> None:
    for files in download.KNOWN.values():
        for file in files:
            assert file.url.startswith("https://")
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert 0 < file.size < 10**7
            assert not Path(file.path).is_absolute()
