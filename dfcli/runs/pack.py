"""A run as one file to give away: `model.df.zip`, with one checkpoint and without the data it was trained on.

    run.json           without paths of this machine
    figures.json       what an evaluation found before it was packed: loss, bits and baselines
    metrics.jsonl      the history of the losses
    step-00000500/     model.safetensors and state.json; without the optimiser, which only resuming needs
    (side files of the codec)

Opening one runs no code: the names of its members are checked, and they are copied into a folder that is removed when
the program ends.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.runs import checkpoint
from dfcli.runs.run import METRICS, RUN, Run, runs_home
from dfcli.system import files
from dfcli.system.words import size

FIGURES = "figures.json"
MEMBER = re.compile(r"(step-[0-9]{8,16}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
MOST_MEMBERS = 100
MOST_RATIO = 100  # of what is in a file to the file: beyond it the file was made to fill a disk
PATH = re.compile(r"""(?<![^\s"'`(,;=\[])(?:~|\.{1,2}|[A-Za-z]:)?[\\/](?:[^\\/"'`,;:\n]*[\\/])*""")  # inside a sentence


def pack(run: Run, out: Path, *, which: str | int = "best", figures: dict[str, Any] | None = None) -> Path:
    """Write `run` with one checkpoint to `out`: a zip file, or a folder where `out` does not end in .zip.

    `figures` are those of an evaluation on its validation split. UsageError where `out` is there already, DfError where
    it cannot be written, CorruptError for damaged files.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists already", "choose another name, or remove it first")
    with files.os_errors("write", out):
        if not out.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {out.parent}", "make it first")
    saved = run.load(which)  # verified: a damaged checkpoint is not given away
    state = checkpoint.read_state(run.path, saved.step)
    texts: dict[str, bytes] = {
        RUN: files.json_bytes(without_paths(run.info) | {"packed": run.name}),
        METRICS: (run.path / METRICS).read_bytes(),
        f"step-{saved.step:08d}/{checkpoint.STATE}": files.json_bytes(state),
    }
    if figures is not None:
        texts[FIGURES] = files.json_bytes({"format": 1, **without_paths(_finite(figures))})
    model = checkpoint.folder(run.path, saved.step) / checkpoint.MODEL
    with tempfile.TemporaryDirectory() as scratch:
        run.codec.save_files(Path(scratch))
        texts |= {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
    if out.suffix == ".zip":
        with files.writing(out) as temporary:
            _zip(temporary, texts, model, f"step-{saved.step:08d}/{checkpoint.MODEL}")
    else:
        with files.building(out) as folder:
            for name, data in texts.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
            shutil.copyfile(model, folder / f"step-{saved.step:08d}" / checkpoint.MODEL)
    return out


def _zip(path: Path, texts: dict[str, bytes], model: Path, member: str) -> None:
    """A zip whose members are not compressed, because weights do not shrink, and have no date, owner or rights."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(texts.items()):
            archive.writestr(zipfile.ZipInfo(name), data)
        with archive.open(zipfile.ZipInfo(member), "w", force_zip64=True) as target, model.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 20)


def without_paths(value: Any) -> Any:
    """A copy of JSON values in which every path is cut to its last part."""
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
        return PATH.sub("", value)
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(figures), parse_constant=lambda name: None)


_unpacked: dict[tuple[str, int, int], Path] = {}  # by place, size and time


def unpack(path: Path) -> Path:
    """Copy the members of a packed run into a folder that is removed when the program ends; returns the folder.

    CorruptError where `path` is no packed run, or holds names or sizes that `pack` does not write.
    """
    with files.os_errors("read", path):
        status = path.stat()
        key = (str(path.absolute()), status.st_size, status.st_mtime_ns)
        if key in _unpacked:
            return _unpacked[key]
        try:
            with zipfile.ZipFile(path) as archive:
                _unpacked[key] = _extract(path, archive)
                return _unpacked[key]
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise CorruptError(f"{path} is damaged: {error}", files.DAMAGED) from None


def _extract(path: Path, archive: zipfile.ZipFile) -> Path:
    members = [member for member in archive.infolist() if not member.is_dir()]
    total = sum(member.file_size for member in members)
    roots = {str(PurePosixPath(member.filename).parent) for member in members if member.filename.endswith(RUN)}
    root = roots.pop() if len(roots) == 1 else None
    prefix = "" if root in (None, ".") else f"{root}/"  # a folder that was zipped by hand is the top of all names
    names = [member.filename.removeprefix(prefix) for member in members]
    if root is None or len(set(names)) < len(names) or len(members) > MOST_MEMBERS:
        raise CorruptError(f"{path} is not a packed run", "make one with `df runs pack NAME -o model.df.zip`")
    odd = [name for name in names if not MEMBER.fullmatch(name)]
    if odd:
        raise CorruptError(f"{path} holds the name {odd[0]!a}, which no packed run has", files.DAMAGED)
    if total > MOST_RATIO * path.stat().st_size:
        raise CorruptError(f"{path} would unpack to {size(total)}, far more than a packed run", files.DAMAGED)
    home = runs_home()
    files.clean_debris(home)
    if files.free_bytes(home) < total:
        raise DfError(f"{path} unpacks to {size(total)}, and {home} has less space", "free some space")
    building = files.building(home / ".packed")  # never finished: it is removed, or cleaned after a crash
    folder = building.__enter__()
    atexit.register(lambda: building.__exit__(_Given, _Given(), None))
    for member, name in zip(members, names, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        with archive.open(member) as source, (folder / name).open("xb") as target:
            left = member.file_size
            while data := source.read(min(1 << 20, left + 1)):
                left -= len(data)
                if left < 0:
                    raise CorruptError(f"{path} is damaged: {name} is longer than the file says", files.DAMAGED)
                target.write(data)
    return folder


class _Given(Exception):
    """Ends the `building` of a folder that is not kept."""
