"""Byte-level byte-pair encodings in Hugging Face's `tokenizer.json`: trained here, or made elsewhere.

The file is kept byte for byte, and Hugging Face's own library `tokenizers` trains it and encodes with it. So
`tokenizers` and `transformers` open it unchanged and give the same ids. Sources: Sennrich et al. 2016 (arXiv
1508.07909) for the merges, Radford et al. 2019 (GPT-2) for bytes as the alphabet, OpenAI's tiktoken (cl100k_base) for
GPT-4's split pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dfcli.codecs.base import field
from dfcli.codecs.bytelevel import (
    END_OF_TEXT,
    PIECE,
    ByteLevel,
    check_files,
    printable_to_byte,
    read_vocabulary,
    text_pieces,
)
from dfcli.codecs.text import utf8
from dfcli.errors import DfError, UsageError
from dfcli.system.files import strict_json

FILE = "tokenizer.json"
MAX_FILE = 256 << 20  # bytes; the largest published ones have 35 MB
MIN_VOCAB, MAX_VOCAB = 257, 1 << 20  # the bytes and the end of text; more than any published vocabulary has
PIECES_AT_ONCE = 64  # of text, given to the library's threads together

# How text is cut before merging. GPT-4's expression as `tokenizers` can read it: contractions, words with the character
# before them, up to three digits, punctuation, line breaks.
GPT4_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def default_vocab_size(size: int) -> int:
    """A vocabulary size for a training split of `size` bytes: 512 for 0.2 MB, 1,024 for 1 MB, 2,048 for 10 MB, 8,192
    for 100 MB, 16,384 for 1 GB; a power of two from 512 to 32,768.

    A fit to what small models were found to want: the best size grows more slowly than the model and its data (Tao et
    al. 2024, arXiv 2407.13623), and a token needs about a hundred occurrences to be learned (Gowda and May 2020, arXiv
    2004.02334)."""
    exponent = 10 + 0.4 * math.log2(max(1, size) / 1e6)
    return 2 ** min(15, max(9, round(exponent)))


def check_vocab_size(size: int) -> None:
    """Raise UsageError where an encoding cannot have `size` ids."""
    if not MIN_VOCAB <= size <= MAX_VOCAB:
        raise UsageError(f"--vocab-size must be from {MIN_VOCAB} to {MAX_VOCAB:,}, not {size}")


class BPE(ByteLevel):
    """The vocabulary of a `tokenizer.json`. Any text can be encoded, and its ids decode to the same text.

    Special tokens in a user's text (`<|endoftext|>`) are text like any other. Ids without a token, as in a model whose
    vocabulary is padded, stand for no text. A stretch of more than 65,536 characters in which no word follows a blank
    is cut at that length: its ids then differ from those of an uncut text, its text does not.
    """

    name = "bpe"
    breaks = " "  # GPT-4's expression joins line breaks to what is before them

    def __init__(self, data: bytes, vocab_size: int | None = None) -> None:
        """`data` is the content of a tokenizer.json; `vocab_size` (default: the highest id + 1) may be larger.

        Raises DfError where it is not a byte-level byte-pair encoding that keeps every text as it is."""
        from tokenizers import Tokenizer

        tokens = _tokens(_checked(data))
        try:
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises nothing more specific
            raise DfError(f"the tokenizer.json cannot be read: {error}", _HINT) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text
        least = 1 + max(tokens)
        size = vocab_size or least
        if not least <= size <= MAX_VOCAB:
            raise DfError(f"a vocabulary of {size:,} ids does not fit a tokenizer.json of {least:,}", _HINT)
        super().__init__([tokens.get(i, b"") for i in range(size)], {FILE: data})
        self.end_of_text = self._tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, chunks: Iterable[str], vocab_size: int, *, lines: bool = False) -> BPE:
        """The encoding of `vocab_size` ids, the last of which ends a text, that merges the most frequent pairs of the
        text that comes in `chunks`; fewer ids where it holds fewer pairs that occur twice. With `lines` no token
        reaches over a line's end.

        Time and memory follow from the number of different words, not from the length of the text. Errors of the
        iterator pass through. Raises UsageError for a size that is out of range."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        check_vocab_size(vocab_size)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(GPT4_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(printable_to_byte()),
        )
        pieces = (piece for piece, _ in text_pieces(chunks, breaks=" "))
        if lines:
            pieces = (line for piece in pieces for line in piece.split("\n"))
        tokenizer.train_from_iterator(pieces, trainer)
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
        return cls(tokenizer.to_str().encode("utf-8"))

    @classmethod
    def open(cls, file: Path, vocab_size: int | None = None) -> BPE:
        """The encoding of a tokenizer.json. Raises DfError where it cannot be read or used."""
        return cls(read_vocabulary(file, MAX_FILE, _HINT), vocab_size)

    def _encode_pieces(self, pieces: Iterator[tuple[str, int]]) -> Iterator[np.ndarray]:
        while batch := list(islice(pieces, PIECES_AT_ONCE)):
            for text, start in batch:
                utf8(text, start)  # refuses lone surrogates, which tokenizers would not name
            found = self._tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            yield np.concatenate([np.array(encoding.ids, self.dtype) for encoding in found])

    def encode_lines(self, lines: list[str]) -> list[np.ndarray]:
        """Ids of each line, as if it were alone."""
        if sum(map(len, lines)) > PIECES_AT_ONCE * PIECE:
            return [self.encode(line) for line in lines]
        found = self._tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in found]

    def longest(self, count: int) -> list[str]:
        """The `count` longest tokens, the longest first; bytes that are not UTF-8 read as U+FFFD."""
        order = np.argsort(-self.byte_lengths, kind="stable")[:count]
        return [self._tokens[i].decode("utf-8", "replace") for i in order.tolist()]

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, description: dict[str, Any], folder: Path) -> BPE:
        hashes, vocab_size = field(description, "sha256", dict), field(description, "vocab_size", int)
        data = read_vocabulary(folder / FILE, MAX_FILE, _HINT)
        check_files({FILE: data}, hashes, folder)
        return cls(data, vocab_size)


_HINT = "use the tokenizer.json of a GPT-2-like model, or train one with `--codec bpe`"


def _checked(data: bytes) -> dict[str, Any]:
    """The file as an object. Raises DfError naming the part that would change a text, or cannot encode every text."""
    try:
        found = strict_json(data)
    except ValueError as error:
        raise DfError(f"the tokenizer.json cannot be read: {error}", _HINT) from None
    model, normalizer = found.get("model"), found.get("normalizer")
    steps = parts_of(found.get("pre_tokenizer"), "pretokenizers")
    names = [step.get("type") for step in steps]
    decoders = [step.get("type") for step in parts_of(found.get("decoder"), "decoders")]
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        refusal = "its model is not a byte-pair encoding (BPE)"
    elif normalizer is not None and parts_of(normalizer, "normalizers"):
        refusal = f"its normalizer ({normalizer.get('type')}) changes the text"
    elif names.count("ByteLevel") != 1 or set(names) - {"ByteLevel", "Split", "Digits"}:
        refusal = f"its pre_tokenizer ({', '.join(map(str, names)) or 'none'}) is not byte-level"
    elif any(step.get("behavior") == "Removed" for step in steps):
        refusal = "its pre_tokenizer leaves out a part of the text"
    elif any(step.get("add_prefix_space") for step in steps if step["type"] == "ByteLevel"):
        refusal = "its pre_tokenizer puts a blank before the text (add_prefix_space)"
    elif decoders != ["ByteLevel"]:
        refusal = "its decoder is not byte-level"
    elif model.get("dropout") or model.get("byte_fallback"):
        refusal = "its model has dropout or byte_fallback"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        refusal = "its model marks parts of words (continuing_subword_prefix, end_of_word_suffix)"
    elif not printable_to_byte().keys() <= model["vocab"].keys():
        refusal = "it lacks tokens for some of the 256 bytes"
    else:
        return found
    raise DfError(f"the tokenizer.json cannot be used: {refusal}", _HINT)


def parts_of(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a part of the file, which may be one or a sequence."""
    steps = part.get(key, []) if isinstance(part, dict) and part.get("type") == "Sequence" else [part] if part else []
    return [step if isinstance(step, dict) else {} for step in steps] if isinstance(steps, list) else []


def _tokens(description: dict[str, Any]) -> dict[int, bytes]:
    """The bytes of each id; none for special tokens. Raises DfError where ids or tokens are not what they can be."""
    to_byte = str.maketrans(printable_to_byte())
    added = description.get("added_tokens") or []
    try:
        found = {i: token for token, i in description["model"]["vocab"].items()}
        outside = {entry["id"]: entry for entry in added}
        if not all(type(i) is int and 0 <= i < MAX_VOCAB for i in (*found, *outside)):
            raise ValueError("ids must be whole numbers below 1,048,576")
        if len(found) < len(description["model"]["vocab"]):
            raise ValueError("two tokens have the same id")
        tokens = {i: token.translate(to_byte).encode("latin-1") for i, token in found.items() if i not in outside}
        if any(e[side] for e in outside.values() if not e.get("special") for side in ("lstrip", "rstrip")):
            raise ValueError("an added token takes the blanks beside it (lstrip, rstrip)")
        return tokens | {i: b"" if e.get("special") else e["content"].encode() for i, e in outside.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # UnicodeEncodeError is a ValueError
        raise DfError(f"the tokenizer.json cannot be used: {error}", _HINT) from None
