"""GPT-2's byte-level byte pair encoding (Radford et al. 2019), from `encoder.json` and `vocab.bpe`.

Merging is done by tiktoken, whose own loader would fetch the vocabulary from the network; this one reads it
from a folder.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dfcli.codecs.base import field
from dfcli.codecs.bytelevel import END_OF_TEXT, ByteLevel, check_files, printable_to_byte, read_vocabulary
from dfcli.codecs.text import utf8
from dfcli.errors import CorruptError

FILES = ("encoder.json", "vocab.bpe")
MAX_FILE = 64 << 20  # bytes; the published ones have 1.0 and 0.5 MB
_HINT = "fetch it with `df data get gpt2-bpe`, or name its folder: `df data prepare FILE --codec gpt2 --bpe FOLDER`"

# How text is cut before merging: GPT-2's expression, written so that most runs do not backtrack. A run of
# white space leaves its last character to the word behind it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

PIECES_AT_ONCE = 64


class GPT2(ByteLevel):
    """GPT-2's vocabulary: 50,257 ids in the published files, of which the last ends a text.

    `<|endoftext|>` in a user's text is text like any other. A stretch of more than 65,536 characters in which
    no word follows white space is cut at that length: its ids then differ from those of an uncut merge, its
    text does not.
    """

    name = "gpt2"

    def __init__(self, folder: Path) -> None:
        """Reads `encoder.json` and `vocab.bpe` of `folder`. Raises DfError where they are missing,
        CorruptError where they are not a vocabulary of GPT-2's kind."""
        import tiktoken

        folder = Path(folder)
        files = {name: read_vocabulary(folder / name, MAX_FILE, _HINT) for name in FILES}
        try:
            pieces = _vocabulary(files["encoder.json"], files["vocab.bpe"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptError(
                f"{folder} does not hold GPT-2's `encoder.json` and `vocab.bpe`: {error}",
                "fetch them with `df data get gpt2-bpe`",
            ) from None
        self.end_of_text = len(pieces)
        super().__init__([*pieces, b""], files)
        self._merger = tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def _encode_pieces(self, pieces: Iterator[tuple[str, int]]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_cores()) as pool:  # tiktoken releases the interpreter's lock
            waiting: deque[Future[np.ndarray]] = deque()  # so that all work while the first is read and written here
            for piece in pieces:
                waiting.append(pool.submit(self._encode_piece, piece))
                if len(waiting) > PIECES_AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _encode_piece(self, piece: tuple[str, int]) -> np.ndarray:
        text, start = piece
        utf8(text, start)  # refuses lone surrogates, which tiktoken would not name
        ids = self._merger.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        return ids.astype(self.dtype)

    def vocabulary(self) -> dict[str, int]:
        """The id of each token, its bytes written as printable characters: the content of encoder.json."""
        return json.loads(self.files["encoder.json"])

    def merges(self) -> list[list[str]]:
        """The pairs that merge, first to last, in printable characters: the content of vocab.bpe."""
        return _merges(self.files["vocab.bpe"])

    @classmethod
    def from_json(cls, description: dict[str, Any], folder: Path) -> GPT2:
        hashes = field(description, "sha256", dict)
        codec = cls(folder)
        check_files(codec.files, hashes, folder)
        return codec


def _cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vocabulary(encoder_json: bytes, vocab_bpe: bytes) -> list[bytes]:
    """The bytes of each id but the last. Raises ValueError, KeyError, ... where the two files disagree.

    The published files write bytes as printable characters. Pairs merge in the order of their lines, and ids
    follow that order: 256 single bytes, then one id per merge, then the end of text.
    """
    printable = str.maketrans(printable_to_byte())
    encoder = json.loads(encoder_json)
    ids = {piece.translate(printable).encode("latin-1"): i for piece, i in encoder.items() if piece != END_OF_TEXT}
    pieces = sorted(ids, key=ids.__getitem__)
    if sorted(encoder.values()) != list(range(len(encoder))) or encoder[END_OF_TEXT] != len(pieces):
        raise ValueError("the ids are not 0, 1, 2, ... with the end of text last")
    if sorted(pieces[:256]) != [bytes([b]) for b in range(256)]:
        raise ValueError("the first 256 ids are not the bytes")
    merges = _merges(vocab_bpe)
    if ["".join(pair).translate(printable).encode("latin-1") for pair in merges] != pieces[256:]:
        raise ValueError("the merges are not those of the ids")
    return pieces


def _merges(vocab_bpe: bytes) -> list[list[str]]:
    lines = vocab_bpe.decode("utf-8").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#version")]
