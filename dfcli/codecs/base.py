"""What every codec offers: a vocabulary of known size, an id dtype, a description that rebuilds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dfcli.errors import CorruptError


class Codec(ABC):
    """Turns one kind of data into token ids in [0, vocab_size) and back."""

    name: ClassVar[str]
    kind: ClassVar[str]
    """"text" or "audio"."""
    unit: ClassVar[str] = "token"
    """The word for what an id stands for."""
    sample_rate: int = 0
    """Hz of sound; 0 for text."""
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer type that holds every id, little-endian as ids are stored."""
        if self.vocab_size <= 1 << 8:
            return np.dtype("u1")
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A description from which `codec_from_json` rebuilds this codec."""

    @classmethod
    @abstractmethod
    def from_json(cls, description: dict[str, Any], folder: Path) -> Codec:
        """Rebuilds the codec; `folder` holds its side files. Raises CorruptError where something is wrong."""

    def save_files(self, folder: Path) -> None:  # noqa: B027 - most codecs have no side files
        """Writes what `to_json` does not hold into `folder`."""


class StreamDecoder(ABC):
    """Turns ids into text one by one. The pieces joined are what `TextCodec.decode` gives for all ids."""

    @abstractmethod
    def feed(self, token: int) -> str:
        """The text that is certain after one more id; empty while a character is incomplete."""

    @abstractmethod
    def finish(self) -> str:
        """What an incomplete character at the very end reads as (U+FFFD)."""


class TextCodec(Codec):
    """Text to ids and back. `decode(encode(text)) == text` for every text that can be encoded."""

    kind = "text"

    byte_lengths: np.ndarray
    """int64 [V]: UTF-8 bytes an id stands for (bits per byte = bits / sum of these over the scored ids)."""
    character_lengths: np.ndarray
    """int64 [V]: characters that begin inside an id (bits per character)."""
    end_of_text: int | None = None
    """The id that separates documents and stands for no text, where the vocabulary has one."""

    @abstractmethod
    def encode(self, text: str, start: int = 0) -> np.ndarray:
        """Ids [n] of `dtype`. Raises DfError where the vocabulary cannot express the text, naming the place;
        `start` is where `text` lies in what the user gave."""

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of a text that comes in chunks, in arrays of any length. Joined, they equal `encode` of the
        whole text wherever it was cut. Memory is that of a few chunks."""
        start = 0
        for chunk in chunks:
            yield self.encode(chunk, start)
            start += len(chunk)

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ids [n]; bytes that are not UTF-8 read as U+FFFD. Raises ValueError for an id outside
        the vocabulary."""

    @abstractmethod
    def decoder(self) -> StreamDecoder:
        """A fresh decoder for ids that arrive one by one."""

    @property
    @abstractmethod
    def id_of_newline(self) -> int | None:
        """The id of a line break alone, or None where the vocabulary has none."""


def checked_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` as an integer array [n]. Raises ValueError for one outside [0, vocab_size)."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be a row of integers, not {array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"ids must lie in [0, {vocab_size})")
    return array


def field(description: dict[str, Any], key: str, kind: type) -> Any:
    """`description[key]`, checked to be of `kind`. Raises CorruptError."""
    value = description.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CorruptError(
            f"the description of the codec has no valid `{key}`", "prepare the data again, or train anew"
        )
    return value
