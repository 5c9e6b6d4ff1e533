"""How a dataset is built: sources through a codec into splits, with memory for a few chunks.

Here is what text (`texts.py`) and audio (`recordings.py`) have in common.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from dfcli.codecs import Codec
from dfcli.data.dataset import FILE, FORMAT, SplitWriter
from dfcli.errors import DfError
from dfcli.ingest import splits as rules
from dfcli.ingest.options import Options
from dfcli.ingest.sources import Kind, Skipped, Source, Stamp, list_some, note_skipped, nothing_usable
from dfcli.ingest.splits import TEST, TRAIN, VAL, Labels
from dfcli.system.events import Choice, Note, OnEvent, Progress
from dfcli.system.files import write_json
from dfcli.system.words import counted

SPLITS = ("train", "val", "test")  # by label
SOURCES = "sources.jsonl"  # beside dataset.json: what each source was when it was read
NAMED = 1000  # skipped files that dataset.json names


class Made(NamedTuple):
    """What encoding the sources settled."""

    codec: Codec
    boundary: int | None
    rule: str
    facts: dict[str, Any]
    labels: dict[str, list[str]] | None = None
    """The names of each label."""
    fidelity: dict[str, dict[str, Any]] | None = None
    """What the codec costs, by split; see `fidelity.summary`."""


Writers = tuple[SplitWriter, ...]
D = TypeVar("D")
W = TypeVar("W")


class Build(ABC):
    """One preparation. `groups` are the sources of train, val and test; `skipped` grows by what cannot be used."""

    kind: ClassVar[Kind]

    def __init__(
        self, groups: Sequence[Sequence[Source]], options: Options, skipped: list[Skipped], on_event: OnEvent
    ) -> None:
        self._groups, self._options = groups, options
        self._skipped, self._on_event = skipped, on_event
        # Sources of its own for a split replace its share of the rest.
        self._val = 0.0 if groups[VAL] else options.val_fraction
        self._test = 0.0 if groups[TEST] else options.test_fraction
        self._sha256: dict[Source, str] = {}
        self._writers: list[SplitWriter] = []
        self._done = 0.0

    def run(self, folder: Path, name: str, key: str, given: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Fill `folder` with the dataset; gives what stands in its dataset.json. `given` are the paths of the files and
        folders for train, val and test. Raises DfError."""
        stamps = {source: (source.stamp(), time.time_ns()) for group in self._groups for source in group}
        with ExitStack() as stack:
            stack.callback(lambda: [writer.close() for writer in self._writers])
            made = self._encode(folder)
            end = made.boundary if self._options.lines else None
            records = {writer.name: writer.finish(end) for writer in self._writers}
        for source, (stamp, _) in stamps.items():
            if source.stamp() != stamp:
                raise DfError(f"{source.name} changed while it was read", "try again when nothing writes to it")
        if not records[self._writers[0].name]:
            if self._skipped:
                raise nothing_usable(self._skipped, self._options.purpose)
            raise DfError(f"the data are too short: nothing is left to {self._options.purpose}", "give more")
        for split, record in records.items():
            if not record and self._is_wanted(split):
                self._on_event(Note(f"the data are too short for a {split} split: there is none"))

        made.codec.save_files(folder)
        sources = self._describe(stamps)
        (folder / SOURCES).write_bytes(sources)
        read = {"count": len(self._sha256), "sha256": hashlib.sha256(sources).hexdigest(), "given": given}
        splits = {split: record for split, record in records.items() if record}
        info = {
            "format": FORMAT,
            "name": name,
            "kind": self.kind,
            "codec": made.codec.to_json(),
            "vocab_size": made.codec.vocab_size,
            "dtype": made.codec.dtype.name,
            "boundary": made.boundary,
            "lines": self._options.lines,
            "lead": self._options.lead,
            "fingerprint": _fingerprint(made, self._options.lines, splits),
            **({} if made.labels is None else {"labels": made.labels}),
            **({} if made.fidelity is None else {"fidelity": made.fidelity}),
            "split_rule": made.rule,
            "splits": splits,
            "facts": made.facts,
            "skipped": {"count": len(self._skipped), "files": [asdict(file) for file in self._skipped[:NAMED]]},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "options": self._options.as_json(),
            "key": key,
            "sources": read,
        }
        write_json(folder / FILE, info)
        note_skipped(info["skipped"], self._on_event)
        return info

    @abstractmethod
    def _encode(self, folder: Path) -> Made:
        """Encode the sources into splits in `folder`, by the writers that `_open_writers` gives."""

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
            return rules.constant(TRAIN), "everything in one split"
        if self._options.split_rule == "makemore":
            return rules.makemore(n)
        if self._options.split_rule == "makemore-transformer":
            return rules.makemore_transformer(n)
        if self._val or self._test:
            return rules.by_shuffle(n, self._val, self._test, what)
        return rules.constant(TRAIN), f"the only {what} trains" if n == 1 else f"all {n:,} {what}s train"

    def _plan(
        self, groups: list[list[D]], size: Callable[[D], int], writers: list[W], what: str
    ) -> tuple[list[tuple[D, list[tuple[W, int]]]], str]:
        """Which part of each document goes to which of `writers` (one a label), in order, and the rule as a sentence.
        Documents are dealt out whole, but each is cut by position where there are few, or where their unequal sizes
        would not give the shares that were asked for."""
        main = groups[TRAIN]
        sizes = [size(document) for document in main]
        few = len(main) <= rules.FEW and not self._options.whole and bool(self._val or self._test)
        labels, rule = (rules.constant(TRAIN), "") if few else self._deal(len(main), what)
        chosen = labels(0, len(main)).tolist()
        dealt = [sum(n for n, k in zip(sizes, chosen, strict=True) if k == label) for label in (TRAIN, VAL, TEST)]
        if few or not self._fair(dealt):
            cut = [rules.by_position(n, self._val, self._test) for n in sizes]
            plan = [(d, list(zip(writers, parts, strict=True))) for d, (parts, _) in zip(main, cut, strict=True)]
            rule = cut[0][1] if len(main) == 1 else f"each of {counted(len(main), what)} {cut[0][1]}"
        else:
            plan = [(d, [(writers[k], n)]) for d, n, k in zip(main, sizes, chosen, strict=True)]
            rule += self._shares(dealt)
        plan += [(document, [(writers[k], size(document))]) for k in (VAL, TEST) for document in groups[k]]
        return plan, rule

    def _tell_held_out(self, plan: list[tuple[Any, list[tuple[Writers, int]]]], writers: list[Writers]) -> None:
        """Name the documents that are held out whole, with their true share."""
        total = sum(size for _, portions in plan for _, size in portions)
        for label, verb in ((VAL, "validate"), (TEST, "test")):
            held = [(document.source.name, portions[0][1]) for document, portions in plan if len(portions) == 1
                    and portions[0][0] == writers[label] != writers[TRAIN]]  # fmt: skip
            if held:
                share = sum(size for _, size in held) / total
                names = list_some([name for name, _ in held])
                self._on_event(Note(f"held out to {verb}, {share:.1%} of the data: {names}"))

    def _fair(self, dealt: list[int]) -> bool:
        """Whether documents that a shuffle dealt out, of these sizes a label, give each split between half and twice
        its share."""
        if self._options.whole or self._options.split_rule != "auto":
            return True
        asked = ((dealt[VAL], self._val * sum(dealt)), (dealt[TEST], self._test * sum(dealt)))
        return all(wanted / 2 <= found <= 2 * wanted for found, wanted in asked)

    def _shares(self, dealt: list[int]) -> str:
        """The end of the rule of a shuffle that dealt out these sizes a label: the true shares."""
        if self._options.whole or self._options.split_rule != "auto" or not (self._val or self._test):
            return ""
        return f": {rules.shares(dealt)}"

    def _dealt(self) -> list[int]:
        """The ids that each label has, without those of sources of its own."""
        return [0 if self._groups[k] and k != TRAIN else writer.tokens for k, writer in enumerate(self._writers)]

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

    def _without_copies(
        self, groups: list[list[D]], contents: Callable[[D], bytes], source: Callable[[D], Source]
    ) -> None:
        """Leave out, in place, documents with the same `contents` as another: those given for testing or validation
        stay, so that no copy stands on two sides of a split."""
        if self._options.whole:
            return
        first: dict[bytes, Source] = {}
        for k in (TEST, VAL, TRAIN):
            kept = []
            for document in groups[k]:
                if (other := first.setdefault(contents(document), source(document))) is source(document):
                    kept.append(document)
                else:
                    self._skip(source(document), f"the same contents as {other.name}")
            groups[k][:] = kept

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


def _fingerprint(made: Made, lines: bool, splits: dict[str, dict[str, Any]]) -> str:
    content = [made.codec.to_json(), made.boundary, lines]
    content += [[split, record["tokens_sha256"], record["offsets_sha256"]] for split, record in splits.items()]
    if made.labels is not None:
        content += [made.labels, [record["labels_sha256"] for record in splits.values()]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
