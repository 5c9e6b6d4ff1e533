"""Public corpora and vocabularies by name, each checked against its published size and SHA-256.

A download that breaks off is kept as `NAME.part` and continued by the next one; a file appears under its own name only
when it is complete and right. Nothing here runs unless the user asks for it by `df data get`.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import filelock

from dfcli.errors import DfError, UsageError
from dfcli.system.events import Note, OnEvent, Progress, ignore
from dfcli.system.files import data_home, os_errors, sha256_file, write_atomic
from dfcli.system.words import closest

GITHUB = "https://raw.githubusercontent.com"
OPENAI = "https://openaipublic.blob.core.windows.net"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class RemoteFile:
    """A file somewhere in the net: where it is kept under `downloads`, its URL, its bytes and their SHA-256."""

    path: str
    url: str
    size: int
    sha256: str


KNOWN = {
    "shakespeare": [
        RemoteFile(
            "shakespeare.txt",
            f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            1_115_394,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    ],
    "names": [
        RemoteFile(
            "names.txt",
            f"{GITHUB}/karpathy/makemore/master/names.txt",
            228_145,
            "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
        )
    ],
    "gpt2-bpe": [
        RemoteFile(
            "gpt2-bpe/encoder.json",
            f"{OPENAI}/gpt-2/models/124M/encoder.json",
            1_042_301,
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
        RemoteFile(
            "gpt2-bpe/vocab.bpe",
            f"{OPENAI}/gpt-2/models/124M/vocab.bpe",
            456_318,
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
    ],
}


def known_corpora() -> list[str]:
    """Names that `get` knows and that can be trained on once they are fetched."""
    return sorted(name for name, files in KNOWN.items() if len(files) == 1)


def corpus_path(name: str) -> Path | None:
    """What `get(name)` fetched: a file, or for `gpt2-bpe` a folder; None if it is not all there."""
    files = KNOWN.get(name, [])
    paths = [downloads() / file.path for file in files]
    if not files or not all(p.is_file() and p.stat().st_size == f.size for p, f in zip(paths, files, strict=True)):
        return None
    return paths[0] if len(paths) == 1 else paths[0].parent


def downloads() -> Path:
    """Where fetched files are kept; it may not exist yet."""
    return data_home() / "downloads"


def get(name: str, out: Path | None = None, on_event: OnEvent = ignore) -> Path:
    """Fetches a public corpus or vocabulary, unless it is here already, and returns its path.

    `out` also gets a copy, and is returned then: a file, or for `gpt2-bpe` the folder for its two files. Raises
    UsageError for an unknown name, DfError where the network, the server or the disk fails.
    """
    if name not in KNOWN:
        raise UsageError(f"unknown corpus {name!r}", closest(name, sorted(KNOWN)))
    files = KNOWN[name]
    if out is not None and len(files) == 1 and out.is_dir():
        raise UsageError(f"{out} is a folder", "name the file to write")
    for file in files:
        _ensure(name, file, on_event)
        if out is not None:
            target = downloads() / file.path
            with os_errors("read", target):
                content = target.read_bytes()
            write_atomic(out if len(files) == 1 else out / target.name, content)
    paths = [downloads() / file.path for file in files]
    return out or (paths[0] if len(paths) == 1 else paths[0].parent)


def _ensure(name: str, file: RemoteFile, on_event: OnEvent) -> None:
    target = downloads() / file.path
    lock = filelock.FileLock(target.with_name(f".{target.name}.lock"))
    with os_errors("write", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise DfError(f"another process is downloading {name}", "wait for it to end") from None
    try:
        if not target.exists():
            _fetch(name, file, target, on_event)
        elif sha256_file(target) == file.sha256:
            on_event(Note(f"{name} is here already: {target}"))
        else:
            on_event(Note(f"{target} is not what was published; it is fetched again"))
            _fetch(name, file, target, on_event)
    finally:
        lock.release()


def _fetch(name: str, file: RemoteFile, target: Path, on_event: OnEvent) -> None:
    part = target.with_name(target.name + ".part")
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    by_hand = f"check the connection and repeat the command, or put the file from {file.url} at {target} by hand"
    try:
        _download(name, file, part, on_event)
    except urllib.error.HTTPError as error:
        raise DfError(f"could not fetch {name}: {file.url} answered {error.code} {error.reason}", by_hand) from None
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise DfError(f"could not fetch {name} from {file.url}: {reason}", by_hand) from None
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DfError(f"the download of {name} broke off: {reason}", "repeat the command: it continues there") from None
    with os_errors("read", part):
        content = part.read_bytes()
    if len(content) < file.size:
        raise DfError(
            f"the download of {name} broke off after {len(content):,} of {file.size:,} bytes",
            "repeat the command: it continues there",
        )
    with os_errors("remove", part):
        part.unlink()  # complete: either right, and then written under its name, or of no use
    if len(content) > file.size or hashlib.sha256(content).hexdigest() != file.sha256:
        raise DfError(
            f"what {file.url} sends is not the {name} that was published: its size or checksum is wrong", by_hand
        )
    write_atomic(target, content)


def _download(name: str, file: RemoteFile, part: Path, on_event: OnEvent) -> None:
    """Appends to `part` what the server sends, up to one byte more than the file has."""
    done = part.stat().st_size if part.exists() else 0
    if done == file.size:
        return
    request = urllib.request.Request(file.url, headers={"User-Agent": "dfcli"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if done and not (response.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            done = 0  # the server sends the file from its start
        with os_errors("write", part), part.open("ab" if done else "wb") as sink:
            while done <= file.size and (chunk := _receive(response, file.size + 1 - done)):
                sink.write(chunk)
                done += len(chunk)
                on_event(Progress(f"fetching {name}", min(done, file.size), file.size, "bytes"))


def _receive(response: http.client.HTTPResponse, most: int) -> bytes:
    """The next bytes, at most `most`. Errors of the connection become HTTPException, apart from those of the disk."""
    try:
        return response.read(min(CHUNK, most))
    except OSError as error:
        raise http.client.HTTPException(error.strerror or str(error) or "the connection failed") from error
