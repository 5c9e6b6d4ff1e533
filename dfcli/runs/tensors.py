"""Tensors as a safetensors file: an 8-byte little-endian header length, a JSON header, then the raw numbers.

The format (github.com/huggingface/safetensors) holds data only, no code. It is written and read here rather
than by its library, because a checkpoint needs what that does not give (as of 0.8): tensors that are not the
mapped file, which kills the process when it is cut off later; a checksum of the numbers in memory, taken while
they are written; files that follow the umask (its are 0600); one tensor of an accelerator at a time. The bytes
are the same, and the library reads these files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from dfcli.errors import CorruptError
from dfcli.system.files import DAMAGED, reading, strict_json
from dfcli.system.processes import whole

MAX_HEADER_BYTES = 16 << 20  # about 100,000 tensors
MAX_ELEMENTS = 1 << 48

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

Kind = tuple[torch.dtype, tuple[int, ...]]  # what a header says of a tensor


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a new file and return its SHA-256. Tensors are fetched one at a time, see `fetched`.

    OSErrors pass through; the caller flushes the file to the disk (it writes into a `building` folder).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in _ordered(tensors):
        end = offset + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for tensor in fetched(tensors):
            data = _bytes(tensor)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def fetched(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The tensors on the CPU, contiguous, in the order of a file. One that is sharded over processes is gathered, in
    which each of them must take part: all call this with the same names."""
    for _, tensor in _ordered(tensors):
        yield whole(tensor).detach().cpu().contiguous()


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The widest types come first, so that every tensor is aligned, and the order never varies."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def read(path: Path, sha256: str, expected: Mapping[str, Kind] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, in memory of their own.

    CorruptError naming the file if it is not in the format, holds other tensors than `expected` (found before
    memory is taken for them), or differs from what was written (`sha256`). DfError if it cannot be read.
    """
    with reading(path) as file:
        digest = hashlib.sha256()
        kinds = _read_header(file, path, digest)
        if expected is not None:
            _compare(path, kinds, expected)
        tensors: dict[str, Tensor] = {}
        for name, (dtype, shape) in kinds.items():
            tensor = torch.empty(shape, dtype=dtype)
            data = _bytes(tensor)
            if file.readinto(data) != len(data):
                _damaged(path, "it is cut off")
            digest.update(data)
            tensors[name] = tensor
    if digest.hexdigest() != sha256:
        _damaged(path, "its checksum is not the one that state.json holds")
    return tensors


def kinds(path: Path) -> dict[str, Kind]:
    """What the header of a file made elsewhere says. Errors as of `read`."""
    with reading(path) as file:
        return _read_header(file, path, hashlib.sha256())


def each(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Those tensors of a file made elsewhere that are `wanted`, one at a time, on the CPU. Errors as of `read`."""
    with reading(path) as file:
        for name, (dtype, shape) in _read_header(file, path, hashlib.sha256()).items():
            if name not in wanted:
                file.seek(math.prod(shape) * dtype.itemsize, os.SEEK_CUR)
                continue
            tensor = torch.empty(shape, dtype=dtype)
            if file.readinto(_bytes(tensor)) != tensor.nbytes:
                _damaged(path, "it is cut off")
            yield name, tensor


def finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether none of their numbers, of which each has one at least, is infinite or NaN."""
    # The extremes are NaN where any number is; found so it takes a tenth of the time that `isfinite` of all takes.
    return all(bool(extreme.isfinite()) for tensor in tensors.values() for extreme in torch.aminmax(tensor))


def _read_header(file: BinaryIO, path: Path, digest: Any) -> dict[str, Kind]:
    """What the header says, in the order of the data. Every byte after it belongs to exactly one tensor."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    size = os.fstat(file.fileno()).st_size
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        _damaged(path, "it does not begin with a header of a possible length")
    text = file.read(length)
    digest.update(prefix)
    digest.update(text)
    try:
        header = strict_json(text)
        header.pop("__metadata__", None)
        found = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda item: item[0])
    except ValueError as error:
        _damaged(path, f"its header is wrong: {error}")
    end = 0
    for (start, stop), name, _ in found:
        if start != end:
            _damaged(path, f"the data of {name!a} do not follow those before them")
        end = stop
    if 8 + length + end != size:
        _damaged(path, f"it has {size} bytes where its header tells of {8 + length + end}")
    return {name: kind for _, name, kind in found}


def _entry(name: str, entry: Any) -> tuple[tuple[int, int], str, Kind]:
    """Place, name and kind of one header entry. ValueError if its parts do not fit together."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!a} is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"the dtype of {name!a} is unknown")
    if not _whole_numbers(shape, at_most=8) or not _whole_numbers(offsets, at_most=2) or len(offsets) != 2:
        raise ValueError(f"shape or data_offsets of {name!a} are not a few whole numbers")
    if math.prod(max(1, size) for size in shape) > MAX_ELEMENTS:  # a size of 0 would hide the others
        raise ValueError(f"the shape of {name!a} is beyond reason")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"the shape of {name!a} does not fit the length of its data")
    return (offsets[0], offsets[1]), name, (DTYPES[code], tuple(shape))


def _whole_numbers(values: object, at_most: int) -> bool:
    if not isinstance(values, list) or len(values) > at_most:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _compare(path: Path, kinds: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    for name in sorted(kinds.keys() | expected.keys()):
        if kinds.get(name) != expected.get(name):
            has, wants = (_describe(each.get(name)) for each in (kinds, expected))
            _damaged(path, f"{name!a} is {has} where run.json describes {wants}")


def _describe(kind: Kind | None) -> str:
    return "absent" if kind is None else f"{CODES[kind[0]]} {list(kind[1])}"


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _damaged(path: Path, reason: str) -> NoReturn:
    raise CorruptError(f"{path} is damaged: {reason}", DAMAGED)
