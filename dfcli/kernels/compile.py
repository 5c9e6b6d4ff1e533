"""Compilation by numba on the user's own machine: no compiler is needed there, and the code fits its CPU.

Compiling a step takes seconds, so its machine code is kept in the user's cache folder, or in
$NUMBA_CACHE_DIR. numba would load a damaged file of that folder as it is; therefore a list of checksums
stands beside its files, and a folder that disagrees with its list is emptied before numba looks at it.
Where nothing can be written the code is compiled anew in each process.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvmlite
import numba
import platformdirs

from dfcli.system.events import Note, OnEvent
from dfcli.system.files import data_home

# Sums keep their order, so that a clip does not depend on how its steps were cut into calls; a product and
# a sum may be fused.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}

njit: Any = numba.njit  # its types differ between versions
# For functions that only compiled ones call. Each is put into its callers whole. A call would find one machine code in
# the process that compiles, and another in a process that loads the kept code: sums then differ in their last bits.
# Without the door for Python, which a second of compilation would go into, a call from there crashes.
INNER: dict[str, Any] = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(**OPTIONS, **INNER)
# For those that stay a call, of which each machine code gives the same bits.
called = njit(**OPTIONS | INNER | {"forceinline": False})

_LIST = "checksums.json"
_SHARED = ("compile.py", "gemm.py", "ops.py", "pick.py", "threads.py")  # what every entry point may be made of


def unsupported_cpu() -> str | None:
    """The reason against training kernels on this processor: they have been shown to pay on x86-64 only."""
    return None if platform.machine() in ("x86_64", "AMD64") else f"the kernels are not tested on {platform.machine()}"


class Compiled:
    """An entry point for arguments of certain types: compiled when it is first loaded, and kept on disk.

    `sources` are the files its code is written in, beside the shared ones here; a change in any of them is another
    folder, and so is another `variant`, the name of the types where there are several. Another processor, numba or
    place of the function is another folder too: numba compiles again there, which must be told.
    """

    def __init__(self, function: Callable[..., Any], sources: list[str], variant: str = "") -> None:
        self._function = function
        shared = [Path(__file__).with_name(name) for name in _SHARED]
        code = b"".join(Path(source).read_bytes() for source in [*shared, *sources])
        digest = hashlib.sha256(code + repr(_stamp(Path(function.__code__.co_filename))).encode()).hexdigest()
        self.folder = _cache() / f"{function.__name__}{variant}-{digest[:16]}"
        self._keep = False
        self._dispatcher: Any = None

    def load(self, on_event: OnEvent, *arguments: Any) -> None:
        """The first call, with arguments that make it do nothing: compiles, which it tells, or loads what is kept.
        Raises what numba raises where it cannot compile."""
        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        if self._dispatcher is None:
            if not _sound(self.folder):
                on_event(Note("compiling CPU kernels (once on this machine, 10 to 60 s)"))
            self._keep = _usable(self.folder)
            self._dispatcher = self._dispatch(self._keep)
        try:
            self._dispatcher(*arguments)
        except Exception:
            if not self._keep:
                raise
            self._keep = False  # whatever the folder did to numba, the function itself may be well
            self._dispatcher = self._dispatch(keep=False)
            self._dispatcher(*arguments)
        if self._keep and not _sound(self.folder):
            _write_list(self.folder)

    def __call__(self, *arguments: Any) -> Any:
        return self._dispatcher(*arguments)

    def _dispatch(self, keep: bool) -> Any:
        before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = str(self.folder)  # type: ignore[attr-defined]
        try:
            return njit(cache=keep, **OPTIONS)(self._function)
        finally:
            numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


def once(on_event: OnEvent) -> OnEvent:
    """Tell the first event alone: several functions that are compiled say the same."""
    told: list[object] = []

    def tell(event: object) -> None:
        if not told:
            told.append(event)
            on_event(event)

    return tell


def _stamp(file: Path) -> tuple[object, ...]:
    """What numba compares beside the code before it takes kept machine code."""
    processor = llvmlite.get_host_cpu_name(), llvmlite.get_host_cpu_features().flatten()
    return numba.__version__, *processor, str(file), file.stat().st_mtime_ns


def _cache() -> Path:
    if base := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(base)
    try:
        return platformdirs.user_cache_path("dfcli") / "compiled"
    except RuntimeError:  # the user has no home folder
        return data_home() / "compiled"


def _usable(folder: Path) -> bool:
    """Makes the folder, empty if its files are not what was written. False where it cannot be written."""
    try:
        if not _sound(folder) and _checksums(folder):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _sound(folder: Path) -> bool:
    try:
        return json.loads((folder / _LIST).read_text()) == _checksums(folder)
    except (OSError, ValueError):
        return False


def _write_list(folder: Path) -> None:
    """Replaces the list in one step. It is a cache: a list that could not be written costs a compilation."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(_checksums(folder), file)
        os.replace(file.name, folder / _LIST)
    except OSError:
        pass


def _checksums(folder: Path) -> dict[str, str]:
    """sha256 of numba's files: indexes (.nbi) and machine code (.nbc)."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
