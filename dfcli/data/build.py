"""How a dataset is built: sources through a codec into splits, with memory for a few chunks.

Text is read twice: scanned (is it UTF-8, which characters, how many lines), then encoded straight into its
splits. Recordings are decoded once, into one file of ids, and dealt out afterwards, because only decoding
tells which of them can be used.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from dfcli.codecs import GPT2, Bytes, Chars, Codec, MuLaw, TextCodec
from dfcli.data import splits as rules
from dfcli.data.audio import Recording, Report
from dfcli.data.dataset import BLOCK, FILE, FORMAT, SplitWriter
from dfcli.data.sources import (
    CHUNK,
    BadText,
    Kind,
    Lines,
    Skipped,
    Source,
    Stamp,
    list_some,
    note_skipped,
    nothing_usable,
    read_text,
)
from dfcli.data.splits import TEST, TRAIN, VAL, Labels
from dfcli.errors import DfError, UsageError
from dfcli.system.events import Choice, Note, OnEvent, Progress
from dfcli.system.files import write_json
from dfcli.system.words import counted

SPLITS = ("train", "val", "test")  # by label
SOURCES = "sources.jsonl"  # beside dataset.json: what each source was when it was read
MAX_RATE = 16_000  # Hz that are chosen without being asked for
CLIPPED = 0.001  # share of samples at full scale from which on a recording is reported
OFF_CENTRE = 0.01  # mean level from which on a recording is reported, full scale being 1
NAMED = 1000  # skipped files that dataset.json names


@dataclass(frozen=True)
class Options:
    """What a dataset is made by, apart from its sources; see `prepare.prepare`."""

    codec: str | Codec | None
    bpe: str | None  # for the gpt2 codec alone
    lines: bool
    sample_rate: int | None
    val_fraction: float
    test_fraction: float
    normalize: str
    quantizer: str
    split_rule: str
    lead: int
    whole: bool

    def as_json(self) -> dict[str, Any]:
        codec = self.codec.to_json() if isinstance(self.codec, Codec) else self.codec
        return {**vars(self), "codec": codec}


class Made(NamedTuple):
    """What encoding the sources settled."""

    codec: Codec
    boundary: int | None
    rule: str
    facts: dict[str, Any]


class Text(NamedTuple):
    """A text that was scanned and can be used."""

    source: Source
    characters: int
    lines: int
    blank: int


class Sound(NamedTuple):
    """A recording that was decoded: where its ids lie in the file of all ids."""

    source: Source
    start: int
    samples: int
    report: Report


Writers = tuple[SplitWriter, ...]
D = TypeVar("D")


class Build:
    """One preparation. `groups` are the sources of train, val and test; `skipped` grows by what cannot be used."""

    def __init__(
        self,
        groups: Sequence[Sequence[Source]],
        kind: Kind,
        options: Options,
        skipped: list[Skipped],
        on_event: OnEvent,
    ) -> None:
        self._groups, self._kind, self._options = groups, kind, options
        self._skipped, self._on_event = skipped, on_event
        # Sources of its own for a split replace its share of the rest.
        self._val = 0.0 if groups[VAL] else options.val_fraction
        self._test = 0.0 if groups[TEST] else options.test_fraction
        self._sha256: dict[Source, str] = {}
        self._marked: list[str] = []  # texts with a byte order mark
        self._writers: list[SplitWriter] = []
        self._done = 0.0

    def run(self, folder: Path, name: str, key: str) -> dict[str, Any]:
        """Fill `folder` with the dataset; gives what stands in its dataset.json. Raises DfError."""
        stamps = {source: (source.stamp(), time.time_ns()) for group in self._groups for source in group}
        with ExitStack() as stack:
            stack.callback(lambda: [writer.close() for writer in self._writers])
            made = self._texts(folder) if self._kind == "text" else self._recordings(folder)
            end = made.boundary if self._options.lines else None
            records = {writer.name: writer.finish(end) for writer in self._writers}
        for source, (stamp, _) in stamps.items():
            if source.stamp() != stamp:
                raise DfError(f"{source.name} changed while it was read", "try again when nothing writes to it")
        if not records[self._writers[0].name]:
            raise nothing_usable(self._skipped)
        for split, record in records.items():
            if not record and self._is_wanted(split):
                self._on_event(Note(f"the data are too short for a {split} split: there is none"))

        made.codec.save_files(folder)
        sources = self._describe(stamps)
        (folder / SOURCES).write_bytes(sources)
        splits = {split: record for split, record in records.items() if record}
        info = {
            "format": FORMAT,
            "name": name,
            "kind": self._kind,
            "codec": made.codec.to_json(),
            "vocab_size": made.codec.vocab_size,
            "dtype": made.codec.dtype.name,
            "boundary": made.boundary,
            "lines": self._options.lines,
            "lead": self._options.lead,
            "fingerprint": _fingerprint(made, self._options.lines, splits),
            "split_rule": made.rule,
            "splits": splits,
            "facts": made.facts,
            "skipped": {"count": len(self._skipped), "files": [asdict(file) for file in self._skipped[:NAMED]]},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "options": self._options.as_json(),
            "key": key,
            "sources": {"count": len(self._sha256), "sha256": hashlib.sha256(sources).hexdigest()},
        }
        write_json(folder / FILE, info)
        note_skipped(info["skipped"], self._on_event)
        return info

    def _is_wanted(self, split: str) -> bool:
        return bool({"val": self._val or self._groups[VAL], "test": self._test or self._groups[TEST]}.get(split))

    def _open_writers(self, folder: Path, dtype: np.dtype[Any]) -> list[Writers]:
        """For each label the splits that a document with it goes to."""
        self._writers = [SplitWriter(folder, name, dtype) for name in (("all",) if self._options.whole else SPLITS)]
        if self._options.whole:
            return [(self._writers[0],)] * 3
        train, val, test = self._writers
        if self._options.split_rule == "makemore-transformer":  # it validates on the test words
            return [(train,), (val,), (val, test)]
        return [(train,), (val,), (test,)]

    def _deal(self, n: int, what: str) -> tuple[Labels, str]:
        """How `n` documents (each called `what`) are dealt out, and the rule as a sentence."""
        if self._options.whole:
            return _constant(TRAIN), "everything in one split"
        if self._options.split_rule == "makemore":
            return rules.makemore(n)
        if self._options.split_rule == "makemore-transformer":
            return rules.makemore_transformer(n)
        if self._val or self._test:
            return rules.by_shuffle(n, self._val, self._test, what)
        return _constant(TRAIN), f"the only {what} trains" if n == 1 else f"all {n:,} {what}s train"

    def _plan(
        self, groups: list[list[D]], size: Callable[[D], int], writers: list[Writers], what: str
    ) -> tuple[list[tuple[D, list[tuple[Writers, int]]]], str]:
        """Which part of each document goes where, in order, and the rule as a sentence. Documents are dealt out whole,
        but an only one is cut by position."""
        main = groups[TRAIN]
        if len(main) == 1 and not self._options.whole and (self._val or self._test):
            sizes, rule = rules.by_position(size(main[0]), self._val, self._test)
            plan = [(main[0], list(zip(writers, sizes, strict=True)))]
        else:
            labels, rule = self._deal(len(main), what)
            chosen = labels(0, len(main)).tolist()
            plan = [(document, [(writers[k], size(document))]) for document, k in zip(main, chosen, strict=True)]
        plan += [(document, [(writers[k], size(document))]) for k in (VAL, TEST) for document in groups[k]]
        return plan, rule

    def _complete(self, rule: str, what: str) -> str:
        """The rule with what has sources of its own, told."""
        for k, verb in ((VAL, "validate"), (TEST, "test")):
            if n := len(self._groups[k]):
                rule += f"; {counted(n, what)} given for it {verb}{'s' if n == 1 else ''}"
        if not self._options.whole:
            self._on_event(Choice("split", rule, "fixed, so that figures can be compared"))
        return rule

    def _skip(self, source: Source, reason: str) -> None:
        self._skipped.append(Skipped(source.name, reason))

    def _begin(self) -> None:
        self._done = 0.0

    def _progress(self, what: str, amount: float, total: float | None, unit: str) -> None:
        self._done += amount
        self._on_event(Progress(what, int(self._done), None if total is None else int(total), unit))

    def _describe(self, stamps: dict[Source, tuple[Stamp | None, int]]) -> bytes:
        lines = []
        for k, group in enumerate(self._groups):
            for source in group:
                stamp, read_at = stamps[source]
                entry = [k, source.identity, stamp, read_at, self._sha256.get(source)]
                lines.append(json.dumps(entry).encode() + b"\n")
        return b"".join(lines)

    # Text ------------------------------------------------------------------------------------------------------------

    def _texts(self, folder: Path) -> Made:
        options = self._options
        alphabet = Alphabet() if options.codec in (None, "chars") else None
        total = sum(source.size for group in self._groups for source in group)
        self._begin()
        scanned = [[self._scan(source, alphabet, total) for source in group] for group in self._groups]
        texts = [[text for text in group if text is not None] for group in scanned]
        if not texts[TRAIN]:
            raise nothing_usable(self._skipped)
        codec = self._text_codec(alphabet)
        boundary = codec.id_of_newline if options.lines else None
        if options.lines and boundary is None:
            raise DfError("the alphabet lacks the line break that ends a line", "use a model that was made of lines")
        if not options.lines and max(map(len, texts)) > 1:
            boundary = codec.end_of_text

        writers = self._open_writers(folder, codec.dtype)
        self._begin()
        write = self._write_lines if options.lines else self._write_texts
        rule = write(codec, texts, writers, boundary, total)
        found = [text for group in texts for text in group]
        lines, characters = sum(text.lines for text in found), sum(text.characters for text in found)
        # A line counts without its line break, which the last line of a file may lack.
        counts = {"lines": lines, "characters_in_lines": characters - lines}
        facts = (counts if options.lines else {"characters": characters}) | {
            "bytes": sum(text.source.size for text in found),
            "blank_lines": sum(text.blank for text in found),
        }
        if self._marked:
            self._on_event(Note(f"byte order marks were left out, of {list_some(self._marked)}"))
        if facts["blank_lines"]:
            were = "was" if facts["blank_lines"] == 1 else "were"
            self._on_event(Note(f"{counted(facts['blank_lines'], 'blank line')} {were} left out"))
        return Made(codec, boundary, self._complete(rule, "text"), facts)

    def _scan(self, source: Source, alphabet: Alphabet | None, total: int) -> Text | None:
        """Read a text for the first time. None where it cannot be used; raises BadText if the user named it."""
        digest = hashlib.sha256()
        found = Alphabet()
        lines = Lines() if self._options.lines else None
        characters = documents = 0
        marked = False

        def on_bytes(data: bytes) -> None:
            nonlocal marked
            marked = marked or (not characters and data.startswith(codecs.BOM_UTF8))
            digest.update(data)
            self._progress("reading", len(data), total, "bytes")

        try:
            chunks = read_text(source, on_bytes)
            for chunk in lines.of(chunks) if lines else chunks:
                characters += len(chunk)
                documents += chunk.count("\n") if lines else 0
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
        if marked:
            self._marked.append(source.name)
        if alphabet is not None:
            alphabet.join(found)
        return Text(source, characters, documents, lines.blank if lines else 0)

    def _text_codec(self, alphabet: Alphabet | None) -> TextCodec:
        codec = self._options.codec
        if isinstance(codec, TextCodec):
            return codec
        if alphabet is not None:
            chars = Chars(alphabet.characters())
            reason = "the default for text" if codec is None else "as asked"
            self._on_event(Choice("codec", f"chars, {counted(chars.vocab_size, 'distinct one')}", reason))
            return chars
        return Bytes() if self._options.bpe is None else GPT2(Path(self._options.bpe))

    def _write_texts(
        self,
        codec: TextCodec,
        texts: list[list[Text]],
        writers: list[Writers],
        boundary: int | None,
        total: int,
    ) -> str:
        """Each text is a document; the only one is cut by position."""
        plan, rule = self._plan(texts, lambda text: text.characters, writers, "text")
        for text, portions in plan:
            characters = _Characters(self._read(text.source, total))
            for destinations, size in portions:
                for writer in destinations:
                    if boundary is not None:
                        writer.append(np.array([boundary]))
                for ids in self._encode(codec, text.source, characters.take(size)):
                    for writer in destinations:
                        writer.append(ids)
                ended = [writer.end_document() for writer in destinations]
                if not all(ended) and len(portions) == 1:
                    self._skip(text.source, "too short")
        return rule

    def _write_lines(
        self,
        codec: TextCodec,
        texts: list[list[Text]],
        writers: list[Writers],
        boundary: int | None,
        total: int,
    ) -> str:
        """Each line is a document; lines of all main texts are dealt out together."""
        labels, rule = self._deal(sum(text.lines for text in texts[TRAIN]), "line")
        for label, group in enumerate(texts):
            dealer = _Dealer(writers, labels if label == TRAIN else _constant(label))
            for text in group:
                chunks = Lines().of(self._read(text.source, total))
                for ids in self._encode(codec, text.source, chunks, lines=True):
                    dealer.add(ids, np.flatnonzero(ids == boundary))
        return rule

    def _read(self, source: Source, total: int) -> Iterator[str]:
        return read_text(source, lambda data: self._progress("encoding", len(data), total, "bytes"))

    def _encode(
        self, codec: TextCodec, source: Source, chunks: Iterable[str], lines: bool = False
    ) -> Iterator[np.ndarray]:
        try:
            if lines and isinstance(codec, GPT2):
                yield from _merge_lines(codec, chunks)
            else:
                yield from codec.encode_stream(chunks)
        except DfError as error:
            if isinstance(codec, Chars):
                raise _unknown_character(source, codec, error) from None
            raise

    # Audio -----------------------------------------------------------------------------------------------------------

    def _recordings(self, folder: Path) -> Made:
        groups = [[found for source in group if (found := self._probe(source))] for group in self._groups]
        if not groups[TRAIN]:
            raise nothing_usable(self._skipped)
        codec = self._audio_codec([recording.rate for group in groups for _, recording in group])
        seconds = sum((recording.frames or 0) / recording.rate for group in groups for _, recording in group)
        path = folder / "recordings.ids"
        self._begin()
        with path.open("w+b") as ids:
            sounds = [
                [sound for found in group if (sound := self._decode(*found, codec, ids, seconds))] for group in groups
            ]
            if not sounds[TRAIN]:
                raise nothing_usable(self._skipped)
            writers = self._open_writers(folder, codec.dtype)
            rule = self._write_recordings(codec, sounds, writers, ids)
        path.unlink()
        every = [sound for group in sounds for sound in group]
        return Made(codec, codec.zero_level, self._complete(rule, "recording"), self._levels(every, codec))

    def _probe(self, source: Source) -> tuple[Source, Recording] | None:
        if source.path is None:
            raise UsageError("recordings cannot be read from standard input", "give files or a folder")
        try:
            return source, Recording(source.path)
        except DfError as error:
            self._refuse(source, error)
            return None

    def _refuse(self, source: Source, error: DfError) -> None:
        """Skip a recording that cannot be used; raises if the user named it."""
        if source.given:
            raise DfError(f"{source.name} cannot be used: {error.message}", error.hint) from None
        self._skip(source, error.message)

    def _audio_codec(self, found: list[int]) -> MuLaw:
        codec, wanted = self._options.codec, self._options.sample_rate
        if isinstance(codec, MuLaw):
            if wanted not in (None, codec.sample_rate):
                raise UsageError(f"the codec is one of {codec.sample_rate:,} Hz", "leave out `--sample-rate`")
            return codec
        if wanted is not None:
            return MuLaw(wanted, self._options.quantizer)
        counts = Counter(found)
        common = max(counts, key=lambda rate: (counts[rate], -rate))
        rate = min(common, MAX_RATE)
        if len(counts) == 1:
            have, rest = "all recordings have" if len(found) > 1 else "the recording has", ""
        else:
            have = f"{counts[common]:,} of {len(found):,} recordings {'has' if counts[common] == 1 else 'have'}"
            rest = ", and no other rate is more common"
        reason = f"{have} it{rest}"
        if rate < common:
            reason = f"the highest that is chosen without --sample-rate; {have} {common:,} Hz{rest}"
        self._on_event(Choice("sample rate", f"{rate:,} Hz", reason))
        return MuLaw(rate, self._options.quantizer)

    def _decode(
        self, source: Source, recording: Recording, codec: MuLaw, ids: IO[bytes], seconds: float
    ) -> Sound | None:
        """Append the ids of a recording to the file of all. None, and nothing appended, where it cannot be used."""
        start = ids.tell()
        try:
            self._sha256[source] = source.sha256()
            for block in recording.stream(codec.sample_rate, self._options.normalize):
                ids.write(codec.encode(block).tobytes())
                self._progress("encoding", len(block) / codec.sample_rate, seconds, "seconds of audio")
            assert recording.report is not None
            return Sound(source, start, ids.tell() - start, recording.report)
        except DfError as error:
            ids.seek(start)
            ids.truncate()
            self._refuse(source, error)
            return None

    def _write_recordings(self, codec: MuLaw, sounds: list[list[Sound]], writers: list[Writers], ids: IO[bytes]) -> str:
        """Each recording is a document; the only one is cut by position."""
        plan, rule = self._plan(sounds, lambda sound: sound.samples, writers, "recording")
        for sound, portions in plan:
            ids.seek(sound.start)
            for destinations, size in portions:
                for writer in destinations:
                    writer.append(np.array([codec.zero_level]))
                for done in range(0, size, BLOCK):
                    block = np.frombuffer(ids.read(min(BLOCK, size - done)), np.uint8)
                    for writer in destinations:
                        writer.append(block)
                for writer in destinations:
                    writer.end_document()
        return rule

    def _levels(self, sounds: list[Sound], codec: MuLaw) -> dict[str, Any]:
        """What the recordings sound like; what is wrong with them is told."""
        odd = {
            "silent": [sound for sound in sounds if sound.report.silent],
            "clipped": [sound for sound in sounds if sound.report.clipped > CLIPPED],
            "off_centre": [
                sound for sound in sounds if abs(sound.report.offset) > OFF_CENTRE and not sound.report.silent
            ],
        }
        words = {
            "silent": "silent",
            "clipped": f"clipped (over {CLIPPED:.1%} of the samples at full scale)",
            "off_centre": f"off-centre (mean level beyond {OFF_CENTRE:.0%} of full scale)",
        }
        for what, found in odd.items():
            if found:
                names = list_some([sound.source.name for sound in found])
                share = f"{len(found):,} of {counted(len(sounds), 'recording')} {'is' if len(found) == 1 else 'are'}"
                self._on_event(Note(f"{share} {words[what]}: {names}"))
        seconds = sum(sound.samples for sound in sounds) / codec.sample_rate
        return {"recordings": len(sounds), "seconds": seconds, **{what: len(found) for what, found in odd.items()}}


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


def _constant(label: int) -> Labels:
    return lambda start, stop: np.full(stop - start, label, np.uint8)


def _merge_lines(codec: GPT2, chunks: Iterable[str]) -> Iterator[np.ndarray]:
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


def _merge(codec: GPT2, text: str) -> np.ndarray:
    """Ids of whole lines, each as if it were alone. Between visible characters a line break is never
    merged, so lines without blanks at their ends can be encoded together, which is much faster."""
    first, *lines = text.split("\n")
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
    for chunk in read_text(source, lambda data: None):
        found = next((i for i, character in enumerate(chunk) if character not in known), None)
        before = chunk[:found]
        place, line = place + len(before.encode()), line + before.count("\n")
        if found is not None:
            character = chunk[found]
            return DfError(
                f"{source.name} holds {character!a} (U+{ord(character):04X}) at byte {place:,} (line {line:,}), "
                "which the alphabet lacks",
                error.hint,
            )
    return DfError(f"{source.name}: {error.message}", error.hint)


def _fingerprint(made: Made, lines: bool, splits: dict[str, dict[str, Any]]) -> str:
    content = [made.codec.to_json(), made.boundary, lines]
    content += [[split, record["tokens_sha256"], record["offsets_sha256"]] for split, record in splits.items()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
