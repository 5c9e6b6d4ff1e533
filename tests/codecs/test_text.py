from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.codecs import Bytes, Chars, Codec, TextCodec, codec_from_json
from dfcli.errors import CorruptError, DfError

few = settings(max_examples=50, deadline=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def check_text_codec(codec: TextCodec, text: str) -> None:
    """What every text codec promises, for one text that it can encode."""
    ids = codec.encode(text)
    assert ids.dtype == codec.dtype
    assert ids.flags.writeable  # torch.from_numpy warns otherwise
    assert codec.decode(ids) == text
    assert codec.decode(ids.tolist()) == text
    assert codec.byte_lengths[ids].sum() == len(text.encode())
    assert codec.character_lengths[ids].sum() == len(text)
    assert codec.byte_lengths.shape == codec.character_lengths.shape == (codec.vocab_size,)
    decoder = codec.decoder()
    parts = [decoder.feed(i) for i in ids.tolist()]
    assert "".join(parts) + decoder.finish() == text
    cuts = [text[i : i + 7] for i in range(0, len(text), 7)]
    assert np.concatenate([np.empty(0, codec.dtype), *codec.encode_stream(cuts)]).tolist() == ids.tolist()


@few
@given(TEXTS.filter(bool), st.data())
def test_chars_round_trip(alphabet: str, data: st.DataObject) -> None:
    codec = Chars(alphabet)
    check_text_codec(codec, data.draw(st.text(st.sampled_from(codec.alphabet), max_size=300)))
    assert codec.encode(codec.alphabet).tolist() == list(range(codec.vocab_size))


@few
@given(TEXTS)
def test_bytes_round_trip(text: str) -> None:
    check_text_codec(Bytes(), text)
    assert Bytes().encode(text).tobytes() == text.encode()


@few
@given(st.binary(max_size=100))
def test_bytes_that_are_not_utf8_decode_alike_at_once_and_one_by_one(raw: bytes) -> None:
    codec = Bytes()
    decoder = codec.decoder()
    assert (
        "".join(map(decoder.feed, raw)) + decoder.finish() == codec.decode(list(raw)) == raw.decode("utf-8", "replace")
    )


def test_a_stream_holds_back_an_unfinished_character() -> None:
    decoder = Bytes().decoder()
    assert [decoder.feed(b) for b in "a€b".encode()] == ["a", "", "", "€", "b"]
    decoder.feed("é".encode()[0])
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize(("size", "dtype"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_are_as_small_as_the_alphabet_allows(size: int, dtype: str) -> None:
    points = [p for p in range(70_000) if not 0xD800 <= p < 0xE000][:size]
    codec = Chars("".join(map(chr, points)))
    assert codec.dtype == np.dtype(dtype)
    check_text_codec(codec, codec.alphabet[-100:] + codec.alphabet[:100])


@pytest.mark.parametrize("stranger", ["ß", "😀", "B", "\x00", "\ud800", "\U0010ffff"])
@pytest.mark.parametrize("place", [0, 5, 70_000])
def test_a_character_the_alphabet_lacks_is_named(stranger: str, place: int) -> None:
    with pytest.raises(DfError, match=f"U\\+{ord(stranger):04X}.*position {place + 3}$") as caught:
        Chars("abcC\n").encode("a" * place + stranger + "ab", start=3)
    assert "'" in caught.value.message
    assert "5 characters: \\nCabc" in caught.value.hint


def test_a_stream_names_places_in_the_whole_text() -> None:
    with pytest.raises(DfError, match=r"position 7$"):
        list(Chars("ab").encode_stream(["aaa", "bbb", "ac"]))


def test_a_lone_surrogate_is_an_error() -> None:
    with pytest.raises(DfError, match=r"U\+DC80 at position 12"):
        Bytes().encode("ab\udc80", start=10)
    with pytest.raises(DfError, match=r"U\+D800"):
        Chars("a\ud800")


def test_an_empty_alphabet_is_an_error() -> None:
    with pytest.raises(DfError, match="at least one character"):
        Chars("")


def test_newline() -> None:
    assert Chars("ba\n").id_of_newline == 0
    assert Chars("ba\t\n").id_of_newline == 1
    assert Chars("ba").id_of_newline is None
    assert Bytes().id_of_newline == 10
    assert Bytes().end_of_text is None


@pytest.mark.parametrize("codec", [Chars("ab"), Bytes()])
@pytest.mark.parametrize("ids", [[-1], [256], [0.5], [[0]]])
def test_ids_outside_the_vocabulary_are_refused(codec: TextCodec, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids must"):
        codec.decode(ids)


@pytest.mark.parametrize("codec", [Chars("aé\n😀"), Bytes()])
def test_json_rebuilds_the_codec(codec: Codec, tmp_path) -> None:
    codec.save_files(tmp_path)
    again = codec_from_json(codec.to_json(), tmp_path)
    assert again.to_json() == codec.to_json()
    assert (again.name, again.kind, again.vocab_size, again.dtype) == (
        codec.name,
        "text",
        codec.vocab_size,
        codec.dtype,
    )


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"name": 3},
        {"name": "klingon"},
        {"name": "chars"},
        {"name": "chars", "alphabet": ""},
        {"name": "chars", "alphabet": "ba"},
        {"name": "chars", "alphabet": "aa"},
        {"name": "chars", "alphabet": ["a"]},
        {"name": "gpt2"},
        {"name": "mulaw"},
        {"name": "mulaw", "sample_rate": True, "quantizer": "s4"},
        {"name": "mulaw", "sample_rate": 8000, "quantizer": "\x1b[2J"},
        {"name": "mulaw", "sample_rate": 1, "quantizer": "s4"},
    ],
)
def test_a_malformed_description_is_refused(description: dict, tmp_path) -> None:
    with pytest.raises(CorruptError) as caught:
        codec_from_json(description, tmp_path)
    assert caught.value.message.isprintable()
