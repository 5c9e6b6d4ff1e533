"""Baselines to compare a loss with: models that need no training, on exactly the targets of a sweep.

uniform   every id is as likely as any other: log V
unigram   p(x)       = (count(x) + 1) / (targets + V)
bigram    p(x | a)   = (count(a x) + 1) / (count(a .) + V)
trigram   p(x | a b) = (count(a b x) + 1) / (count(a b .) + V)

Counts are those of the train split, with add-one smoothing (Laplace), over the same pairs of context and
target that a model is trained on: they never cross from one document into the next, and a boundary is a
context like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dfcli.data.dataset import Dataset
from dfcli.system.events import OnEvent, Progress, ignore

_BLOCK = 1 << 20  # targets counted at a time
_TABLE = 257 * 256 * 256  # entries of the largest table of counts (135 MB): trigrams of up to 256 ids

Ids = NDArray[np.int64]


def count_targets(dataset: Dataset, split: str, first: int | None = None) -> Ids:
    """How often each id is a target in a split, or among its `first` targets: [V] int64."""
    counts = np.zeros(dataset.vocab_size, np.int64)
    for _, _, targets in _targets(dataset, split, first):
        counts += np.bincount(targets, minlength=len(counts))
    return counts


def baselines(
    scored: tuple[Dataset, str], train: tuple[Dataset, str] | None, first: int | None = None, on_event: OnEvent = ignore
) -> dict[str, float]:
    """Nats per token of each baseline over the targets of the split `scored` (all, or its `first`), counted on `train`,
    by name.

    Both are (dataset, split) with one codec. Without `train` there is only the uniform one; the trigram is
    left out where its table of counts, V^3, does not fit. Both splits are streamed: memory is that of the
    tables.
    """
    size = scored[0].vocab_size
    losses = {"uniform": math.log(size)}
    if train is None:
        return losses
    for order, name in enumerate(("unigram", "bigram", "trigram"), 1):
        if name == "trigram" and (size + 1) * size**2 > _TABLE:
            break
        losses[name] = _ngram(scored, train, order, first, on_event)
    return losses


def _ngram(
    scored: tuple[Dataset, str], train: tuple[Dataset, str], order: int, first: int | None, on_event: OnEvent
) -> float:
    size = scored[0].vocab_size
    if order < 3 and size**order > _TABLE:  # only what is scored need be counted
        keys = np.empty(0, np.int64)
        for codes in _codes(*scored, order, first):
            keys = np.union1d(keys, codes)
        counts: _Table | _Chosen = _Chosen(keys)
    else:
        counts = _Table((size + (order == 3)) * size ** (order - 1))
    contexts = _Table((size + (order == 3)) * size ** (order - 2) if order > 1 else 1)

    done, total = 0, train[0].splits[train[1]].tokens_count
    for codes in _codes(*train, order):
        counts.add(codes)
        contexts.add(codes // size)
        done += len(codes)
        on_event(Progress(f"{order}-grams of the train split", done, total, "tokens"))
    nats, tokens = 0.0, 0
    for codes in _codes(*scored, order, first):
        nats -= float(np.log((counts.of(codes) + 1) / (contexts.of(codes // size) + size)).sum())
        tokens += len(codes)
    return nats / tokens


class _Table:
    """Counts of all codes 0 .. size - 1."""

    def __init__(self, size: int) -> None:
        self._counts = np.zeros(size, np.int64)

    def add(self, codes: Ids) -> None:
        np.add.at(self._counts, codes, 1)

    def of(self, codes: Ids) -> Ids:
        return self._counts[codes]


class _Chosen:
    """Counts of the codes in `keys` (sorted), where a table of all codes would not fit."""

    def __init__(self, keys: Ids) -> None:
        self._keys = keys
        self._counts = np.zeros(len(keys), np.int64)

    def add(self, codes: Ids) -> None:
        places = np.searchsorted(self._keys, codes).clip(max=len(self._keys) - 1)
        np.add.at(self._counts, places[self._keys[places] == codes], 1)

    def of(self, codes: Ids) -> Ids:
        return self._counts[np.searchsorted(self._keys, codes)]


def _codes(dataset: Dataset, split: str, order: int, first: int | None = None) -> Iterator[Ids]:
    """The last `order` ids of each context with its target, as one number: code // V is the context's, code
    % V the target."""
    size = dataset.vocab_size
    for older, before, targets in _targets(dataset, split, first):
        yield [targets, before * size + targets, (older * size + before) * size + targets][order - 1]


def _targets(dataset: Dataset, split: str, first: int | None = None) -> Iterator[tuple[Ids, Ids, Ids]]:
    """The blocks of `_all_targets`, ended after the `first` targets."""
    left = dataset.splits[split].tokens_count if first is None else first
    for block in _all_targets(dataset, split):
        older, before, targets = block
        yield older[:left], before[:left], targets[:left]
        left -= min(left, len(targets))
        if not left:
            return


def _all_targets(dataset: Dataset, split: str) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Blocks of (id two before, id before, target) for every target of a split, in order. Two before a
    document's second id lies its boundary again, or V (nothing) where there is none."""
    part, starts = dataset.splits[split], dataset.splits[split].offsets
    nothing = dataset.vocab_size if dataset.boundary is None else dataset.boundary
    for begin in range(1, part.tokens_count, _BLOCK):
        end = min(begin + _BLOCK, part.tokens_count)
        ids = part.read(begin - 1, end).astype(np.int64)
        before, targets = ids[:-1], ids[1:]
        older = np.concatenate([part.read(max(begin - 2, 0), begin - 1).astype(np.int64), before[:-1]])
        if begin == 1:
            older = np.concatenate([[nothing], older])
        near = starts[slice(*np.searchsorted(starts, [begin - 1, end]))]  # documents that begin in this block
        seconds = near[near < end - 1] + 1 - begin
        older[seconds] = nothing
        if dataset.lines:  # every id but the very first is a target: a boundary ends the line before it
            yield older, before, targets
        else:
            kept = np.ones(len(targets), bool)
            kept[near[near >= begin] - begin] = False
            yield older[kept], before[kept], targets[kept]
