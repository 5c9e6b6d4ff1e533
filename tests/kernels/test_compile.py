"""Compiled code is kept, and nothing that happens to what is kept does harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfcli.kernels import compile as compiled
from dfcli.kernels.compile import Compiled
from dfcli.system.events import Note, ignore


def double(out, x):
    for i in range(x.size):
        out[i] = 2 * x[i]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load() -> tuple[list[Any], Compiled]:
    """A process's first use of `double`: what it tells, and the function, which has been tried."""
    told: list[Any] = []
    entry = Compiled(double, [__file__])
    entry.load(told.append, np.empty(0), np.empty(0))
    out = np.empty(3)
    entry(out, np.arange(3.0))
    assert out.tolist() == [0, 2, 4]
    return told, entry


def kept(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.rglob(f"*{ending}"))


def test_it_is_compiled_once_and_says_so(folder: Path) -> None:
    told, _ = load()
    assert len(told) == 1
    assert isinstance(told[0], Note)
    assert "compiling" in told[0].text
    written = {path: path.stat().st_mtime_ns for path in kept(folder, ".nbc")}
    assert len(written) == 1
    told, entry = load()
    assert told == []
    assert sum(entry._dispatcher.stats.cache_hits.values()) == 1
    assert {path: path.stat().st_mtime_ns for path in kept(folder, ".nbc")} == written


def test_other_sources_are_another_folder(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    folders = set()
    for text in ("one", "two", "one"):
        source.write_text(text)
        folders.add(Compiled(double, [str(source)]).folder)
    assert len(folders) == 2


def test_what_numba_compiles_again_is_told(tmp_path: Path) -> None:
    def double_of(place: Path) -> Any:
        values: dict[str, Any] = {}
        exec(compile(place.read_text(), str(place), "exec"), values)
        return values["double"]

    for name in ("a.py", "b.py"):  # two environments with the same code
        (tmp_path / name).write_text("def double(out, x):\n    out[:] = 2 * x\n")
    for name, touched, heard in (("a.py", 0, 1), ("a.py", 0, 0), ("b.py", 0, 1), ("a.py", 5, 1), ("a.py", 5, 0)):
        if touched:
            os.utime(tmp_path / name, (touched, touched))
        told: list[Any] = []
        entry = Compiled(double_of(tmp_path / name), [])
        entry.load(told.append, np.empty(0), np.empty(0))
        assert len(told) == heard == sum(entry._dispatcher.stats.cache_misses.values())


@pytest.mark.parametrize("ending", [".nbi", ".nbc", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_damage_is_found_and_compiled_over(folder: Path, ending: str, damage: str) -> None:
    load()
    for path in kept(folder, ending):
        data = path.read_bytes()
        middle = len(data) // 2
        if damage == "gone":
            path.unlink()
        else:
            flipped = data[:middle] + bytes([data[middle] ^ 64]) + data[middle + 1 :]
            path.write_bytes({"cut": data[:middle], "flip": flipped, "empty": b""}[damage])
    told, _ = load()
    assert len(told) == 1
    told, _ = load()
    assert told == []


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("a file stands where the folder should be")
    told, _ = load()
    assert len(told) == 1
    assert folder.read_text().startswith("a file")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    load()


def test_what_cannot_be_compiled_raises() -> None:
    def wrong(x):
        return x.no_such_thing

    with pytest.raises(Exception, match="no_such_thing"):
        Compiled(wrong, [__file__]).load(ignore, np.empty(0))


def test_a_numba_that_is_told_not_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.numba.config, "DISABLE_JIT", 1)
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        load()


def test_other_code_that_numba_compiles_is_kept_elsewhere() -> None:
    _, entry = load()
    assert compiled.numba.config.CACHE_DIR != str(entry.folder)  # type: ignore[attr-defined]


PASS = """
import hashlib
import torch
from dfcli import cores
from dfcli.kernels import gpt_train
from dfcli.kernels.threads import WorkerPool

torch.manual_seed(0)
core = cores.build("gpt", {"vocab_size": 60, "context": 32, "layers": 1, "heads": 2, "channels": 32})
ids = torch.randint(60, (4, 33))
told = []
backward = gpt_train.build(core, WorkerPool(1), told.append)
loss, gradients = backward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, None, 128)
found = b"".join(x.numpy().tobytes() for x in (loss, *(grad for _, grad in gradients)))
print(len(told), hashlib.sha256(found).hexdigest())
"""


@pytest.mark.timeout(400)
@pytest.mark.skipif(compiled.unsupported_cpu() is not None, reason="the kernels are for other processors")
def test_fresh_and_kept_code_give_the_same_bits(folder: Path) -> None:
    """The process that compiles, and one that loads what was kept."""
    line = [sys.executable, "-c", PASS]
    fresh, kept = (subprocess.run(line, check=True, capture_output=True, text=True).stdout.split() for _ in range(2))
    assert (fresh[0], kept[0]) == ("1", "0")  # that it compiles is told once
    assert fresh[1] == kept[1]
