"""No code in data, and nothing written where nothing was asked for."""

from __future__ import annotations

import ast
import builtins
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

import dfcli

PACKAGE = Path(dfcli.__file__).parent
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "yaml",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "np.load",
    "numpy.load", "archive.extract", "archive.extractall", "shutil.unpack_archive", "os.system", "os.popen",
}  # fmt: skip


def test_the_package_calls_nothing_that_runs_data():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name | ast.Attribute)
                and ast.unparse(node.func) in FORBIDDEN_CALLS
            ):
                found.append(f"{path}:{node.lineno} {ast.unparse(node.func)}")
            found += [f"{path}:{node.lineno} {name}" for name in names if name in FORBIDDEN_MODULES]
    assert not found


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_whole_life_with_all_that_poisoned_writes_only_where_it_may(tmp_path: Path, home: Path):
    """Prepare, train, resume, sample, evaluate, list and remove. An audit hook sees every file that Python opens."""
    from tests.reliability import material
    from tests.reliability.warm import Child, app

    material.data(tmp_path)
    # What numba compiles is kept in the cache folder: another matter (tests/kernels/test_compile.py).
    lines = {kind: [*words, "--set", "compile=off"] for kind, words in material.trainings(tmp_path, 4).items()}
    place = tmp_path / "here"
    place.mkdir()

    def work() -> int:
        os.chdir(place)
        poison()
        written: list[str] = []
        sys.addaudithook(lambda event, arguments: written.extend(paths(event, arguments)))
        for words in (
            ["data", "prepare", str(tmp_path / "names.txt"), "--lines", "--name", "names"],
            [*lines["gpt, muon"], "--name", "a"],
            [*lines["gpt, muon"], "--name", "a", "--resume"],
            [*lines["wavenet, adamw"], "--name", "b"],
            ["sample", "gpt", "--run", "a", "--tokens", "5", "--engine", "plain"],
            ["sample", "wavenet", "--run", "b", "--seconds", "0.01", "-o", "out.wav", "--engine", "plain"],
            ["eval", "--run", "a"],
            ["runs", "list"],
            ["runs", "show", "b"],
            ["data", "list"],
            ["runs", "remove", "a", "--yes"],
            ["data", "remove", "names", "--yes"],
        ):
            assert app.run(words) == 0, words
        # The output appears whole: it is begun under a name beside its own.
        allowed = (str(home), os.path.realpath(home), str(place), os.devnull, "out.wav", ".tmp-out.wav-")
        outside = [path for path in written if not path.startswith(allowed) and "__pycache__" not in path]
        assert not outside, outside
        return 0

    child = Child(work, tmp_path / "said", home)
    assert child.wait() == 0, child.said()
    assert os.listdir(place) == ["out.wav"]


def poison() -> None:
    """Let what would run data, or unpack it, fail; `exec` only where the package itself calls it."""

    def forbidden(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("data were run as code")

    import torch

    for owner, names in (
        (pickle, ("load", "loads", "Unpickler", "_Unpickler")),
        (torch, ("load", "save")),
        (shutil, ("unpack_archive",)),
        (zipfile.ZipFile, ("extract", "extractall")),
        (tarfile.TarFile, ("extract", "extractall")),
    ):
        for name in names:
            setattr(owner, name, forbidden)
    real = builtins.exec

    def guarded(*arguments: Any, **options: Any) -> None:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("dfcli"):
            forbidden()
        real(*arguments, **options)

    builtins.exec = guarded  # not eval, which looks at its caller's variables


def paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths that an audited event changes."""
    if event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return [os.fsdecode(path)] if writes and not isinstance(path, int) else []
    if event in ("os.rename", "os.link", "os.symlink"):
        return [os.fsdecode(path) for path in arguments[:2]]
    if event in ("os.mkdir", "os.truncate", "shutil.rmtree"):
        return [os.fsdecode(arguments[0])] if not isinstance(arguments[0], int) else []
    if event in ("os.remove", "os.rmdir") and arguments[1] == -1:  # else in a folder that rmtree named
        return [os.fsdecode(arguments[0])]
    return []
