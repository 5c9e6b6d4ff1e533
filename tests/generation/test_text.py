"""Texts end where they should, and nothing uncertain is shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.codecs import Bytes, Chars
from dfcli.generation.text import StopText, TextClip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_stop_text(pieces: list[str], stop: str) -> None:
    whole, out, filter_ = "".join(pieces), "", StopText(stop)
    for piece in pieces:
        out += filter_.feed(piece)
        assert stop not in out
        if filter_.found:
            break
        assert len(whole) - len(out) >= 0
    out += filter_.finish()
    assert filter_.found == (stop in whole)
    assert out == whole.split(stop)[0]


def test_only_what_may_be_the_stop_text_is_held_back() -> None:
    stop = StopText("\n\nQ:")
    assert [stop.feed(c) for c in "ab\nc\n\nQ.\n\nQ:x"] == [
        "a", "b", "", "\nc", "", "", "", "\n\nQ.", "", "", "", "", "",
    ]  # fmt: skip
    assert stop.found
    assert StopText(None).feed("any") == "any"


def clip(pieces: list[str], prompt: str = "", end: int | None = None, stop: str | None = None) -> TextClip:
    return TextClip(0, Chars("\nabc"), prompt, end, stop, lambda number, piece: pieces.append(piece))


def test_pieces_are_told_as_they_come() -> None:
    pieces: list[str] = []
    made = clip(pieces, "ab")
    assert pieces == ["ab"]
    assert made.feed([1, 0, 3]) == 3
    assert not made.done
    assert made.finish() == "aba\nc" == "".join(pieces)
    assert made.finish() == "aba\nc"


def test_a_line_ends_at_its_boundary() -> None:
    made = clip([], "b", end=0)
    assert made.feed([1, 2, 0, 3, 3]) == 3  # the boundary was made too
    assert made.done
    assert made.feed([1]) == 0
    assert made.finish() == "bab"


def test_a_text_ends_before_the_stop_text() -> None:
    pieces: list[str] = []
    made = clip(pieces, "a", stop="aa")  # not found across the prompt's end
    assert made.feed([1, 2, 1, 1, 3]) == 4
    assert made.done
    assert made.finish() == "aab" == "".join(pieces)


@pytest.mark.parametrize("stop", [None, "x"])
def test_half_a_character_at_the_end(stop: str | None) -> None:
    made = TextClip(0, Bytes(), "", None, stop, lambda number, piece: None)
    made.feed(list("aä".encode())[:-1])
    assert made.finish() == "a\N{REPLACEMENT CHARACTER}"
