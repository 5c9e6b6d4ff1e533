"""Training batches: which ids go where, as a pure function of (seed, step, micro).

Nothing is remembered between calls, so a resumed run sees the very batches that it would have seen. Only the
pages of the ids that a batch holds are touched.

A row consists of pieces, and no piece reaches beyond its document. Inside a document of stored ids
t[0..n-1] an input t[i] is paired with its target t[i+1]; with lines the last input's target is the boundary
that follows. With `lead` > 1 a document is read as if `lead - 1` more boundary ids stood before it; they
are inputs, but not scored targets.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dfcli.cores.wavenet import Condition
from dfcli.data.conditions import Conditions
from dfcli.data.dataset import Split
from dfcli.errors import DfError, UsageError

IGNORED = -100  # the target of a position that is not scored (PyTorch's default ignore_index)


@dataclass(frozen=True)
class Batch:
    """`ids` and `targets` int64 [B, T]; a target of -100 is not scored. `positions` int64 [B, T]: the place
    of each id within its piece, so that what lies before the piece can be masked; None where a row is one
    piece. `condition`: what a conditioned model is told, else None."""

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None
    condition: Condition | None = None

    def part(self, rows: slice) -> Batch:
        """Some of its rows."""
        positions, told = self.positions, self.condition
        return Batch(
            self.ids[rows],
            self.targets[rows],
            None if positions is None else positions[rows],
            None if told is None else told._replace(index=told.index[rows]),
        )


class _Drawn(NamedTuple):
    """Ids and targets [B, T], with positions (see `Batch`), and which pairs of which documents they are: `start` (where
    the document is stored) and `place` (which of its pairs; below zero in a lead), both broadcast to [B, T]."""

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None
    start: np.ndarray
    place: np.ndarray


class Batches:
    """Batches of a split: `batch_size` rows of `window` ids. `packing` is one of

    packed     rows are filled with pieces, and always full. One running text: a window at a uniform start in
               [0, n - window - 1] (nanoGPT's rule). Several documents: drawn in proportion to their length;
               one that fits is taken whole from its start, a longer one gives a window at a uniform place;
               the last piece of a row is cut.
    documents  one document a row, uniformly with replacement, from its start, filled up on the right to the
               longest of the batch with ids that are not scored; T <= window.
    last       one target a row, uniformly among all of the split, in the last column; the `window` ids before
               it, filled up on the left with the boundary.

    Raises DfError when the split is too small for what is asked.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        window: int,
        seed: int,
        packing: str = "packed",
        boundary: int | None = None,
        lines: bool = False,
        lead: int = 1,
        conditions: Conditions | None = None,
    ) -> None:
        """`conditions` are those of `split`."""
        if batch_size < 1 or window < 1:
            raise UsageError("a batch has at least one row of at least one id")
        draw = {"packed": self._packed, "documents": self._documents, "last": self._last}
        if packing not in draw:
            raise UsageError(f"there is no packing {packing!r}", f"known: {', '.join(draw)}")
        self._draw = draw[packing]
        self._split, self._offsets, self._conditions = split, split.offsets, conditions
        self._rows, self._window = batch_size, window
        self._key = seed % 2**128
        self._unpaired = 0 if lines else 1  # ids at a document's end that are a target only
        self._extra = lead - 1 if boundary is not None else 0
        if split.longest <= self._unpaired:
            raise DfError(f"the {split.name} split holds nothing to predict", "give it more data")
        if packing == "packed":
            self._any_longer = split.longest - self._unpaired + self._extra > window
            # Where every document fills a row, a row is one piece.
            self._whole_rows = split.shortest - self._unpaired + self._extra >= window
            sample = self._pieces(np.random.Generator(np.random.Philox(key=0)), 1000)
            enough = 1.2 * batch_size * (window / sample[1].mean() + 1)
            self._count = batch_size if self._whole_rows else int(enough)
        if packing == "last":
            # Without a boundary there is nothing to fill up with: targets have a full context before them.
            self._skip = window - 1 if boundary is None else 0
            self._targets = self._cumulative_targets()

    def at(self, step: int, micro: int = 0) -> Batch:
        """The batch of a step (and of its `micro`-th part where gradients are accumulated)."""
        # Philox counts: each (seed, step, micro) has a stream of 2**128 numbers of its own.
        counter = np.array([0, 0, micro, step], np.uint64)
        random = np.random.Generator(np.random.Philox(counter=counter, key=self._key))
        drawn = self._draw(random)
        condition = None
        if self._conditions is not None:
            documents = np.searchsorted(self._offsets, drawn.start, side="right") - 1
            condition = self._conditions.at(documents, drawn.place)
        return Batch(
            torch.from_numpy(drawn.ids),
            torch.from_numpy(drawn.targets),
            None if drawn.positions is None else torch.from_numpy(drawn.positions),
            condition,
        )

    def _packed(self, random: np.random.Generator) -> _Drawn:
        B, T = self._rows, self._window
        start, length, place = self._pieces(random, self._count)
        if self._whole_rows:
            return self._gather(start[:, None], place[:, None] + np.arange(T))

        while (filled := _fill(length, B, T)) is None:
            more = self._pieces(random, B)
            start, length, place = (np.concatenate(pair) for pair in zip((start, length, place), more, strict=True))
        first = np.cumsum(filled) - filled
        positions = np.arange(B * T) - np.repeat(first, filled)
        start, place = start[: len(filled)], place[: len(filled)]
        place = np.repeat(place, filled) + positions
        drawn = self._gather(np.repeat(start, filled).reshape(B, T), place.reshape(B, T))
        return drawn._replace(positions=positions.reshape(B, T))

    def _documents(self, random: np.random.Generator) -> _Drawn:
        k = random.integers(self._split.documents, size=self._rows)
        start = self._offsets[k]
        length = np.minimum(self._offsets[k + 1] - start - self._unpaired + self._extra, self._window)
        column = np.arange(int(length.max()))
        drawn = self._gather(start[:, None], np.minimum(column, length[:, None] - 1))
        drawn.targets[column >= length[:, None]] = IGNORED
        return drawn

    def _last(self, random: np.random.Generator) -> _Drawn:
        drawn = random.integers(self._targets[-1], size=self._rows)
        k = np.searchsorted(self._targets, drawn, side="right") - 1
        start = self._offsets[k]
        last = start + self._skip + drawn - self._targets[k]  # where the last input is stored
        # Before a document's start stands its boundary, as often as it takes.
        places = np.maximum(last[:, None] + np.arange(1 - self._window, 1), start[:, None])
        ids = self._split.take(places).astype(np.int64)
        targets = np.full_like(ids, IGNORED)
        targets[:, -1] = self._split.take(last + 1)
        return _Drawn(ids, targets, None, start[:, None], places - start[:, None])

    def _pieces(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`count` pieces, int64 each: where their documents are stored, how many pairs a piece has, and which
        pair of its document is its first."""
        drawn = random.integers(self._offsets[-1], size=count)
        k = np.searchsorted(self._offsets, drawn, side="right") - 1
        start = self._offsets[k]
        pairs = self._offsets[k + 1] - start - self._unpaired + self._extra
        length = np.minimum(pairs, self._window)
        return start, length, random.integers(pairs - length + 1) if self._any_longer else np.zeros_like(start)

    def _gather(self, start: np.ndarray, place: np.ndarray) -> _Drawn:
        """Inputs and targets (int64) at the `place`-th pairs of the documents stored from `start`."""
        place = place - self._extra
        stored = start + (np.maximum(place, 0) if self._extra else place)  # a lead's pairs repeat the stored boundary
        targets = self._split.take(stored + 1).astype(np.int64)
        if self._extra:
            targets[place < 0] = IGNORED
        return _Drawn(self._split.take(stored).astype(np.int64), targets, None, start, place)

    def _cumulative_targets(self) -> np.ndarray:
        """int64 [documents + 1]: how many targets stand in the documents before each."""
        if self._unpaired == self._skip == 0:
            return self._offsets
        counts = np.maximum(np.diff(self._offsets) - self._unpaired - self._skip, 0)
        if not counts.any():
            raise DfError(
                f"no document of the {self._split.name} split is longer than the context of {self._window}",
                "choose a smaller context, or give more data",
            )
        return np.concatenate([[0], np.cumsum(counts)])


def _fill(length: np.ndarray, rows: int, width: int) -> np.ndarray | None:
    """Fill rows of `width` with pieces of these lengths, in order, and cut the last piece of each row.

    Gives how many pairs of each piece are used, from the first piece to the last used; None when they do not
    suffice.
    """
    used, end = length.copy(), np.cumsum(length).tolist()
    last = before = 0
    for _ in range(rows):
        last = bisect_left(end, before + width)
        if last == len(end):
            return None
        used[last] -= end[last] - before - width
        before = end[last]
    return used[: last + 1]
