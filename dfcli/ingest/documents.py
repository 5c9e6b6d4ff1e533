"""Documents inside text files: the parts between a separator, or a field of the records of JSONL, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dfcli.codecs.text import utf8
from dfcli.errors import DfError, UsageError
from dfcli.ingest.reading import CHUNK, read_text
from dfcli.ingest.sources import Source
from dfcli.system.words import close, counted

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_RECORD = 64 << 20  # characters of one record; a quote that never ends would take all memory
LACKING = "lacking: "  # begins the sentence about records without the field
MISSING = object()  # what a record without the field has
SHORTEST = 2  # characters of a document: one has nothing to predict

Pieces = Iterator[tuple[bool, str]]
"""Pieces of text in order, and whether a piece begins a document."""

Records = Iterator[tuple[str, dict[str, Any]]]
"""Where each record is, as the beginning of a sentence, and its fields."""


def holds_records(path: str) -> bool:
    """Whether a file of that name holds records, or a folder is there that may."""
    return Path(path).is_dir() or any(suffix in RECORDS for suffix in Path(path.lower()).suffixes[-2:])


def documents(
    source: Source, separator: str | None, field: str | None, on_bytes: Callable[[bytes], object], about: set[str]
) -> Pieces:
    """The documents of a source that have two characters or more. `about` collects what `read_text` tells.

    A record without the field is left out, and `about` gets a sentence about all of them. Raises DfError, naming file,
    line or record, and field, where no record has the field or a record is not as it should be.
    """
    if field is None:
        assert separator is not None
        yield from _long_enough(_parts(read_text(source, on_bytes, about), separator))
    else:
        yield from _long_enough((True, text) for text in _with_field(source, field, on_bytes, about))


def _with_field(source: Source, field: str, on_bytes: Callable[[bytes], object], about: set[str]) -> Iterator[str]:
    """The texts of a field. Tells or refuses records that lack it."""
    lacking, records, first = 0, 0, ("", "")
    for where, record in _records(source, field, on_bytes, about):
        records += 1
        if (value := _value(record, field)) is not MISSING:
            yield _text(where, field, value)
            continue
        if not lacking:
            there = ", ".join(f"`{name}`" for name in list(record)[:10])
            first = where, f"it has the fields {there}" if record else "it has no fields"
        lacking += 1
    if lacking and lacking == records:
        meant = close(field, first[1].split("`")[1::2])
        hint = "`--field` takes a field of the records"
        if named(source, "csv", "tsv"):
            hint += "; the first line of the file names them"
        hint = f"did you mean `--field {shlex.quote(meant)}`?" if meant else hint
        raise DfError(f"{first[0]} the record has no field `{field}`: {first[1]}", hint)
    if lacking:
        of = f"{lacking:,} of {counted(records, 'record')} of {source.name}"
        about.add(f"{LACKING}{of} have no field `{field}` and were left out; the first is {first[0][:-1]}: {first[1]}")


def _long_enough(pieces: Iterable[tuple[bool, str]]) -> Pieces:
    held: str | None = None  # the beginning of a document, as long as it is too short
    for begins, text in pieces:
        if begins:
            held = ""
        if held is None:
            if text:
                yield False, text
            continue
        held += text
        if len(held) >= SHORTEST:
            yield True, held
            held = None


def _parts(chunks: Iterable[str], separator: str) -> Pieces:
    """What stands between separators, wherever the chunks are cut."""
    held, begins = "", True
    for chunk in chunks:
        *whole, rest = (held + chunk).split(separator)
        for part in whole:
            yield begins, part
            begins = True
        cut = max(0, len(rest) - len(separator) + 1)  # the end may be the beginning of a separator
        yield begins, rest[:cut]
        held, begins = rest[cut:], False
    yield begins, held


def _records(source: Source, field: str, on_bytes: Callable[[bytes], object], about: set[str]) -> Records:
    with source.open() as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from _parquet(source, field, on_bytes)
        return
    name = source.name.lower()
    if name.endswith(".parquet"):
        raise DfError(f"{source.name} is no Parquet file: it does not begin with PAR1", "fetch the file again")
    lines = _lines(source, read_text(source, on_bytes, about))
    if named(source, "csv", "tsv"):
        yield from _csv(source, lines, "\t" if ".tsv" in name else None)
    else:
        yield from _jsonl(source, lines)


def named(source: Source, *suffixes: str) -> bool:
    """Whether the name ends in one of these suffixes, packed or not."""
    return not set(suffixes).isdisjoint(source.name.lower().split(".")[-2:])


def _lines(source: Source, chunks: Iterable[str]) -> Iterator[str]:
    """Lines with their line break."""
    held: list[str] = []
    size = 0
    for chunk in chunks:
        first, newline, rest = chunk.partition("\n")
        held.append(first)
        size += len(first)
        if size > MAX_RECORD:
            raise DfError(f"{source.name} has a line of more than {MAX_RECORD:,} characters")
        if not newline:
            continue
        yield "".join(held) + "\n"
        *whole, last = rest.split("\n")
        yield from (line + "\n" for line in whole)
        held, size = [last], len(last)
    if size:
        yield "".join(held)


def _jsonl(source: Source, lines: Iterable[str]) -> Records:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source.name}, line {number:,}:"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise DfError(f"{where} this is not JSON", _as_lines(source)) from None
        if not isinstance(record, dict):
            raise DfError(f"{where} the record is no object with fields", _as_lines(source))
        yield where, record


def _as_lines(source: Source) -> str:
    names = shlex.quote(source.name), shlex.quote(f"{Path(source.name).stem}-lines.jsonl")
    return "give JSONL, one object a line: `jq -c '.[]' {} > {}` makes it of an array".format(*names)


def _csv(source: Source, lines: Iterator[str], delimiter: str | None) -> Records:
    first = next(lines, "")
    if delimiter is None:
        delimiter = max(",;\t|", key=first.count)
    csv.field_size_limit(MAX_RECORD)
    rows = csv.reader((line for part in ((first,), lines) for line in part), delimiter=delimiter)
    try:
        header = next(rows, [])
        for row in rows:
            if row:
                yield f"{source.name}, line {rows.line_num:,}:", dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise DfError(f"{source.name}, line {rows.line_num:,}: {error}") from None


def _parquet(source: Source, field: str, on_bytes: Callable[[bytes], object]) -> Records:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(f"{source.name} is Parquet, which takes another package", "`pip install pyarrow`") from None
    with source.open() as file:
        while data := file.read(CHUNK):  # for its hash, and for the progress
            on_bytes(data)
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            column = field if field in names else field.partition(".")[0]
            paths = [table.schema.column(i).path for i in range(len(table.schema))]  # a.b: part b of the objects in a
            if not any(f"{path}.".startswith(f"{field}.") for path in paths):
                yield f"{source.name}:", dict.fromkeys(names) | ({column: {}} if column in names else {})
                return
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{source.name}, record {number:,}:", {column: value}
        except (arrow.ArrowException, OSError) as error:
            raise DfError(f"{source.name} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _value(record: dict[str, Any], field: str) -> Any:
    """The field of a record, or of `object.field` inside it; MISSING where there is none."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def _text(where: str, field: str, value: Any) -> str:
    """The text of a record's field; an empty one where it is null or NaN, as tables write what is missing. Raises
    DfError."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        kind = {"list": "a list", "dict": "an object", "int": "a number", "float": "a number"}.get(type(value).__name__)
        hint = "`--field` takes a field whose values are texts"
        if isinstance(value, dict) and value:
            hint = f"`--field {field}.{next(iter(value))}` takes a part of it"
        raise DfError(f"{where} the field `{field}` holds {kind or type(value).__name__}, not text", hint)
    try:
        utf8(value)
    except DfError as error:  # JSON can write one half alone
        raise DfError(f"{where} in the field `{field}`, {error.message}", "leave that record out") from None
    return io.IncrementalNewlineDecoder(None, translate=True).decode(value, final=True)
