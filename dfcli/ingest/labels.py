"""Labels of recordings: who speaks, what is said, from folder names or from named groups of a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from dfcli.errors import DfError, UsageError
from dfcli.ingest.sources import Source, shown

FOLDER = "folder"
MOST_NAMES = 100_000  # of one label; an embedding has a row for each
EXAMPLE = r"for example `--label '(?P<digit>\d)_(?P<speaker>[a-z]+)_'`, or `--label folder`"


class Labelling:
    """How a recording's path says its labels.

    `rule` is "folder" (the first folder below the source that the user named is the label `folder`) or a regular
    expression with named groups, which is searched for in the path below that source. Raises UsageError for a rule that
    cannot be used.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self._pattern: re.Pattern[str] | None = None
        if rule != FOLDER:
            try:
                self._pattern = re.compile(rule)
            except re.error as error:
                raise UsageError(f"`--label {shown(rule)}` is no regular expression: {error}", EXAMPLE) from None
            if not self._pattern.groupindex:
                raise UsageError(f"`--label {shown(rule)}` has no named group", EXAMPLE)
        self.labels = sorted(self._pattern.groupindex) if self._pattern else [FOLDER]

    def of(self, source: Source) -> tuple[str, ...]:
        """The name for each of `labels`. Raises DfError, naming the source, where one is missing or cannot be shown."""
        if self._pattern is None:
            folders = PurePosixPath(source.below).parts[:-1]
            found = {FOLDER: folders[0] if folders else None}
        else:
            match = self._pattern.search(source.below)
            found = match.groupdict() if match else dict.fromkeys(self.labels)
        for label, name in found.items():
            if not name:
                why = "it lies in no folder below its source" if self._pattern is None else "the pattern finds none"
                raise DfError(
                    f"{source.name} has no label `{label}`: {why}", "change `--label`, or leave out this recording"
                )
            if not name.isprintable():
                raise DfError(
                    f"{source.name} has the label {name!a}, which cannot be shown", "rename it, or change `--label`"
                )
        return tuple(str(found[label]) for label in self.labels)

    def number(self, sources: Iterable[Source]) -> tuple[dict[str, list[str]], dict[Source, tuple[int, ...]]]:
        """The sorted names of each label, and each source's labels as places among them. Raises DfError."""
        found = {source: self.of(source) for source in sources}
        names = {label: sorted({row[k] for row in found.values()}) for k, label in enumerate(self.labels)}
        places = []
        for label in self.labels:
            _check_names(label, names[label])
            places.append({name: place for place, name in enumerate(names[label])})
        numbers = {
            source: tuple(known[name] for known, name in zip(places, row, strict=True)) for source, row in found.items()
        }
        return names, numbers


def untrained(names: dict[str, list[str]], rows: Sequence[tuple[int, ...]]) -> list[str]:
    """The names that none of the training recordings (`rows`) has."""
    missing = []
    for k, (label, every) in enumerate(names.items()):
        there = np.zeros(len(every), bool)
        there[[row[k] for row in rows]] = True
        missing += [f"{label}={every[place]}" for place in np.flatnonzero(~there)]
    return missing


def _check_names(label: str, names: list[str]) -> None:
    if len(names) > MOST_NAMES:
        raise DfError(f"the label `{label}` has {len(names):,} names, more than {MOST_NAMES:,}", "change `--label`")
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise DfError(
                f"the {label}s {other!r} and {name!r} differ only by case", "rename one of them, or change `--label`"
            )
