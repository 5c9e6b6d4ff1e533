"""What byte-level vocabularies share: ids that stand for bytes, files that hold them as printable characters, and where
a long text may be cut before it is encoded.

Source: Radford et al. 2019 (GPT-2), whose published files write bytes this way.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dfcli.codecs.base import StreamDecoder, TextCodec, checked_ids
from dfcli.codecs.text import Utf8Decoder, starts_character
from dfcli.errors import CorruptError, DfError

END_OF_TEXT = "<|endoftext|>"

# Characters encoded at once. The expression engines of tiktoken and tokenizers fail or slow down on runs of several
# 100,000 blanks, so longer texts are cut where the expressions cut them anyway.
PIECE = 1 << 16


class ByteLevel(TextCodec):
    """A vocabulary whose ids stand for bytes of UTF-8, or for no text, kept in files that the codec was made of."""

    breaks: ClassVar[str] = " \n"
    """Before these characters the vocabulary's expression always cuts when a visible character follows."""

    def __init__(self, tokens: Sequence[bytes], files: dict[str, bytes]) -> None:
        """`tokens` are the bytes of each id, `files` name and content of what `save_files` writes."""
        self.files, self._tokens = files, list(tokens)
        self.vocab_size = len(self._tokens)
        self.byte_lengths, self.character_lengths = byte_and_character_lengths(self._tokens)
        self._newline = self._tokens.index(b"\n")

    @abstractmethod
    def _encode_pieces(self, pieces: Iterator[tuple[str, int]]) -> Iterator[np.ndarray]:
        """Ids of the pieces that `text_pieces` gives, in their order."""

    def encode(self, text: str, start: int = 0) -> np.ndarray:
        pieces = text_pieces([text], start, self.breaks)
        return np.concatenate([np.empty(0, self.dtype), *self._encode_pieces(pieces)])

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        return self._encode_pieces(text_pieces(chunks, 0, self.breaks))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        tokens = self._tokens
        return b"".join([tokens[i] for i in checked_ids(ids, self.vocab_size).tolist()]).decode("utf-8", "replace")

    def decoder(self) -> StreamDecoder:
        return Utf8Decoder(self._tokens)

    @property
    def id_of_newline(self) -> int | None:
        return self._newline

    def to_json(self) -> dict[str, Any]:
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        return {"name": self.name, "sha256": hashes}

    def save_files(self, folder: Path) -> None:
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def check_files(files: Mapping[str, bytes], hashes: Mapping[str, str], folder: Path) -> None:
    """Raise CorruptError where `files`, read from `folder`, have other SHA-256 than a codec's description says."""
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != hashes.get(name):
            raise CorruptError(
                f"{folder / name} is not the vocabulary that was used", "put the original file back there"
            )


def read_vocabulary(path: Path, most: int, hint: str) -> bytes:
    """The content of a file of at most `most` bytes. DfError with the `hint` where it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for without end
            raise OSError(0, "not a regular file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DfError(f"could not read the vocabulary {path}: {error.strerror}", hint) from None
    if len(data) > most:
        raise DfError(f"{path} is too large for a vocabulary", hint)
    return data


def printable_to_byte() -> dict[str, str]:
    """The byte each character of the published files stands for, as a character of Latin-1: visible ones are
    themselves, the other bytes in rising order are U+0100, U+0101, ..."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(b): chr(b) for b in visible} | {chr(0x100 + i): chr(b) for i, b in enumerate(hidden)}


def byte_and_character_lengths(tokens: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each token and characters that begin inside it, both int64 [V]."""
    sizes = np.array([len(token) for token in tokens], np.int64)
    starts = starts_character(np.frombuffer(b"".join(tokens), np.uint8))
    before = np.concatenate([[0], np.cumsum(starts, dtype=np.int64)])
    ends = np.cumsum(sizes)
    return sizes, before[ends] - before[ends - sizes]


def text_pieces(chunks: Iterable[str], offset: int = 0, breaks: str = " \n") -> Iterator[tuple[str, int]]:
    """The text of all chunks, cut into pieces of at most PIECE characters whose ids do not depend on each other,
    each with its place counted from `offset`. The cuts depend on the text alone, not on the chunks.

    `breaks` holds the characters before which the vocabulary's expression always cuts when a visible character
    follows them: blank and newline for GPT-2's, the blank alone for GPT-4's."""
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start > PIECE:
            end = _word_start(text, start, start + PIECE, breaks)
            yield text[start:end], offset + start
            start = end
        text, offset = text[start:], offset + start
    if text:
        yield text, offset


def _word_start(text: str, start: int, end: int, breaks: str) -> int:
    """The last place in (start, end) where one of `breaks` stands before a visible character. `end` where there is
    none."""
    for place in range(end - 2, start, -1):
        if text[place] in breaks and not text[place + 1].isspace():
            return place
    return end
