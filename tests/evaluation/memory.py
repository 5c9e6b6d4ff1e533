"""Datasets in memory, with what the sweep and the baselines use of real ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class MemorySplit:
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def tokens_count(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self.tokens)
        return self.tokens[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        assert places.size == 0 or (places.min() >= 0 and places.max() < len(self.tokens))
        return self.tokens[places]


@dataclass
class MemoryDataset:
    vocab_size: int
    boundary: int | None
    lines: bool
    lead: int = 1
    name: str = "memory"
    splits: dict[str, MemorySplit] = field(default_factory=dict)


def dataset(
    vocab_size: int,
    documents: list[list[int]],
    *,
    boundary: int | None = None,
    lines: bool = False,
    lead: int = 1,
    train: list[list[int]] | None = None,
) -> Any:
    """A dataset whose split "val" is `documents`, without their boundaries, and whose split "train" is `train`."""
    made = MemoryDataset(vocab_size, boundary, lines, lead)
    for name, content in (("val", documents), ("train", train or documents)):
        stored = [[*([] if boundary is None else [boundary]), *document] for document in content]
        tokens = [token for document in [*stored, [boundary] if lines else []] for token in document]
        offsets = np.cumsum([0, *map(len, stored)])
        made.splits[name] = MemorySplit(np.array(tokens, np.uint8), offsets.astype(np.int64))
    return made


def sequences(data: Any, split: str = "val") -> list[tuple[list[int], list[int], int]]:
    """By definition: of each document its inputs, the target of each, and the first input that is scored."""
    part, found = data.splits[split], []
    for start, end in zip(part.offsets[:-1], part.offsets[1:], strict=True):
        extra = 0 if data.boundary is None else data.lead - 1
        ids = [data.boundary] * extra + part.tokens[start : end + data.lines].tolist()
        found.append((ids[:-1], ids[1:], extra))
    return found
