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

import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dfcli.errors import UsageError
from dfcli.runs import checkpoint
from dfcli.runs.run import METRICS, RUN, Run
from dfcli.system import files

FIGURES = "figures.json"
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
