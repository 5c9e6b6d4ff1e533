"""What byte-level vocabularies share: bytes written as printable characters, the lengths of tokens, and where a long
text may be cut before it is encoded.

Source: Radford et al. 2019 (GPT-2), whose published files write bytes this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dfcli.codecs.text import starts_character

# Characters encoded at once. The expression engines of tiktoken and tokenizers fail or slow down on runs of several
# 100,000 blanks, so longer texts are cut where the expressions cut them anyway.
PIECE = 1 << 16


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
