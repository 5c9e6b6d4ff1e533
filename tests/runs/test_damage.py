"""Whatever is changed in a run's files is seen, named, and gone round where that is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.errors import CorruptError, DfError
from dfcli.runs import Checkpoint, Run, list_runs, remove, tensors
from dfcli.system import files
from dfcli.system.events import Note
from tests.runs.small import make_run, same, save, weights

FILES = [
    "run.json",
    "step-00000001/state.json",
    "step-00000001/model.safetensors",
    "step-00000001/optimizer.safetensors",
]


def all_of(run: Run) -> Checkpoint:
    return run.load("last", optimizer=True)


def refused(path: Path) -> None:
    with pytest.raises(CorruptError) as error:
        all_of(Run.open("r"))
    assert str(path) in error.value.message
    assert error.value.hint


@contextmanager
def put(path: Path, place: int, byte: int) -> Iterator[None]:
    """Change one byte in place (rewriting a file makes some file systems wait for the disk)."""
    with open(path, "rb+", buffering=0) as file:
        good = path.read_bytes()[place : place + 1]
        for data in (bytes([byte]), good):
            file.seek(place)
            file.write(data)
            if data != good:
                yield


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_seen(name: str):
    run = make_run()
    save(run, 1)
    path = run.path / name
    good = path.read_bytes()
    randomly = random.Random(0)
    for place in sorted(randomly.sample(range(len(good)), min(150, len(good)))):
        with put(path, place, good[place] ^ 1 << randomly.randrange(8)):
            refused(path)
    assert Run.open("r").load("last", optimizer=True).step == 1


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_addition_is_seen(name: str):
    run = make_run()
    save(run, 1)
    path = run.path / name
    good = path.read_bytes()
    for part in range(16):
        path.write_bytes(good[: len(good) * part // 16])
        refused(path)
    for data in (good[:-1], good + b"\0", good + good, bytes(len(good)), b"\xff" * len(good)):
        path.write_bytes(data)
        refused(path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(name: str):
    run = make_run()
    save(run, 1)
    (run.path / name).unlink()
    with pytest.raises(CorruptError, match="is missing") as error:
        run.load("last", optimizer=True)
    assert str(run.path / name) in error.value.message


@pytest.mark.skipif(os.name == "nt", reason="needs FIFOs")
@pytest.mark.parametrize("name", [*FILES, "metrics.jsonl"])
def test_a_fifo_is_named_and_not_waited_for(name: str):
    run = make_run()
    save(run, 1)
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    events: list[object] = []
    assert [run.name for run in list_runs(events.append)] == ["r"] * (name != "run.json")
    assert len(events) == (name == "run.json")
    with pytest.raises(CorruptError, match="not a regular file") as error:
        Run.open("r").metrics() if name == "metrics.jsonl" else all_of(Run.open("r"))
    assert str(run.path / name) in error.value.message
    remove("r")
    assert not run.path.exists()


def test_without_the_optimizer_a_run_can_still_be_sampled():
    run = make_run()
    (save(run, 1) / "optimizer.safetensors").unlink()
    assert same(run.load().model, weights(1))


def test_files_of_another_checkpoint_are_seen():
    run = make_run()
    for step in (1, 2):
        save(run, step)
    for name in FILES[1:]:
        other = run.path / name.replace("1/", "2/")
        good = (run.path / name).read_bytes()
        (run.path / name).write_bytes(other.read_bytes())
        with pytest.raises(CorruptError, match=name.split("/")[1]):
            run.load(1, optimizer=True)
        (run.path / name).write_bytes(good)


@pytest.mark.parametrize(
    "changes",
    [{"step": 2}, {"files": {}}, {"files": []}, {"state": None}, {"files": {"model.safetensors": {"sha256": 1}}}],
)
def test_a_state_of_another_shape_is_refused(changes: dict[str, object]):
    run = make_run()
    path = save(run, 1) / "state.json"
    files.write_json(path, files.read_json(path) | changes)
    refused(path)


def test_a_newer_checkpoint_is_refused_and_not_passed_over():
    run = make_run()
    save(run, 1)
    path = save(run, 2) / "state.json"
    files.write_json(path, files.read_json(path) | {"format": 2})
    with pytest.raises(DfError, match="format 2") as error:
        run.load("last", fallback=True)
    assert not isinstance(error.value, CorruptError)


# Going round the damage


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("damage", [spoil, Path.unlink])
def test_the_previous_checkpoint_is_taken_and_that_is_said(name: str, which: str, damage: Callable[[Path], None]):
    run = make_run()
    for step in (1, 2):
        save(run, step, 1 / step)
    damage(run.path / "step-00000002" / name)
    with pytest.raises(CorruptError, match=name) as error:
        run.load(which, optimizer=True)
    assert error.value.hint == "`--checkpoint` of `df sample`, `df eval` and `df runs pack` chooses another (1)"
    with pytest.raises(CorruptError, match=name):
        run.load(2, optimizer=True, fallback=True)  # that one was asked for
    events: list[object] = []
    saved = run.load(which, optimizer=True, fallback=True, on_event=events.append)
    assert saved.step == 1
    assert same(saved.model, weights(1))
    assert len(events) == 1
    assert isinstance(events[0], Note)
    assert name in events[0].text
    assert "checkpoint 2 is passed over" in events[0].text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_told_and_gone_round(value: float):
    run = make_run()
    save(run, 1, 0.5)
    for name in ("tokens.weight", "norm.bias"):
        broken = weights(2)
        broken[name][1] = value
        run.save(2, broken, {"moment": torch.zeros(3)}, {"val_loss": 0.25})
        with pytest.raises(CorruptError, match=r"step-00000002.* not finite: its training diverged") as error:
            run.build()
        assert error.value.hint == "`--checkpoint` of `df sample`, `df eval` and `df runs pack` chooses another (1)"
        assert run.load("last", optimizer=True, fallback=True).step == 1


def test_a_damaged_state_is_not_silently_left_out_of_the_choice():
    run = make_run()
    save(run, 1, 1.0)
    save(run, 2, 2.0)
    spoil(run.path / "step-00000001" / "state.json")
    with pytest.raises(CorruptError, match="step-00000001"):
        run.load("best")
    assert run.load("last").step == 2


def test_when_all_are_damaged():
    run = make_run()
    for step in (1, 2):
        spoil(save(run, step) / "model.safetensors")
    events: list[object] = []
    with pytest.raises(CorruptError, match="no checkpoint of run `r`"):
        run.load("last", fallback=True, on_event=events.append)
    assert len(events) == 2


def test_damaged_checkpoints_do_not_count_among_those_kept():
    run = make_run()
    for step in (1, 2, 3):
        save(run, step, 1 / step)
    spoil(run.path / "step-00000003" / "state.json")
    save(run, 4, 1.0)
    assert run.steps() == [2, 4]


# Files made to harm


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Exploit:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


ATTACKS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\1\0\0",
    "no header": file_of(b"", b"1234"),
    "pickle": pickle.dumps(Exploit()) * 10,
    "zip": b"PK\3\4" + bytes(100),
    "huge header": file_of({}, b"", 2**63),
    "header beyond the file": file_of({}, b"", 100),
    "header beyond the cap": file_of(b"{}" + b" " * (tensors.MAX_HEADER_BYTES + 1)),
    "not JSON": file_of(b"nothing"),
    "not an object": file_of([]),
    "bad UTF-8": file_of(b'{"\xff": 1}'),
    "nested": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "duplicate keys": file_of(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "no object": file_of({"a": 1}),
    "missing dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "extra field": file_of({"a": entry() | {"code": "x"}}, bytes(4)),
    "unknown dtype": file_of({"a": entry("F33")}, bytes(4)),
    "dtype of a list": file_of({"a": entry(["F32"])}, bytes(4)),
    "negative shape": file_of({"a": entry(shape=[-1, -1])}, bytes(4)),
    "float shape": file_of({"a": entry(shape=[1.0])}, bytes(4)),
    "bool shape": file_of({"a": entry(shape=[True])}, bytes(4)),
    "huge shape": file_of({"a": entry(shape=[2**62, 2**62])}, bytes(4)),
    "overflowing shape": file_of({"a": entry(shape=[2**32, 2**32 + 1])}, bytes(4)),
    "hidden huge shape": file_of({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
    "many dimensions": file_of({"a": entry(shape=[1] * 1_000_000)}, bytes(4)),
    "offsets that do not fit": file_of({"a": entry(offsets=[0, 8])}, bytes(8)),
    "reversed offsets": file_of({"a": entry(offsets=[4, 0])}, bytes(4)),
    "three offsets": file_of({"a": entry(offsets=[0, 2, 4])}, bytes(4)),
    "beyond the end": file_of({"a": entry(offsets=[0, 4])}, bytes(3)),
    "left over": file_of({"a": entry(offsets=[0, 4])}, bytes(5)),
    "overlap": file_of({"a": entry(), "b": entry()}, bytes(4)),
    "hole": file_of({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
    "overlap and hole": file_of({"a": entry(), "b": entry(), "c": entry(offsets=[8, 12])}, bytes(12)),
    "begins late": file_of({"a": entry(offsets=[4, 8])}, bytes(8)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_file_with_a_right_checksum_is_refused(tmp_path: Path, attack: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(ATTACKS[attack])
    with pytest.raises(CorruptError, match=r"x\.safetensors is damaged"):
        tensors.read(path, hashlib.sha256(ATTACKS[attack]).hexdigest())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_change_of_a_header_is_refused_or_reads_as_something_sound(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.unlink(missing_ok=True)
    tensors.write(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int64), "c": torch.tensor(True)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        read = tensors.read(path, hashlib.sha256(raw).hexdigest())
    except CorruptError:
        return
    assert sum(tensor.nbytes for tensor in read.values()) < len(raw)


def test_names_are_no_paths_and_cannot_drive_a_terminal(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    name = "../../\x1b[2J"
    path.write_bytes(file_of({name: entry()}, bytes(4)))
    sha256 = files.sha256_file(path)
    assert list(tensors.read(path, sha256)) == [name]
    with pytest.raises(CorruptError) as error:
        tensors.read(path, sha256, {})
    assert "\x1b" not in error.value.message


@pytest.mark.parametrize("dtype", list(tensors.CODES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 2), (2, 3)])
def test_every_dtype_comes_back_and_the_library_agrees(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    library = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    content = {"a": (torch.randn(shape) * 5).to(dtype), "b": torch.ones(1, dtype=torch.uint8), "c": torch.eye(3)[::2].T}
    sha256 = tensors.write(tmp_path / "ours", content)
    assert sha256 == files.sha256_file(tmp_path / "ours")
    assert same(tensors.read(tmp_path / "ours", sha256), content)
    assert same(library.load_file(tmp_path / "ours"), content)
    library.save_file({name: tensor.contiguous() for name, tensor in content.items()}, tmp_path / "theirs")
    assert same(tensors.read(tmp_path / "theirs", files.sha256_file(tmp_path / "theirs")), content)


def test_the_bytes_are_those_of_the_format(tmp_path: Path):
    tensors.write(tmp_path / "x", {"a": torch.tensor([1.0]), "b": torch.tensor([2, 3])})
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[16,20]}}'
    )
    header += b" " * (-len(header) % 8)
    data = struct.pack("<qqf", 2, 3, 1.0)
    assert (tmp_path / "x").read_bytes() == struct.pack("<Q", len(header)) + header + data


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills a process that reads behind the end of a mapped file")
def test_why_the_files_are_not_read_by_the_library(tmp_path: Path):
    """Its tensors are the file: one that is cut off later, by a failing disk or a copy over it, kills the process. Here
    they are memory of their own. Its files are for their owner alone, whatever the umask says."""
    pytest.importorskip("safetensors")
    read = {
        "library": "from safetensors.torch import load_file; x = load_file(path)",
        "ours": "from dfcli.runs import tensors; x = tensors.read(path, sha256_file(path))",
    }
    ends = {}
    for name, line in read.items():
        path = tmp_path / name
        tensors.write(path, {"a": torch.ones(1_000_000)})
        code = (
            "import os; from pathlib import Path; from dfcli.system.files import sha256_file; "
            f"path = Path({str(path)!r}); {line}; os.truncate(path, 5000); assert x['a'].sum() == 1_000_000"
        )
        ends[name] = subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert ends == {"library": -signal.SIGBUS, "ours": 0}
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "theirs")
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o600


def test_nothing_that_was_read_aliases_the_file(tmp_path: Path):
    sha256 = tensors.write(tmp_path / "x", {"a": torch.ones(1000)})
    read = tensors.read(tmp_path / "x", sha256)
    (tmp_path / "x").write_bytes(bytes(5000))
    assert torch.equal(read["a"], torch.ones(1000))


def test_a_disk_that_gives_less_than_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sha256 = tensors.write(tmp_path / "x", {"a": torch.ones(1000)})
    real = tensors._read_header

    def then_cut(file, path, digest):
        kinds = real(file, path, digest)
        (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-100])
        return kinds

    monkeypatch.setattr(tensors, "_read_header", then_cut)
    with pytest.raises(CorruptError, match=r"cut off|checksum"):
        tensors.read(tmp_path / "x", sha256)
