"""The text of a file in chunks: unpacked, decoded, and with one kind of line end."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

from dfcli.errors import DfError, UsageError
from dfcli.ingest.sources import CHUNK, Source
from dfcli.system.files import os_errors

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF8, "utf-8"),
)  # fmt: skip
NOT_WINDOWS = frozenset(b"\x81\x8d\x8f\x90\x9d")  # bytes that Windows-1252 lacks


class BadText(DfError):
    """A file is not UTF-8 text. `reason` says so without naming it."""

    def __init__(self, name: str, reason: str, hint: str) -> None:
        super().__init__(f"{name} {reason}", hint)
        self.reason = reason


def read_text(
    source: Source, on_bytes: Callable[[bytes], object], about: set[str] | None = None, newlines: bool = True
) -> Iterator[str]:
    """The text of a file in chunks of about a million characters, without its byte order mark.

    gzip, bzip2, xz and zstd are unpacked. A byte order mark says the encoding, else it is UTF-8. Line ends of Windows
    and of old Macs become "\\n" with `newlines`. `on_bytes` is called with every piece of the file. `about` collects
    what is worth telling: the compression, an encoding other than UTF-8, "mark", "returns".

    Raises BadText, naming the byte, where it is not text in its encoding or holds a NUL, which only binary files do.
    """
    about = set() if about is None else about
    newline = io.IncrementalNewlineDecoder(None, translate=True)
    with source.open() as file, os_errors("read", Path(source.name)):
        stream = _unpacked(source, file, on_bytes, about)
        offset, encoding = 0, "utf-8"
        decoder = codecs.getincrementaldecoder(encoding)("strict")
        while True:
            data = _read(source, stream)
            last = not data
            if offset == 0:
                for mark, name in MARKS:
                    if data.startswith(mark):
                        data, offset, encoding = data[len(mark) :], len(mark), name
                        about.add("mark" if name == "utf-8" else name[:6].upper())
                        decoder = codecs.getincrementaldecoder(encoding)("strict")
                        break
            if encoding == "utf-8" and (nul := data.find(0)) >= 0:
                raise _binary(source, data, offset, nul)
            pending = len(decoder.getstate()[0])  # of a character that the last chunk cut in two
            try:
                text = decoder.decode(data, last)
            except UnicodeDecodeError as error:
                raise _undecodable(source, encoding, data, offset - pending + error.start) from None
            if newlines:
                if "\r" in text:
                    about.add("returns")
                text = newline.decode(text, last)
            offset += len(data)
            if text:
                yield text
            if last:
                while data := file.read(CHUNK):  # what stands behind a packed stream belongs to the file's hash
                    on_bytes(data)
                return


class _Tee(io.RawIOBase):
    """A file that also gives `on_bytes` what is read of it."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[bytes], object]) -> None:
        self._file, self._on_bytes = file, on_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(CHUNK if size < 0 else size)
        self._on_bytes(data)
        return data


def _unpacked(source: Source, file: IO[bytes], on_bytes: Callable[[bytes], object], about: set[str]) -> IO[bytes]:
    head = file.read(6)
    file.seek(0)
    tee = cast(Any, _Tee(file, on_bytes))
    kind = next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None)
    if kind is None:
        return tee
    about.add(kind)
    if kind == "zstd":
        try:
            zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
        except ImportError:
            hint = f"`pip install backports.zstd`, or unpack it: `zstd -d {shlex.quote(source.name)}`"
            raise UsageError(f"{source.name} is packed by zstd, which takes another package", hint) from None
        return zstd.ZstdFile(tee)
    if kind == "gzip":
        return cast(Any, gzip.GzipFile(fileobj=tee))
    return cast(Any, bz2.BZ2File(tee) if kind == "bzip2" else lzma.LZMAFile(tee))


def _read(source: Source, stream: IO[bytes]) -> bytes:
    try:
        return stream.read(CHUNK)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as error:
        raise DfError(f"{source.name} cannot be unpacked: {error}", "it may be cut off; fetch it again") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise DfError(f"{source.name} cannot be unpacked: {error}", "it may be cut off; fetch it again") from None
        raise


def _convert(source: Source, encoding: str) -> str:
    name = shlex.quote(source.name)
    out = shlex.quote(source.name + ".utf8")
    return f"convert it, and use the result: `iconv -f {encoding} -t UTF-8 {name} > {out}`"


def _undecodable(source: Source, encoding: str, data: bytes, place: int) -> BadText:
    if encoding != "utf-8":
        return BadText(source.name, f"is damaged {encoding[:6].upper()} at byte {place:,}", "save it as UTF-8")
    other = sum(byte > 127 for byte in data[:CHUNK])
    if NOT_WINDOWS & set(data) or other > len(data[:CHUNK]) / 2:  # Western languages have few such letters
        hint = (
            f"find out its encoding, for example with `file -i {shlex.quote(source.name)}`, and convert it by `iconv`"
        )
        return BadText(source.name, f"is not UTF-8 at byte {place:,}", hint)
    return BadText(source.name, f"is not UTF-8 at byte {place:,}", _convert(source, "WINDOWS-1252"))


def _binary(source: Source, data: bytes, offset: int, nul: int) -> BadText:
    reason = f"is not text: it has a NUL at byte {offset + nul:,}"
    name = shlex.quote(source.name)
    office = Path(source.name).suffix.lower() in (".docx", ".odt", ".epub", ".pptx")
    if data.startswith(b"PK\3\4") and office:
        hint = f"take the text out of it: `pandoc {name} -t plain -o {name}.txt`"
        return BadText(source.name, "is a document of an office program or an e-book, not plain text", hint)
    if data.startswith(b"%PDF"):
        return BadText(source.name, "is a PDF", f"take the text out of it: `pdftotext {name} {name}.txt`")
    if data[257:262] == b"ustar":
        return BadText(source.name, "is a tar archive", f"unpack it, for example with `tar -xOf {name} > {name}.txt`")
    fours = data[: len(data) // 4 * 4]
    for encoding, zeros in (("UTF-32LE", fours[3::4] + fours[2::4]), ("UTF-32BE", fours[::4] + fours[1::4])):
        if zeros and zeros.count(0) > 0.9 * len(zeros) and fours.count(0) < 0.8 * len(fours):
            looks = f"is not UTF-8 but looks like {encoding} without a mark"
            return BadText(source.name, looks, _convert(source, encoding))
    pairs = data[: len(data) // 2 * 2]
    for encoding, zeros in (("UTF-16LE", pairs[1::2]), ("UTF-16BE", pairs[::2])):
        if len(zeros) > 1 and zeros.count(0) > len(zeros) / 2 and pairs.count(0) < 1.1 * zeros.count(0):
            return BadText(
                source.name, f"is not UTF-8 but looks like {encoding} without a mark", _convert(source, encoding)
            )
    if data.startswith(b"PK\3\4"):
        return BadText(source.name, "is a zip archive", f"unpack it, for example with `unzip -p {name} > {name}.txt`")
    return BadText(source.name, reason, "give a text file")
