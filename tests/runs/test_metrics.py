from __future__ import annotations

import errno
import json
import math
import os
import zlib
from pathlib import Path

import pytest

from dfcli.errors import CorruptError, DfError
from dfcli.runs import metrics
from tests.faults import dies, failing, until_it_passes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def rows(count: int) -> list[dict]:
    return [{"step": step, "train_loss": 1 / step} for step in range(1, count + 1)]


def write(path: Path, count: int) -> None:
    for row in rows(count):
        metrics.append(path, row)


def test_lines_come_back(path: Path):
    write(path, 3)
    assert metrics.read(path) == rows(3)
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"format": 2}
    assert len(lines) == 4
    for line, row in zip(lines[1:], rows(3), strict=True):  # plain JSON whose last key is of all bytes before it
        body, _, crc = line.rpartition(', "crc": ')
        assert json.loads(line) == row | {"crc": f"{zlib.crc32(body.encode()):08x}"}
        assert json.loads(body + "}") == row
        assert crc.endswith('"}')


def test_each_line_is_one_write_and_seen_at_once(path: Path):
    write(path, 1)
    with failing(0) as faults:
        metrics.append(path, {"step": 2})
    assert [call.split()[0] for call in faults.calls] == ["open", "write"]
    assert len(metrics.read(path)) == 2


def test_what_json_lacks_becomes_null(path: Path):
    metrics.append(path, {"step": 1, "train_loss": math.nan, "lr": -math.inf})
    assert metrics.read(path) == [{"step": 1, "train_loss": None, "lr": None}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "tr', b"{", b"\0\0\0\0", b'{"step": 3}', "ü".encode()[:1]])
def test_a_torn_last_line_is_passed_over_and_then_cut_off(path: Path, torn: bytes):
    write(path, 2)
    good = path.read_bytes()
    path.write_bytes(good + torn)
    assert metrics.read(path) == rows(2)
    metrics.append(path, rows(3)[2])
    assert metrics.read(path) == rows(3)
    assert path.read_bytes().startswith(good)


def test_every_cut_leaves_the_whole_lines(path: Path):
    write(path, 3)
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        whole = max(0, good[:size].count(b"\n") - 1)
        assert metrics.read(path) == rows(3)[:whole]
        metrics.append(path, {"step": 9})
        assert metrics.read(path) == [*rows(3)[:whole], {"step": 9}]


@pytest.mark.parametrize("bad", [b"garbage\n", b"\n", b"[1]\n", b'{"a": 1, "a": 2}\n', b'{"step": "x"}\n', b"\xff\n"])
def test_a_damaged_line_is_named(path: Path, bad: bytes):
    write(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], bad, *lines[2:]]))
    with pytest.raises(CorruptError, match=r"line 3 of .*metrics\.jsonl"):
        metrics.read(path)


def test_every_changed_bit_is_seen(path: Path):
    write(path, 3)
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises(DfError, match=r"metrics\.jsonl"):
                metrics.read(path)


def test_a_line_without_its_checksum_is_damaged(path: Path):
    write(path, 1)
    with open(path, "ab") as file:
        file.write(b'{"step": 2}\n')
    with pytest.raises(CorruptError, match=r"line 3 of .*metrics\.jsonl is damaged: its checksum"):
        metrics.read(path)


OLD = b'{"format": 1}\n{"step": 1, "train_loss": 1.0}\n{"step": 2, "train_loss": 0.5}\n'


def test_a_history_without_checksums_is_read_gone_on_with_and_truncated(path: Path):
    path.write_bytes(OLD)
    assert metrics.read(path) == rows(2)
    metrics.append(path, rows(3)[2])
    assert metrics.read(path) == rows(3)
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 4'))
    with pytest.raises(CorruptError, match="line 4"):  # what it was gone on with has one
        metrics.read(path)
    path.write_bytes(OLD)
    metrics.truncate(path, 1)
    metrics.append(path, rows(2)[1])
    assert metrics.read(path) == rows(2)
    assert path.read_bytes().startswith(b'{"format": 2}\n')


def test_a_carriage_return_hides_nothing(path: Path):
    write(path, 3)
    path.write_bytes(path.read_bytes().replace(b"}\n", b"}\r", 2))
    with pytest.raises(CorruptError, match="line 1"):
        metrics.read(path)


def test_a_huge_file_is_not_read(path: Path):
    write(path, 1)
    os.truncate(path, metrics.MAX_BYTES + 1)
    with pytest.raises(CorruptError, match="larger than any"):
        metrics.read(path)


def test_a_newer_format_is_refused(path: Path):
    path.write_bytes(b'{"format": 3}\n')
    with pytest.raises(DfError, match="format 3"):
        metrics.read(path)


def test_truncation(path: Path):
    write(path, 3)
    whole = path.read_bytes()
    metrics.truncate(path, 3)
    assert path.read_bytes() == whole
    metrics.truncate(path, 1)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    metrics.append(path, rows(2)[1])
    assert metrics.read(path) == rows(2)
    metrics.truncate(path, 0)
    assert metrics.read(path) == []


def test_what_is_set_aside_is_kept_however_often(path: Path):
    for number, damaged in enumerate((b"garbage\n", b"worse\n"), start=1):
        path.write_bytes(damaged)
        aside = metrics.set_aside(path)
        assert aside == path.with_name(f"metrics.damaged-{number}.jsonl")
        assert aside.read_bytes() == damaged
        assert metrics.read(path) == []
    path.unlink()
    assert metrics.set_aside(path) is None
    assert metrics.read(path) == []


def test_lines_without_a_step_stay(path: Path):
    metrics.append(path, {"note": "resumed"})
    write(path, 2)
    metrics.truncate(path, 1)
    assert metrics.read(path) == [{"note": "resumed"}, *rows(1)]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("torn", [b"", b'{"st'])
def test_every_call_can_fail(path: Path, error: int, torn: bytes):
    for action, new in (
        (lambda: metrics.append(path, rows(3)[2]), rows(3)),
        (lambda: metrics.truncate(path, 1), rows(1)),
    ):

        def attempt(n: int, action=action, new=new) -> bool:
            path.unlink(missing_ok=True)
            write(path, 2)
            with open(path, "ab") as file:
                file.write(torn)
            raised = None
            with failing(n, error) as faults:
                try:
                    action()
                except DfError as caught:
                    raised = caught
            if raised is None:
                assert metrics.read(path) == new
            else:
                assert f"{path}: {os.strerror(error)}" in raised.message
                assert metrics.read(path) in (rows(2), new)
                action()
                assert metrics.read(path) in (new, [*new, new[-1]])  # an append that was only not closed well
            assert os.listdir(path.parent) == [path.name]
            return faults.fired

        assert until_it_passes(attempt) >= 2


def test_the_process_can_die_at_every_call(path: Path):
    def attempt(n: int) -> bool:
        path.unlink(missing_ok=True)
        write(path, 2)
        died = dies(n, lambda: metrics.append(path, rows(3)[2]))
        assert metrics.read(path) == (rows(2) if died else rows(3))
        metrics.append(path, {"step": 9})
        assert metrics.read(path)[-1] == {"step": 9}
        return died

    assert until_it_passes(attempt) == 2
