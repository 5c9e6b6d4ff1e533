from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dfcli.codecs import GPT2, bytelevel, codec_from_json, gpt2
from dfcli.codecs.bytelevel import printable_to_byte
from dfcli.errors import CorruptError, DfError
from tests.codecs.test_text import TEXTS, check_text_codec
from tests.shared import shared_file

few = settings(max_examples=50, deadline=None)
NASTY = [
    "<|endoftext|>",
    " \n\n  x",
    "don't  we'LL",
    "日本語。テスト",
    "a\r\n b",
    "\x85\x1c\u3000 z",
    "e\u0301",
    "١٢٣ 45",
]


def write_vocabulary(folder: Path, merges: list[tuple[str, str]]) -> Path:
    """A miniature of GPT-2's files: the bytes in its order, then `merges`, then the end of text."""
    folder.mkdir(exist_ok=True)
    pieces = [*printable_to_byte(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell"), ("Ċ", "Ċ"), ("Ã", "©"), ("Ġ", "Ġ")]
    return GPT2(write_vocabulary(tmp_path_factory.mktemp("bpe"), merges))


@pytest.fixture(scope="module")
def published() -> GPT2:
    return GPT2(shared_file("gpt2-bpe"))


def test_merges_in_order(small: GPT2) -> None:
    assert small.vocab_size == 256 + 7 + 1
    assert small.encode("hello hello").tolist() == [258, small.encode("o")[0], 259, small.encode("o")[0]]
    assert [small.decode([i]) for i in small.encode("é\n\n  h")] == ["é", "\n\n", " ", " ", "h"]
    assert small.id_of_newline == small.encode("\n")[0]
    assert small.end_of_text == 263


@few
@given(TEXTS)
@example("<|endoftext|>")
def test_round_trip(small: GPT2, text: str) -> None:
    check_text_codec(small, text)


def test_the_end_of_text_stands_for_no_text(small: GPT2) -> None:
    assert small.decode([263, 258, 263]) == "hell"
    assert small.byte_lengths[263] == small.character_lengths[263] == 0
    assert 263 not in small.encode("a<|endoftext|>b")


@pytest.mark.parametrize("text", [" " * 700_000 + "x", "\n" * 300_000, "a" * 300_000, "." * 200_000, "é " * 200_000])
def test_long_runs_neither_panic_nor_take_long(small: GPT2, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_lone_surrogates_are_refused_and_placed(small: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytelevel, "PIECE", 4)
    with pytest.raises(DfError, match=r"U\+DCFF at position 120 "):
        small.encode("ab cd ef " * 2 + "g \udcff", start=100)


def test_json_and_files_rebuild_the_codec(small: GPT2, tmp_path: Path) -> None:
    small.save_files(tmp_path)
    again = codec_from_json(small.to_json(), tmp_path)
    assert again.to_json() == small.to_json()
    assert again.vocab_size == small.vocab_size
    write_vocabulary(tmp_path, [("a", "b")])
    with pytest.raises(CorruptError, match=r"encoder\.json is not the vocabulary that was used"):
        codec_from_json(small.to_json(), tmp_path)
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(DfError, match=r"could not read.*vocab\.bpe") as caught:
        codec_from_json(small.to_json(), tmp_path)
    assert "df data get gpt2-bpe" in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="needs FIFOs")
def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "encoder.json")
    with pytest.raises(DfError, match=r"could not read.*encoder\.json: not a regular file"):
        GPT2(tmp_path)


ENCODERS = [
    "",
    "[]",
    "{}",
    "null",
    '{"a": 0}',
    '{"a": "b"}',
    "[" * 100_000,
    '{"\\ud800": 0}',
    "\xff",
    '{"<|endoftext|>": 0}',
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=range(len(ENCODERS)))
def test_other_json_is_refused(encoder: str, tmp_path: Path) -> None:
    write_vocabulary(tmp_path, [])
    (tmp_path / "encoder.json").write_bytes(encoder.encode("latin-1"))
    with pytest.raises(CorruptError, match="does not hold GPT-2's"):
        GPT2(tmp_path)


@pytest.mark.parametrize("merges", [b"", b"a b\nb c\n", b"b a\n", b"a\n", b"\xff \xff\n", "\u1234 a\n".encode()])
def test_merges_that_disagree_with_the_ids_are_refused(merges: bytes, tmp_path: Path) -> None:
    write_vocabulary(tmp_path, [("a", "b")])
    (tmp_path / "vocab.bpe").write_bytes(merges)
    with pytest.raises(CorruptError, match="does not hold GPT-2's"):
        GPT2(tmp_path)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, [])
    with (tmp_path / "encoder.json").open("wb") as file:
        file.truncate(gpt2.MAX_FILE + 1)
    with pytest.raises(DfError, match="too large"):
        GPT2(tmp_path)


def test_the_published_vocabulary(published: GPT2) -> None:
    assert (published.vocab_size, published.end_of_text, published.id_of_newline) == (50_257, 50_256, 198)
    assert published.dtype == np.uint16
    assert published.encode("hello world").tolist() == [31373, 995]
    assert published.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


@few
@given(text=st.lists(st.one_of(st.sampled_from(NASTY), TEXTS), max_size=6).map("".join))
def test_published_round_trip(published: GPT2, text: str) -> None:
    check_text_codec(published, text)


def test_cuts_change_no_id(published: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    words = [*NASTY, " ", "  ", "\n", "\n\n", "\t", "the", "of", "12", "...", "'s", "\x1c", "\u2028", "\xa0"]
    texts = ["".join(rng.choices(words, k=1000)) for _ in range(20)]
    whole = [published.encode(text).tolist() for text in texts]
    monkeypatch.setattr(bytelevel, "PIECE", 120)
    monkeypatch.setattr(gpt2, "PIECES_AT_ONCE", 3)
    for text, ids in zip(texts, whole, strict=True):
        assert len(list(bytelevel.text_pieces([text]))) > 10
        assert published.encode(text).tolist() == ids
        cuts = [text[i : i + 11] for i in range(0, len(text), 11)]
        assert np.concatenate(list(published.encode_stream(cuts))).tolist() == ids


def test_equal_to_transformers(published: GPT2) -> None:
    from transformers import GPT2Tokenizer

    folder = shared_file("gpt2-bpe")
    theirs = GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    text = shared_file("tinyshakespeare.txt").read_text("utf-8")[:100_000]
    rng = random.Random(0)
    strange = ["".join(rng.choices([*NASTY[1:], " ", "the", "\n"], k=50)) for _ in range(20)]
    for sample in [text, *strange]:
        assert published.encode(sample).tolist() == theirs.encode(sample, add_special_tokens=False)
