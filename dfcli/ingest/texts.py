"""Texts to a dataset. Each is read twice: scanned (is it UTF-8, which characters, how many lines), then encoded
straight into its splits.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfcli.codecs import BPE, GPT2, Bytes, Chars, TextCodec
from dfcli.codecs.bpe import default_vocab_size
from dfcli.codecs.bytelevel import END_OF_TEXT
from dfcli.errors import DfError, UsageError
from dfcli.ingest.build import Build, Made, Writers
from dfcli.ingest.documents import LACKING, Pieces, documents, named
from dfcli.ingest.reading import BadText, read_text
from dfcli.ingest.sources import CHUNK, Lines, Source, list_some, nothing_usable
from dfcli.ingest.splits import TEST, TRAIN, VAL, Labels, constant
from dfcli.system.events import Choice, Note
from dfcli.system.words import counted

MANY = 5000  # characters from which on a vocabulary of them is reported


class Text(NamedTuple):
    """A text that was scanned and can be used."""

    source: Source
    characters: int
    lines: int
    blank: int
    about: frozenset[str]  # what `read_text` tells, and END_OF_TEXT where that stands in it
    contents: bytes  # the hash of its characters; empty where it is the only text


class Job(NamedTuple):
    """What is written: the scanned texts of train, val and test, and where to."""

    codec: TextCodec
    texts: list[list[Text]]
    writers: list[Writers]
    boundary: int | None  # the id that begins a document
    total: int  # bytes of all texts


class Texts(Build):
    """A preparation of texts."""

    kind = "text"

    def _encode(self, folder: Path) -> Made:
        options = self._options
        self._inside = options.separator is not None or options.field is not None  # documents are parts of files
        self._unknown = Counter[str]()  # characters that the alphabet of a given codec lacks
        alphabet = Alphabet() if options.codec in (None, "chars") else None
        total = sum(source.size for group in self._groups for source in group)
        self._begin()
        scanned = [[self._scan(source, alphabet, total) for source in group] for group in self._groups]
        texts = [[text for text in group if text is not None] for group in scanned]
        self._without_copies(texts, lambda text: text.contents, lambda text: text.source)
        if not texts[TRAIN]:
            raise nothing_usable(self._skipped, self._options.purpose)
        if (
            options.separator is not None
            and not options.whole
            and sum(text.lines for group in texts for text in group) == 1
        ):
            raise _no_separator(options.separator, texts[TRAIN][0].source.name)
        codec = self._trained(texts, total) if options.codec == "bpe" else self._text_codec(alphabet)
        boundary = codec.id_of_newline if options.lines else None
        if options.lines and boundary is None:
            raise DfError("the alphabet lacks the line break that ends a line", "use a model that was made of lines")
        if not options.lines and (self._inside or max(map(len, texts)) > 1):
            boundary = codec.end_of_text

        writers = self._open_writers(folder, codec.dtype)
        self._begin()
        write = self._write_lines if options.lines else self._write_texts
        if self._inside:
            write = self._write_documents
        rule = write(Job(codec, texts, writers, boundary, total))
        found = [text for group in texts for text in group]
        lines, characters = sum(text.lines for text in found), sum(text.characters for text in found)
        # A line counts without its line break, which the last line of a file may lack.
        counts = {"lines": lines, "characters_in_lines": characters - lines} if options.lines else {}
        facts = counts if options.lines else {"characters": characters}
        facts["bytes"] = sum(text.source.size for text in found)
        if options.lines:  # elsewhere a blank line is text like any other, and is not counted
            facts["blank_lines"] = sum(text.blank for text in found)
        if lacking := self._unknown.total():
            facts["unknown_characters"] = lacking
            if lacking == characters:
                raise DfError("the model knows none of the characters", "`--codec bytes` makes models that know all")
            shown = ", ".join(repr(character) for character, _ in self._unknown.most_common(5))
            more = ", ..." if len(self._unknown) > 5 else ""
            text = f"{lacking:,} of {characters:,} characters are not scored, because the model does not know them"
            self._on_event(Note(f"{text}: {shown}{more}; a model trained with `--codec bytes` knows every character"))
        if self._inside:
            facts["documents"] = lines
        self._tell_about(found)
        if blank := facts.get("blank_lines"):
            self._on_event(Note(f"{counted(blank, 'blank line')} {'was' if blank == 1 else 'were'} left out"))
        return Made(codec, boundary, self._complete(rule, "text"), facts)

    def _tell_about(self, texts: list[Text]) -> None:
        """Tell what was changed in texts before they became ids, and what they may be meant to be."""
        words = {
            "mark": "byte order marks were left out, of",
            "returns": "line ends of Windows or of old Macs became line feeds, in",
            "UTF-16": "read as UTF-16, as its mark says:",
            "UTF-32": "read as UTF-32, as its mark says:",
        }
        for sentence in sorted(what for text in texts for what in text.about if what.startswith(LACKING)):
            self._on_event(Note(sentence.removeprefix(LACKING)))
        for what, told in words.items():
            if names := [text.source.name for text in texts if what in text.about]:
                self._on_event(Note(f"{told} {list_some(names)}"))
        if self._options.whole:  # how documents are found is settled
            return
        names = [text.source.name for text in texts if named(text.source, "jsonl")]
        if names and not self._options.field:
            hint = "`--field NAME` learns only the text in a field of each"
            self._on_event(Note(f"{list_some(names)} {'holds' if len(names) == 1 else 'hold'} records: {hint}"))
        if names := [text.source.name for text in texts if END_OF_TEXT in text.about]:
            hint = f'`--separator "{END_OF_TEXT}"` makes what stands between them documents'
            self._on_event(Note(f"there are marks {END_OF_TEXT} in {list_some(names)}: {hint}"))

    def _scan(self, source: Source, alphabet: Alphabet | None, total: int) -> Text | None:
        """Read a text for the first time. None where it cannot be used; raises BadText if the user named it."""
        digest, contents = hashlib.sha256(), hashlib.sha256()
        several = sum(map(len, self._groups)) > 1
        found = Alphabet()
        lines = Lines() if self._options.lines else None
        characters = documents = 0
        blank = not self._options.whole  # what is scored is scored as it is
        about: set[str] = set()

        def on_bytes(data: bytes) -> None:
            digest.update(data)
            self._progress("reading", len(data), total, "bytes")

        try:
            for begins, chunk in self._pieces(source, on_bytes, about, lines):
                characters += len(chunk)
                blank = blank and (not chunk or chunk.isspace())
                if not self._inside and END_OF_TEXT in chunk:
                    about.add(END_OF_TEXT)
                if several:
                    contents.update(chunk.encode())
                documents += chunk.count("\n") if lines else begins
                if alphabet is not None:
                    found.add(chunk)
        except DfError as error:
            if source.given:
                raise
            self._skip(source, error.reason if isinstance(error, BadText) else error.message)
            return None
        self._sha256[source] = digest.hexdigest()
        if characters < 2:
            nothing = "nothing but blank lines" if lines and lines.blank else "empty"
            self._skip(source, "too short: 1 character" if characters else nothing)
            return None
        if blank:
            self._skip(source, "nothing but white space")
            return None
        if alphabet is not None:
            alphabet.join(found)
        return Text(source, characters, documents, lines.blank if lines else 0, frozenset(about), contents.digest())

    def _pieces(
        self, source: Source, on_bytes: Callable[[bytes], object], about: set[str], lines: Lines | None = None
    ) -> Pieces:
        """The text of a source in pieces, and which of them begin a document inside it."""
        if self._inside:
            return documents(source, self._options.separator, self._options.field, on_bytes, about)
        chunks = read_text(source, on_bytes, about)
        return ((False, chunk) for chunk in (lines.of(chunks) if lines else chunks))

    def _text_codec(self, alphabet: Alphabet | None) -> TextCodec:
        codec = self._options.codec
        if isinstance(codec, TextCodec):
            return codec
        if alphabet is not None:
            chars = Chars(alphabet.characters())
            if chars.vocab_size >= MANY:
                many = f"a vocabulary of {chars.vocab_size:,} characters makes the model large and slow"
                self._on_event(Note(f"{many}: `--codec bytes` has 256 ids, `--codec bpe` as many as suit the text"))
            reason = "the default for text" if codec is None else "as asked"
            self._on_event(Choice("codec", f"chars, {counted(chars.vocab_size, 'distinct one')}", reason))
            return chars
        if codec == "gpt2":
            assert self._options.bpe is not None
            return GPT2(Path(self._options.bpe))
        if codec != "bytes":  # a codec that was added and that no line here makes
            raise UsageError(f"the codec {codec} cannot be made from a corpus", "give an object of its class")
        return Bytes()

    def _trained(self, texts: list[list[Text]], total: int) -> BPE:
        """A byte-pair encoding of the training split."""
        size, reason = self._options.vocab_size, "as asked"
        if size is None:
            share = 1.0 if self._options.whole else 1 - self._val - self._test
            bytes_ = int(share * sum(text.source.size for text in texts[TRAIN]))
            size, reason = default_vocab_size(bytes_), f"for {counted(bytes_, 'byte')} to learn from"
        self._begin()
        codec = BPE.train(self._training_text(texts, total), size, lines=self._options.lines)
        if codec.vocab_size < size:
            reason += f", {size:,} at most: no more pairs occur twice"
        self._on_event(Choice("codec", f"bpe, {codec.vocab_size:,} ids", reason))
        return codec

    def _training_text(self, texts: list[list[Text]], total: int) -> Iterator[str]:
        """The text of the training split in chunks; of lines, each begins with a line break."""
        if self._inside:
            labels, _ = self._deal(sum(text.lines for text in texts[TRAIN]), "document")
            number, mine = 0, False
            for text in texts[TRAIN]:
                for begins, piece in self._pieces(text.source, self._on_read("learning pairs", total), set()):
                    if begins:
                        number, mine = number + 1, bool(labels(number, number + 1)[0] == TRAIN)
                    if mine:
                        yield piece
            return
        if self._options.lines:
            labels, _ = self._deal(sum(text.lines for text in texts[TRAIN]), "line")
            begun, mine = 0, False
            for text in texts[TRAIN]:
                for chunk in Lines().of(self._read(text.source, total, "learning pairs")):
                    rest, *lines = chunk.split("\n")
                    found = labels(begun, begun + len(lines)) == TRAIN
                    kept = [line for line, kept in zip(lines, found, strict=True) if kept]
                    yield "\n".join([rest if mine else "", *kept])
                    begun, mine = begun + len(lines), bool(found[-1]) if lines else mine
            return
        plan, _ = self._plan(texts, lambda text: text.characters, [TRAIN, VAL, TEST], "text")
        for text, portions in plan:
            characters = _Characters(self._read(text.source, total, "learning pairs"))
            for label, size in portions:
                for chunk in characters.take(size):
                    if label == TRAIN:
                        yield chunk

    def _write_texts(self, job: Job) -> str:
        """Each text is a document; the only one is cut by position."""
        codec, texts, writers, boundary, total = job
        plan, rule = self._plan(texts, lambda text: text.characters, writers, "text")
        self._tell_held_out(plan, writers)
        for text, portions in plan:
            characters = _Characters(self._read(text.source, total))
            for destinations, size in portions:
                for writer in destinations:
                    if boundary is not None:
                        writer.append(np.array([boundary]))
                for ids in self._ids(codec, text.source, characters.take(size)):
                    for writer in destinations:
                        writer.append(ids)
                ended = [writer.end_document() for writer in destinations]
                if not all(ended) and len(portions) == 1:
                    self._skip(text.source, "too short")
        return rule

    def _write_lines(self, job: Job) -> str:
        """Each line is a document; lines of all main texts are dealt out together."""

        def lines(source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for ids in self._ids(job.codec, source, Lines().of(self._read(source, job.total)), lines=True):
                yield ids, np.flatnonzero(ids == job.boundary)

        return self._deal_out("line", job, lines)

    def _write_documents(self, job: Job) -> str:
        """Documents inside files: those of all main files are dealt out together."""
        return self._deal_out(
            "document", job, lambda source: self._document_ids(job.codec, source, job.boundary, job.total)
        )

    def _deal_out(
        self, kind: str, job: Job, encoded: Callable[[Source], Iterator[tuple[np.ndarray, np.ndarray]]]
    ) -> str:
        """Deal out the documents that `encoded` gives of a source: ids [n], and the places [k] among them where
        documents begin. Returns the rule of the split, in words."""
        labels, rule = self._deal(sum(text.lines for text in job.texts[TRAIN]), kind)
        for label, group in enumerate(job.texts):
            dealer = _Dealer(job.writers, labels if label == TRAIN else constant(label))
            for text in group:
                for ids, starts in encoded(text.source):
                    dealer.add(ids, starts)
        return rule + self._shares(self._dealt())

    def _document_ids(
        self, codec: TextCodec, source: Source, boundary: int | None, total: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids [n] of the documents inside a file, and the places [k] among them where documents begin."""
        on_bytes = self._on_read("encoding", total)
        pieces = documents(source, self._options.separator, self._options.field, on_bytes, set())
        parts: list[np.ndarray] = []
        starts: list[int] = []
        size = 0
        for begins, chunks in _grouped(pieces):
            if begins:
                starts.append(size)
                if boundary is not None:
                    parts.append(np.array([boundary], codec.dtype))
                    size += 1
            for ids in self._ids(codec, source, chunks):
                parts.append(ids)
                size += len(ids)
                if size > CHUNK:
                    yield np.concatenate(parts), np.array(starts, np.int64)
                    parts, starts, size = [], [], 0
        if size:
            yield np.concatenate(parts), np.array(starts, np.int64)

    def _read(self, source: Source, total: int, what: str = "encoding") -> Iterator[str]:
        return read_text(source, self._on_read(what, total))

    def _on_read(self, what: str, total: int) -> Callable[[bytes], object]:
        return lambda data: self._progress(what, len(data), total, "bytes")

    def _ids(
        self, codec: TextCodec, source: Source, chunks: Iterable[str], lines: bool = False
    ) -> Iterator[np.ndarray]:
        if self._options.whole and isinstance(codec, Chars):
            chunks = self._known(codec, chunks)
        try:
            if lines and isinstance(codec, GPT2 | BPE):
                yield from _merge_lines(codec, chunks)
            else:
                yield from codec.encode_stream(chunks)
        except DfError as error:
            if isinstance(codec, Chars):
                raise _unknown_character(source, codec, error) from None
            raise

    def _known(self, codec: Chars, chunks: Iterable[str]) -> Iterator[str]:
        """The chunks without the characters that the alphabet lacks, which are counted."""
        unknown = re.compile(f"[^{re.escape(codec.alphabet)}]")
        for chunk in chunks:
            text = unknown.sub("", chunk)
            if len(text) < len(chunk):
                self._unknown.update(unknown.findall(chunk))
            yield text


def _grouped(pieces: Pieces) -> Iterator[tuple[bool, Iterator[str]]]:
    """The pieces of one document after the other."""
    held = next(pieces, None)

    def rest(first: str) -> Iterator[str]:
        nonlocal held
        yield first
        while (held := next(pieces, None)) is not None and not held[0]:
            yield held[1]

    while held is not None:
        begins, text = held
        yield begins, rest(text)


class Alphabet:
    """The distinct characters of texts that come in chunks."""

    def __init__(self) -> None:
        self._ascii = b""
        self._others: set[int] = set()

    def add(self, text: str) -> None:
        if text.isascii():
            new = text.encode().translate(None, self._ascii)  # at memory speed, once most of them are known
            if new:
                counts = np.bincount(np.frombuffer(new, np.uint8), minlength=128)
                self._ascii += np.flatnonzero(counts).astype(np.uint8).tobytes()
            return
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        seen = np.zeros(int(points.max()) + 1, bool)
        seen[points] = True
        self._others.update(np.flatnonzero(seen).tolist())

    def join(self, other: Alphabet) -> None:
        self._ascii += other._ascii
        self._others |= other._others

    def characters(self) -> str:
        return "".join(map(chr, sorted({*self._ascii, *self._others})))


class _Characters:
    """A text that comes in chunks, taken in portions of as many characters as are asked for."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._rest = chunks, ""

    def take(self, count: int) -> Iterator[str]:
        while count and (chunk := self._rest or next(self._chunks, "")):
            portion, self._rest = chunk[:count], chunk[count:]
            count -= len(portion)
            yield portion


class _Dealer:
    """Deals documents that come in chunks of ids to the splits of their labels."""

    def __init__(self, writers: list[Writers], labels: Labels) -> None:
        self._writers, self._labels = writers, labels
        self._documents = 0
        self._open = 0  # label of the document that the next ids go on with

    def add(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """`ids` [n] go on with the open document and begin others at the places `starts` [k]."""
        new = self._labels(self._documents, self._documents + len(starts))
        labels = np.concatenate([[self._open], new])
        lengths = np.diff(np.concatenate([[0], starts, [len(ids)]]))
        for label in (TRAIN, VAL, TEST):
            mine = labels == label
            if not mine.any():
                continue
            kept = ids if mine.all() else ids[np.repeat(mine, lengths)]
            before = np.cumsum(lengths * mine) - lengths * mine
            for writer in self._writers[label]:
                writer.append_documents(kept, before[1:][mine[1:]])
        self._documents += len(starts)
        self._open = int(labels[-1])


def _merge_lines(codec: GPT2 | BPE, chunks: Iterable[str]) -> Iterator[np.ndarray]:
    """Ids of lines (as `Lines` gives them) such that no merge reaches over a line's end."""
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        cut = text.rfind("\n")  # the last line may go on
        if cut <= 0 and len(text) > CHUNK:  # a line of a million characters is cut between words
            cut = text.rfind(" ") if text.rfind(" ") > 0 else len(text)
        if cut > 0:
            yield _merge(codec, text[:cut])
        rest = text[max(cut, 0) :]
    yield _merge(codec, rest)


def _merge(codec: GPT2 | BPE, text: str) -> np.ndarray:
    """Ids of whole lines, each as if it were alone. GPT-2's expression never merges a line break between visible
    characters, so lines without blanks at their ends can be encoded together, which is much faster."""
    first, *lines = text.split("\n")
    if isinstance(codec, BPE):
        newline = np.array([codec.id_of_newline], codec.dtype)
        begun, *ids = codec.encode_lines([first, *lines])
        return np.concatenate([begun, *(part for line in ids for part in (newline, line))])
    parts = [codec.encode(first)]
    for plain, group in groupby(lines, key=lambda line: line == line.strip()):
        if plain:
            parts.append(codec.encode("\n" + "\n".join(group)))
        else:
            for line in group:
                parts += [np.array([codec.id_of_newline], codec.dtype), codec.encode(line)]
    return np.concatenate(parts)


def _unknown_character(source: Source, codec: Chars, error: DfError) -> DfError:
    """The error for a character that the alphabet lacks, with its place in the file."""
    known = {*codec.alphabet, "\r"}  # of line breaks, a "\r" may have been dropped
    with source.open() as file:
        place = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    line = 1
    for chunk in read_text(source, lambda data: None, newlines=False):
        found = next((i for i, character in enumerate(chunk) if character not in known), None)
        before = chunk[:found]
        place, line = place + len(before.encode()), line + before.count("\n")
        if found is not None:
            character = chunk[found]
            return DfError(
                f"{source.name} holds {character!r} (U+{ord(character):04X}) at byte {place:,} (line {line:,}), "
                "which the alphabet lacks",
                error.hint,
            )
    return DfError(f"{source.name}: {error.message}", error.hint)


def _no_separator(separator: str, name: str) -> UsageError:
    """The error for a separator that does not occur in the only text."""
    hint = "the separator must stand in the text exactly as it is given"
    if "\\n" in separator or "\\t" in separator:  # as it is typed in a program, where it means a line break
        hint = f"in bash and zsh type a line break as `--separator $'{separator}'`"
    return UsageError(f"the separator {separator!r} does not occur in {name}", hint)
