"""Prepared datasets on disk: token ids, where documents begin, and a checksum for every block of 1 MiB.

A dataset is a folder:

    dataset.json       what it is: codec, boundary, splits, sources, sizes and hashes of the files beside it
    <split>.tokens     little-endian ids, one document after the other
    <split>.offsets    int64 [documents + 1]: document k is tokens[offsets[k]:offsets[k + 1]]
    <split>.checksums  uint32, the CRC-32 of each MiB of <split>.tokens
    <split>.labels     int32 [documents, labels], where there are labels: places in the names that dataset.json lists

A document that has a boundary is stored as [boundary, x0, x1, ...]. In a dataset of lines one more boundary
stands at the very end of the file, so that tokens[offsets[k + 1]] is always the target that ends document
k.

Everything is memory-mapped: a 10 GB split takes no more of the process's own memory than a small one.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dfcli.codecs import Codec, codec_from_json
from dfcli.codecs.boundary import is_boundary
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.system.events import Note, OnEvent, ignore
from dfcli.system.files import (
    NAME,
    alone,
    check_format,
    check_name,
    clean_debris,
    data_home,
    hold,
    os_errors,
    read_json,
    reading,
    remove_folder,
)
from dfcli.system.words import closest, counted

FILE = "dataset.json"
FORMAT = 1
BLOCK = 1 << 20  # bytes of tokens under one checksum
SPLITS = ("train", "val", "test", "all")
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


def datasets_folder() -> Path:
    """Where prepared datasets are kept; it may not exist yet."""
    return data_home() / "datasets"


class Busy(DfError):
    """Another process is preparing or removing the dataset."""


class Split:
    """One split of a dataset. Blocks are checked against their checksum when they are first read.

    `documents` is their number, `shortest` and `longest` are their lengths in stored ids.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        record: dict[str, Any],
        dtype: str,
        vocab_size: int,
        end: int,
        labels: Sequence[int] = (),
    ) -> None:
        """`labels`: how many names each label has."""
        self.name = name
        self.tokens_count = int(record["tokens"])
        self.documents = int(record["documents"])
        self.shortest = int(record["shortest"])
        self.longest = int(record["longest"])
        self._vocab_size = vocab_size
        self._end = end  # 1 where a boundary stands behind the last document
        self._file = folder / f"{name}.tokens"
        self._offsets_file = folder / f"{name}.offsets"
        self._offsets_sha256 = str(record["offsets_sha256"])
        self._offsets_checked = False

        checksums_file = folder / f"{name}.checksums"
        self._tokens = _map(self._file, DTYPES[dtype], self.tokens_count)
        self._offsets = _map(self._offsets_file, "<i8", self.documents + 1)
        self._block = BLOCK // self._tokens.itemsize  # ids under one checksum
        blocks = -(-self.tokens_count // self._block)
        self._checksums = _map(checksums_file, "<u4", blocks)
        if hashlib.sha256(self._checksums.data).hexdigest() != record["checksums_sha256"]:
            raise _changed(checksums_file)
        self._labels_file = folder / f"{name}.labels"
        self._labels_sha256 = record.get("labels_sha256")
        self._labels_count = labels
        self._unread = blocks
        self._verified = bytearray(blocks)  # 1 for a block that was found good
        self._verified_array = np.frombuffer(self._verified, np.uint8)

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1], memory-mapped and read-only. Raises CorruptError when the file was changed."""
        if not self._offsets_checked:
            if hashlib.sha256(self._offsets.data).hexdigest() != self._offsets_sha256:
                raise _changed(self._offsets_file)
            shortest, longest = self.longest, 0
            for start in range(0, self.documents, BLOCK):
                lengths = np.diff(self._offsets[start : start + BLOCK + 1])
                shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
            found = (int(self._offsets[0]), int(self._offsets[-1]), shortest, longest)
            if found != (0, self.tokens_count - self._end, max(self.shortest, 1), self.longest):
                raise CorruptError(f"{self._offsets_file} does not describe its documents", _HINT)
            self._offsets_checked = True
        return self._offsets

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as a read-only view of the file, in the codec's dtype.

        Raises CorruptError when a block that is read for the first time is not what was written, IndexError
        outside of the split.
        """
        if not 0 <= start <= stop <= self.tokens_count:
            raise IndexError(f"ids {start} to {stop} of {self.tokens_count}")
        if self._unread and start < stop:
            first, last = start // self._block, (stop - 1) // self._block
            while (block := self._verified.find(0, first, last + 1)) >= 0:
                self._verify(block)
        return self._tokens[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        """The ids at `places` (int64, any shape, each in [0, tokens_count)) in the codec's dtype; errors as `read`."""
        if self._unread:
            blocks = places // self._block
            for block in np.unique(blocks[self._verified_array[blocks] == 0]):
                self._verify(int(block))
        return self._tokens[places]

    def document(self, k: int) -> np.ndarray:
        """The stored ids of document k, its boundary included: a read-only view."""
        return self.read(int(self.offsets[k]), int(self.offsets[k + 1]))

    @cached_property
    def labels(self) -> np.ndarray:
        """int32 [documents, labels], read-only: the place of each document's names. Raises CorruptError when the file
        was changed."""
        counts = self._labels_count
        if not counts:
            return np.zeros((self.documents, 0), np.int32)
        rows = _map(self._labels_file, "<i4", self.documents * len(counts)).reshape(-1, len(counts))
        if hashlib.sha256(rows.data).hexdigest() != self._labels_sha256:
            raise _changed(self._labels_file)
        if rows.min() < 0 or (rows.max(axis=0) >= counts).any():
            raise CorruptError(f"{self._labels_file} holds labels beyond their names", _HINT)
        return rows

    def close(self) -> None:
        """Let go of the files. Views that were handed out stay valid."""
        self._tokens = self._offsets = self._checksums = np.empty(0, np.uint8)
        self.__dict__.pop("labels", None)

    def _verify(self, block: int) -> None:
        ids = self._tokens[block * self._block : (block + 1) * self._block]
        if zlib.crc32(ids.data) != self._checksums[block]:
            place = block * BLOCK
            raise CorruptError(f"{self._file} was changed after it was written (the MiB at byte {place:,})", _HINT)
        if int(ids.max()) >= self._vocab_size:
            raise CorruptError(f"{self._file} holds ids beyond its vocabulary of {self._vocab_size}", _HINT)
        self._verified[block] = 1
        self._unread -= 1


class SplitWriter:
    """Writes one split into a folder, document by document, with memory for a few blocks.

    OSErrors are left to the caller's `files.building`.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.name = name
        self.documents = 0
        self.shortest = self.longest = 0
        self._folder, self._dtype = folder, dtype
        self._stack = contextlib.ExitStack()
        self._tokens, self._offsets, self._checksums = (
            self._stack.enter_context((folder / f"{name}.{part}").open("wb"))
            for part in ("tokens", "offsets", "checksums")
        )
        self._tokens_sha256 = hashlib.sha256()
        self._offsets_sha256 = hashlib.sha256()
        self._checksums_sha256 = hashlib.sha256()
        self._pending = bytearray()  # what is not yet in the file; a document may still be taken back from it
        self._bytes = 0  # in the file and pending
        self._start = 0  # ids before the open document
        self._labels: list[Sequence[int]] = []

    @property
    def tokens(self) -> int:
        """Ids written so far."""
        return self._bytes // self._dtype.itemsize

    def append(self, ids: np.ndarray) -> None:
        """Append ids [n] to the open document."""
        self._flush(BLOCK)
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._pending += data
        self._bytes += len(data)

    def end_document(self, labels: Sequence[int] = ()) -> bool:
        """Close the open document, which has these labels, and open the next. One of fewer than two ids has nothing to
        predict: it is taken back, and the answer is False."""
        length = self.tokens - self._start
        if length < 2:
            size = length * self._dtype.itemsize
            del self._pending[len(self._pending) - size :]
            self._bytes -= size
            return False
        self._add_offsets(np.array([self._start]), length, length)
        self._start = self.tokens
        if labels:
            self._labels.append(labels)
        return True

    def append_documents(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """Append ids [n] that go on with the open document and begin others at the places `starts` [k] among them."""
        bounds = np.concatenate([[self._start], starts + self.tokens])
        self.append(ids)
        if len(starts):
            lengths = np.diff(bounds)
            inside = lengths[lengths > 0]  # the first is empty where no document was open
            if len(inside):
                self._add_offsets(bounds[:-1][lengths > 0], int(inside.min()), int(inside.max()))
            self._start = int(bounds[-1])

    def finish(self, end: int | None = None) -> dict[str, Any] | None:
        """Close the files; `end` is a last id behind the last document. The record for dataset.json, or
        None (and no files) where no document was written."""
        if self.tokens > self._start:
            self.end_document()
        last = self.tokens
        if end is not None and self.documents:
            self.append(np.array([end]))
        self._flush(1)
        data = np.array([last], "<i8").tobytes()
        self._offsets.write(data)
        self._offsets_sha256.update(data)
        paths = [Path(file.name) for file in (self._tokens, self._offsets, self._checksums)]
        self._stack.close()
        if not self.documents:
            for path in paths:
                path.unlink()
            return None
        labels = np.array(self._labels, "<i4").tobytes()
        if labels:
            (self._folder / f"{self.name}.labels").write_bytes(labels)
        return {
            **({"labels_sha256": hashlib.sha256(labels).hexdigest()} if labels else {}),
            "tokens": self.tokens,
            "documents": self.documents,
            "shortest": self.shortest,
            "longest": self.longest,
            "tokens_sha256": self._tokens_sha256.hexdigest(),
            "offsets_sha256": self._offsets_sha256.hexdigest(),
            "checksums_sha256": self._checksums_sha256.hexdigest(),
        }

    def close(self) -> None:
        """Close the files of a split that is given up."""
        self._stack.close()

    def _add_offsets(self, starts: np.ndarray, shortest: int, longest: int) -> None:
        data = starts.astype("<i8").tobytes()
        self._offsets.write(data)
        self._offsets_sha256.update(data)
        self.shortest = min(self.shortest, shortest) if self.documents else shortest
        self.longest = max(self.longest, longest)
        self.documents += len(starts)

    def _flush(self, least: int) -> None:
        """Write pending blocks: whole ones, with `least` = 1 also what is left."""
        done = 0
        with memoryview(self._pending) as pending:
            while len(pending) - done >= least:
                block = pending[done : done + BLOCK]
                checksum = np.array([zlib.crc32(block)], "<u4").tobytes()
                self._tokens.write(block)
                self._tokens_sha256.update(block)
                self._checksums.write(checksum)
                self._checksums_sha256.update(checksum)
                done += len(block)
                block.release()
        del self._pending[:done]


class Dataset:
    """A prepared dataset, opened. Use `Dataset.open` or `prepare.prepare`; close it or use it as a
    context manager.

    Attributes: `name`, `path` (its folder), `kind` ("text" or "audio"), `boundary` (id or None), `lines`,
    `lead`, `fingerprint` (SHA-256 of what it holds, hex), `labels` (the sorted names of each label), `info`
    (dataset.json as a dict), `splits` (name to Split).
    """

    def __init__(self, path: Path, info: dict[str, Any], *, discard: Callable[[], None] | None = None) -> None:
        """`info` is the dataset.json in `path`; `discard` is called when a temporary dataset is given up.
        Raises CorruptError, DfError (a newer format)."""
        self.path = path
        self.info = info
        self.splits: dict[str, Split] = {}
        file = path / FILE
        check_format(info, FORMAT, file)
        try:
            self.name: str = str(info["name"])
            self.kind: str = _one_of(info["kind"], ("text", "audio"))
            self.boundary: int | None = info["boundary"]
            self.lines = bool(info["lines"])
            self.lead: int = info["lead"]
            self.fingerprint: str = str(info["fingerprint"])
            self.vocab_size = int(info["vocab_size"])
            self.labels: dict[str, list[str]] = checked_labels(info.get("labels", {}))
            dtype = _one_of(info["dtype"], tuple(DTYPES))
            for split, record in info["splits"].items():
                _one_of(split, SPLITS)
                counts = [len(names) for names in self.labels.values()]
                self.splits[split] = Split(path, split, record, dtype, self.vocab_size, int(self.lines), counts)
            if not self.splits:
                raise ValueError("it has no splits")
            if not is_boundary(self.boundary, self.lead, self.vocab_size):
                raise ValueError("its boundary cannot be")
            if not _is_described(info):
                raise ValueError("its description is incomplete")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(f"{file} does not describe a dataset: {error!r}", _HINT) from None
        self._codec: Codec | None = None
        self._hold = hold(path / f"{next(iter(self.splits))}.tokens")
        # At the latest when the program ends
        self._discard = None if discard is None else weakref.finalize(self, discard)

    @classmethod
    def open(cls, name_or_path: str | Path) -> Dataset:
        """Open a dataset by its name or by the path of its folder; a name wins over a path of that name.

        Raises UsageError when there is none, CorruptError when its files are not what was written.
        """
        folder = find_dataset(name_or_path)
        if folder is None:
            raise _no_dataset(str(name_or_path))
        return open_folder(folder)

    @property
    def codec(self) -> Codec:
        """The codec that the ids are of."""
        if self._codec is None:
            codec = codec_from_json(self.info["codec"], self.path)
            if codec.vocab_size != self.vocab_size:
                raise CorruptError(f"the codec of {self.path} does not fit its ids", _HINT)
            self._codec = codec
        return self._codec

    def close(self) -> None:
        """Let go of the files; a temporary dataset is removed."""
        for split in self.splits.values():
            split.close()
        if self._hold is not None:
            self._hold.close()
        if self._discard is not None:
            self._discard()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def find_dataset(name_or_path: str | Path) -> Path | None:
    """The folder of a prepared dataset of that name, else that path if it is the folder of one, else None."""
    text = str(name_or_path)
    try:
        if NAME.fullmatch(text) and _settled(datasets_folder() / text):
            return datasets_folder() / text
        return Path(text) if _settled(Path(text).absolute()) else None
    except (OSError, ValueError):  # a path that is too long, or has a NUL inside
        return None


def open_folder(folder: Path) -> Dataset:
    """Open the dataset in `folder`; raises as `Dataset.open`, and DfError when it was removed.

    It may be replaced by a newer one meanwhile, and files opened before and after do not belong together.
    So what looks broken is looked at again if it has changed.
    """
    while _settled(folder):
        stamp = _stamp(folder)
        try:
            return Dataset(folder, read_json(folder / FILE))
        except DfError:
            if _stamp(folder) == stamp:
                raise
    raise DfError(f"there is no dataset in {folder}", "`df data list` shows what is prepared")


def reopen(record: dict[str, Any]) -> Dataset | None:
    """Open the dataset that a run's `record` of its data means: the one of that name or at that path, else any other,
    with the same fingerprint. None where there is none any more."""
    for place in (record["name"], record["path"]):
        if find_dataset(place) is not None:
            dataset = Dataset.open(place)
            if dataset.fingerprint == record["fingerprint"]:
                return dataset
            dataset.close()
    found = None
    for dataset in list_datasets():
        if found is None and dataset.fingerprint == record["fingerprint"]:
            found = dataset
        else:
            dataset.close()
    return found


def list_datasets(on_event: OnEvent = ignore) -> list[Dataset]:
    """Every prepared dataset, sorted by name. What cannot be read is told as a Note and left out."""
    root = datasets_folder()
    clean_debris(root)  # puts back what a replacement that was cut off had moved away
    found = []
    for name in dataset_names():
        try:
            found.append(open_folder(root / name))
        except DfError as error:
            on_event(Note(f"dataset {name} cannot be read: {error.message}"))
    return found


def dataset_names() -> list[str]:
    """The names of the prepared datasets, sorted; some may be damaged."""
    root = datasets_folder()
    if not root.is_dir():
        return []
    return sorted(child.name for child in root.iterdir() if NAME.fullmatch(child.name) and child.is_dir())


def _no_dataset(name: str) -> UsageError:
    hint = closest(name, dataset_names())
    return UsageError(f"there is no dataset {name!r}", hint or "`df data prepare` and `df train` make datasets")


def folder_of(name: str) -> Path:
    """The folder of the dataset of that name, which may be damaged. UsageError when there is none."""
    folder = datasets_folder() / check_name(name, "dataset")
    clean_debris(folder.parent)
    if not folder.is_dir():
        raise _no_dataset(name)
    return folder


def remove_dataset(name: str) -> None:
    """Remove a prepared dataset, whole or not at all. UsageError when there is none, DfError when it is in use."""
    folder = folder_of(name)
    in_use = DfError(f"the dataset {name} is in use", "wait until training or evaluation on it has ended")
    with preparation_lock(name, wait=0), alone(sorted(folder.glob("*.tokens")), in_use):
        remove_folder(folder)


@contextlib.contextmanager
def preparation_lock(name: str, wait: float = -1) -> Iterator[None]:
    """Held while the dataset `name` is prepared or removed. Waits `wait` seconds (-1: as long as it
    takes), then raises Busy."""
    import filelock  # takes 40 ms, and those who only read need no lock

    root = datasets_folder()
    with os_errors("write", root):
        root.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root / f".{name}.lock")
    with os_errors("write", root):
        try:
            lock.acquire(timeout=wait)
        except filelock.Timeout:
            message = f"the dataset {name} is being prepared by another process"
            raise Busy(message, "wait until it is done") from None
    try:
        yield
    finally:
        lock.release()


_HINT = "remove it with `df data remove` and prepare it again from its sources"


def _is_described(info: dict[str, Any]) -> bool:
    """Whether what is told of a dataset is there and of the right kinds: the codec, and what its making found."""
    tables = (info[key] for key in ("codec", "facts", "skipped", "options", "sources"))
    words = (info[key] for key in ("created", "key", "split_rule", "name", "fingerprint"))
    sound = all(isinstance(table, dict) for table in tables) and all(isinstance(word, str) for word in words)
    if not sound or not isinstance(info["codec"]["name"], str):
        return False
    skipped = info["skipped"]
    named = all(isinstance(file[key], str) for file in skipped["files"] for key in ("name", "reason"))
    numbers = (skipped["count"], *info["facts"].values())
    return named and all(isinstance(number, int | float) for number in numbers)


def checked_labels(labels: Any) -> dict[str, list[str]]:
    """Labels and their names, as read from a file. Raises ValueError where that is something else."""
    names = labels.values() if isinstance(labels, dict) else (None,)
    if not all(isinstance(some, list) and some and all(isinstance(name, str) for name in some) for some in names):
        raise ValueError("its labels are no lists of names")
    return labels


def _one_of(value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return str(value)


def _changed(file: Path) -> CorruptError:
    return CorruptError(f"{file} was changed after it was written", _HINT)


def _map(file: Path, dtype: str, count: int) -> np.ndarray:
    """`count` numbers of a file, memory-mapped and read-only, its length checked."""
    size = count * np.dtype(dtype).itemsize
    with reading(file) as handle:
        found = os.fstat(handle.fileno()).st_size
        if found != size or size <= 0:
            raise CorruptError(f"{file} is {counted(found, 'byte')} long where {size:,} were written", _HINT)
        return np.frombuffer(mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ), dtype)


def _settled(folder: Path) -> bool:
    """Whether there is a dataset in `folder`. Replacing one takes two renames: in between, or after a crash
    in between, the old one lies beside its place, and is waited for or put back."""
    root = datasets_folder()
    for _ in range(100):
        if (folder / FILE).is_file():
            return True
        if folder.parent != root or not any(root.glob(f".old-{folder.name}-*")):
            break
        clean_debris(root)
        time.sleep(0.01)
    return (folder / FILE).is_file()


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        status = (folder / FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
