from __future__ import annotations

import json
import math
import os
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.cli import figures, output
from dfcli.system.events import Choice, Note, Progress

HOSTILE = "a\x1b[2Jb\x07c\x9b31md\u202ee\u2066f\x7fg\rh\ud800i\u2028j"


def test_printable_makes_controls_visible_and_keeps_lines_and_tabs():
    assert output.printable(HOSTILE) == ("a\\x1b[2Jb\\x07c\\x9b31md\\u202ee\\u2066f\\x7fg\\x0dh\\ud800i\\u2028j")
    assert output.printable("ä\t日本\n🎵") == "ä\t日本\n🎵"
    assert output.one_line("a\nb\tc") == "a\\x0ab\\x09c"


@given(st.text(st.characters()), st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_printable_has_no_controls_left_and_works_in_pieces(text: str, cut: int):
    shown = output.printable(text)
    assert shown == output.printable(text[:cut]) + output.printable(text[cut:])
    assert all(c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) for c in shown)
    shown.encode()  # no half of a surrogate pair is left


def test_json_is_one_ascii_object_without_nan(capsys: pytest.CaptureFixture[str]):
    output.write_json({"text": HOSTILE, "loss": math.nan, "more": [math.inf, {"x": -math.inf}], "pair": (1, 2.5)})
    text = capsys.readouterr().out
    assert text.isascii()
    assert "\x1b" not in text
    assert json.loads(text) == {"text": HOSTILE, "loss": None, "more": [None, {"x": None}], "pair": [1, 2.5]}


def test_errors_are_a_sentence_and_a_hint(capsys: pytest.CaptureFixture[str]):
    output.error("no file `a\x1bb\nc`", "type [bold]this[/bold]\nor that")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: no file `a\\x1bb\\x0ac`\n\nhint: type [bold]this[/bold]\nor that\n"


def test_tables_are_aligned_whole_and_inert(capsys: pytest.CaptureFixture[str]):
    output.table(("NAME", "SIZE"), [("x" * 200, "1"), ("[red]\x1b", "12345")], right=("SIZE",))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1] == "x" * 200 + "      1"
    assert lines[2].startswith("[red]\\x1b ")
    assert lines[2].endswith("  12345")
    assert all(line == line.rstrip() for line in lines)


def test_pairs_are_aligned(capsys: pytest.CaptureFixture[str]):
    output.pairs([("a", 1), ("long", "two\nlines" + "x" * 300)])
    assert capsys.readouterr().out == "a     1\nlong  two\\x0alines" + "x" * 300 + "\n"


@pytest.mark.parametrize(
    ("n", "shown"),
    [(0, "0"), (950, "950"), (999.7, "1k"), (803_456, "803k"), (12_345_678, "12.3M"), (999_600, "1M"), (98e9, "98G")],
)
def test_short_figures(n: float, shown: str):
    assert figures.short(n) == shown


@pytest.mark.parametrize(
    ("n", "shown"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (2_000_000, "2.0 MB"), (25e9, "25.0 GB")]
)
def test_sizes(n: float, shown: str):
    assert figures.size(n) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (83.4, "1:23"), (3599.6, "1:00:00"), (5025, "1:23:45")])
def test_durations(seconds: float, shown: str):
    assert figures.duration(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (59, "59 s"), (83, "1 min"), (7300, "2 h"), (90_000, "1 day"), (200_000, "2 days")],
)
def test_ages(seconds: float, shown: str):
    assert figures.age(seconds) == shown


def test_sparkline():
    assert figures.sparkline([]) == ""
    assert figures.sparkline([math.nan]) == ""
    assert figures.sparkline([1, 1]) == "▁▁"
    assert figures.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert figures.sparkline([3, 0], unicode=False) == "@_"
    assert figures.sparkline([4, 4, 0, 0, 2, 2], width=3) == "█▁▅"  # the means of equal parts
    assert len(figures.sparkline(list(range(1000)), width=17)) == 17


def test_course_keeps_the_shape_of_a_long_run_in_little_memory():
    course = figures.Course(limit=64)
    for i in range(10_000):
        course.add(float(i))
    assert 32 <= len(course.values) <= 64
    assert course.values == sorted(course.values)
    assert course.values[0] < 200
    assert course.values[-1] > 9_700


def test_progress_in_a_log_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with output.Listener() as listener:
        listener(Progress("reading\x1b", 1_000_000, 10_000_000, "bytes"))
        assert capsys.readouterr().err == ""  # not yet
        later = time.monotonic() + output.LINE_SECONDS + 1
        monkeypatch.setattr(output.time, "monotonic", lambda: later)
        listener(Progress("reading\x1b", 5_000_000, 10_000_000, "bytes"))
        listener(Progress("reading\x1b", 6_000_000, 10_000_000, "bytes"))  # the next is not due
        listener(Note("a note\x1b"))
        listener(Choice("codec", "chars", "the default"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading\\x1b: 5.0 MB / 10.0 MB")
    assert lines[1] == "a note\\x1b"
    assert lines[2].split() == ["codec", "chars", "the", "default"]
    assert len(lines) == 3


def test_the_rate_of_each_piece_of_work_is_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.Listener() as listener:
        for _ in range(3):  # two minutes apart, ten seconds each
            for done in (0, 500, 1000):
                listener(Progress("evaluation", done, 1000, "tokens"))
                now += 10
            now += 120
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "500 / 1,000" in line] == ["evaluation: 500 / 1,000 tokens  50/s  0:10 left"] * 3


def test_a_quiet_listener_says_nothing(capsys: pytest.CaptureFixture[str]):
    with output.Listener(quiet=True) as listener:
        for event in (Note("a"), Choice("b", "c", "d"), Progress("e", 1, 2, "f")):
            listener(event)
        listener.bar("g", 1, 2, "h")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_is_a_bar_that_goes_away():
    pexpect = pytest.importorskip("pexpect")
    pyte = pytest.importorskip("pyte")
    code = (
        "import time; from dfcli.cli import output; from dfcli.system.events import Note, Progress\n"
        "with output.Listener() as listener:\n"
        "    for i in range(20): listener(Progress('reading', i, 40, 'files')); time.sleep(0.05)\n"
        "    listener(Note('half of it')); time.sleep(0.3)\n"
        "print('end')"
    )
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    child = pexpect.spawn(sys.executable, ["-c", code], dimensions=(10, 80), env=environment, timeout=30)
    screen = pyte.Screen(80, 10)
    stream = pyte.ByteStream(screen)
    stream.feed(child.read_nonblocking(100_000, 10))
    while not any("19 / 40 files" in line for line in screen.display):
        stream.feed(child.read_nonblocking(100_000, 10))
    assert screen.cursor.hidden
    stream.feed(child.read())
    assert [line.rstrip() for line in screen.display if line.strip()] == ["half of it", "end"]
    assert not screen.cursor.hidden
