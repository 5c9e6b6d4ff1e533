"""Byte-pair encodings in tokenizer.json, judged by Hugging Face's libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from tokenizers import Tokenizer

from dfcli.codecs import BPE, bytelevel, codec_from_json
from dfcli.codecs.bpe import default_vocab_size
from dfcli.errors import CorruptError, DfError, UsageError
from tests.codecs.test_text import TEXTS, check_text_codec

CORPUS = "def add(a, b):\n    return a + b\n\n\nfor i in range(100):\n    print('the sum is', add(i, 123))\n" * 20
REAL = CORPUS[:300] + "  Don't  stop\n\n\tnaïve 😀👩‍👩‍👧 日本語\r\n  end 12345 <|endoftext|> \n"


@pytest.fixture(scope="module")
def codec() -> BPE:
    return BPE.train([CORPUS[:700], CORPUS[700:]], 300)


@settings(max_examples=80, deadline=None)
@given(TEXTS)
@example("<|endoftext|>")
@example(REAL)
def test_any_text_comes_back(codec: BPE, text: str) -> None:
    check_text_codec(codec, text)


def test_the_file_opens_unchanged_elsewhere_and_gives_the_same_ids(codec: BPE, tmp_path: Path) -> None:
    codec.save_files(tmp_path)
    from transformers import PreTrainedTokenizerFast

    text = REAL.replace("<|endoftext|>", "")
    ids = codec.encode(text).tolist()
    elsewhere = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert elsewhere.encode(text).ids == ids
    assert elsewhere.decode(ids) == text
    assert PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).encode(text) == ids
    assert elsewhere.get_vocab_size() == codec.vocab_size == 300
    assert elsewhere.token_to_id("<|endoftext|>") == codec.end_of_text == 299
    assert len(ids) < 0.6 * len(text.encode())


def test_lengths_and_longest_tokens(codec: BPE) -> None:
    ids = codec.encode(CORPUS)
    assert codec.byte_lengths[ids].sum() == codec.character_lengths[ids].sum() == len(CORPUS)
    assert codec.longest(3) == sorted(codec.longest(500), key=lambda token: -len(token.encode()))[:3]
    assert len(codec.longest(1)[0]) >= 4
    assert codec.id_of_newline == codec.encode("\n")[0]


def test_long_texts_are_cut_where_words_begin(codec: BPE, monkeypatch: pytest.MonkeyPatch) -> None:
    text = REAL.replace("\r", "") * 3 + " .\n\n  ( x)  \n 1234 \n"
    whole = codec.encode(text).tolist()
    monkeypatch.setattr(bytelevel, "PIECE", 120)
    assert codec.encode(text).tolist() == whole


def test_json_and_file_rebuild_the_codec(codec: BPE, tmp_path: Path) -> None:
    padded = BPE(codec.files["tokenizer.json"], 384)  # a model with more rows than tokens
    padded.save_files(tmp_path)
    again = codec_from_json(padded.to_json(), tmp_path)
    assert (again.vocab_size, again.to_json()) == (384, padded.to_json())
    assert padded.decode([383, *codec.encode("a b"), 350]) == "a b"
    (tmp_path / "tokenizer.json").write_bytes(codec.files["tokenizer.json"] + b" ")
    with pytest.raises(CorruptError, match="not the vocabulary that was used"):
        codec_from_json(padded.to_json(), tmp_path)
    with pytest.raises(DfError, match="does not fit"):
        BPE(codec.files["tokenizer.json"], 299)


def test_sizes(tmp_path: Path) -> None:
    assert [default_vocab_size(n) for n in (0, 10**5, 10**6, 10**7, 10**8, 10**9, 10**12)] == [
        512, 512, 1024, 2048, 8192, 16384, 32768,
    ]  # fmt: skip
    assert BPE.train(["abc"], 257).vocab_size == 257
    with pytest.raises(UsageError, match="--vocab-size must be from 257"):
        BPE.train(["abc"], 256)

    def broken():
        yield "abc"
        raise DfError("the text ends here")

    with pytest.raises(DfError, match="ends here"):
        BPE.train(broken(), 300)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": {"type": "Unigram", "vocab": []}}, "its model is not a byte-pair encoding"),
    "a normalizer": ({"normalizer": {"type": "NFC"}}, r"its normalizer \(NFC\) changes the text"),
    "no bytes": ({"pre_tokenizer": {"type": "Whitespace"}}, r"its pre_tokenizer \(Whitespace\) is not byte-level"),
    "a blank before": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        "add_prefix_space",
    ),
    "another decoder": ({"decoder": {"type": "Fuse"}}, "its decoder is not byte-level"),
    "nonsense": ({"pre_tokenizer": [1]}, r"its pre_tokenizer \(None\) is not byte-level"),
    "negative ids": ({"added_tokens": [{"id": -1, "content": "x", "special": False}]}, "ids must be whole numbers"),
    "huge ids": ({"added_tokens": [{"id": 10**12, "content": "x", "special": False}]}, "ids must be whole numbers"),
    "unknown parts": ({"post_processor": {"type": "no such"}}, "cannot be read"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_would_change_a_text_is_refused_by_name(codec: BPE, change: tuple[dict[str, Any], str]) -> None:
    values, message = change
    with pytest.raises(DfError, match=message):
        BPE(json.dumps(json.loads(codec.files["tokenizer.json"]) | values).encode())


def test_files_that_are_none(tmp_path: Path) -> None:
    for data in (b"", b"\x80", b"[]", b"{}", b'{"model": {"vocab": {"a": 0}}}'):
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(DfError, match=r"tokenizer\.json can"):
            BPE.open(tmp_path / "tokenizer.json")
    with pytest.raises(DfError, match="could not read"):
        BPE.open(tmp_path / "none.json")
