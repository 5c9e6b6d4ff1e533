"""Characters and bytes: vocabularies that are a table of at most one entry per character.

Both work through numpy table look-ups over the text's UTF-32 or UTF-8 bytes, at hundreds of MB/s a core.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dfcli.codecs.base import StreamDecoder, TextCodec, checked_ids, field
from dfcli.errors import CorruptError, DfError

BLOCK = 1 << 16  # characters per look-up: its UTF-32 form stays in the processor's cache


def utf8(text: str, start: int = 0) -> bytes:
    """`text` as UTF-8. Raises DfError for a lone surrogate, which no UTF-8 file can hold; `start` is where
    `text` lies in what the user gave."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code, place = ord(text[error.start]), start + error.start
        raise DfError(
            f"U+{code:04X} at position {place} is half of a surrogate pair, not a character",
            "give the text as valid UTF-8",
        ) from None


class Chars(TextCodec):
    """One id per distinct character of `alphabet`, in the order of their code points (as nanoGPT has it)."""

    name = "chars"
    unit = "character"

    def __init__(self, alphabet: str) -> None:
        """Raises DfError where `alphabet` is empty or holds a lone surrogate."""
        self.alphabet = "".join(sorted(set(alphabet)))
        if not self.alphabet:
            raise DfError("a vocabulary of characters needs at least one character", "give a text that is not empty")
        encoded = [utf8(character) for character in self.alphabet]
        self.vocab_size = len(self.alphabet)
        self.byte_lengths = np.array([len(e) for e in encoded], np.int64)
        self.character_lengths = np.ones(self.vocab_size, np.int64)
        self._code_points = np.array([ord(c) for c in self.alphabet], "<u4")
        # what the alphabet lacks is marked by vocab_size, which is no id
        self._ids = np.full(int(self._code_points[-1]) + 1, self.vocab_size, np.min_scalar_type(self.vocab_size))
        self._ids[self._code_points] = np.arange(self.vocab_size)

    def encode(self, text: str, start: int = 0) -> np.ndarray:
        ids = np.empty(len(text), self.dtype)
        for begin in range(0, len(text), BLOCK):
            block = text[begin : begin + BLOCK]
            points = np.frombuffer(block.encode("utf-32-le", "surrogatepass"), "<u4")
            if points.max() >= len(self._ids):
                raise self._unknown(block, start + begin)
            found = self._ids[points]
            if found.max() == self.vocab_size:
                raise self._unknown(block, start + begin)
            ids[begin : begin + BLOCK] = found
        return ids

    def _unknown(self, text: str, start: int) -> DfError:
        known = set(self.alphabet)
        place, character = next((i, c) for i, c in enumerate(text) if c not in known)
        shown = repr(self.alphabet)[1:-1]
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        return DfError(
            f"the alphabet lacks {character!r} (U+{ord(character):04X}), at position {start + place}",
            f"it has {self.vocab_size} character{'s' * (self.vocab_size != 1)}: {shown}",
        )

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._code_points[checked_ids(ids, self.vocab_size)].tobytes().decode("utf-32-le")

    def decoder(self) -> StreamDecoder:
        return _CharacterDecoder(self.alphabet)

    @property
    def id_of_newline(self) -> int | None:
        return self.alphabet.index("\n") if "\n" in self.alphabet else None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "alphabet": self.alphabet}

    @classmethod
    def from_json(cls, description: dict[str, Any], folder: Path) -> Chars:
        alphabet = field(description, "alphabet", str)
        if not alphabet or alphabet != "".join(sorted(set(alphabet))):
            raise CorruptError("the alphabet of the codec is not in order", "prepare the data again, or train anew")
        return cls(alphabet)


class _CharacterDecoder(StreamDecoder):
    def __init__(self, alphabet: str) -> None:
        self._alphabet = alphabet

    def feed(self, token: int) -> str:
        return self._alphabet[token]

    def finish(self) -> str:
        return ""


class Utf8Decoder(StreamDecoder):
    """Joins the bytes of ids (`pieces[id]`) to characters; holds back those of an unfinished one."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(self._pieces[token])

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class Bytes(TextCodec):
    """The 256 byte values of UTF-8: any text, without a vocabulary of its own."""

    name = "bytes"
    unit = "byte"
    vocab_size = 256

    def __init__(self) -> None:
        self.byte_lengths = np.ones(256, np.int64)
        self.character_lengths = starts_character(np.arange(256)).astype(np.int64)

    def encode(self, text: str, start: int = 0) -> np.ndarray:
        return np.frombuffer(bytearray(utf8(text, start)), np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return checked_ids(ids, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def decoder(self) -> StreamDecoder:
        return Utf8Decoder([bytes([b]) for b in range(256)])

    @property
    def id_of_newline(self) -> int | None:
        return ord("\n")

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_json(cls, description: dict[str, Any], folder: Path) -> Bytes:
        return cls()


def starts_character(values: np.ndarray) -> np.ndarray:
    """Which byte values [n] are not continuation bytes (10xxxxxx) of UTF-8."""
    return (values & 0xC0) != 0x80
