"""Batches: a pure function of (seed, step, micro), and no context that crosses a document's boundary."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dfcli.data.batches import IGNORED, Batch, Batches
from dfcli.data.dataset import Split, SplitWriter
from dfcli.errors import DfError, UsageError

BOUNDARY = 0


class Corpus:
    """Documents whose ids are all distinct, so that an id tells its document and its place in it."""

    def __init__(self, folder: Path, lengths: list[int], *, boundary: bool, lines: bool = False) -> None:
        self.lines, self.boundary = lines, BOUNDARY if boundary else None
        self.documents, first = [], 1
        for length in lengths:
            self.documents.append([BOUNDARY] * boundary + list(range(first, first + length)))
            first += length
        assert first < 65536
        self.document_of = {i: k for k, ids in enumerate(self.documents) for i in ids if i != BOUNDARY}
        writer = SplitWriter(folder, "train", np.dtype("<u2"))
        for document in self.documents:
            writer.append(np.array(document))
            writer.end_document()
        record = writer.finish(BOUNDARY if lines else None)
        assert record is not None
        self.split = Split(folder, "train", record, "uint16", 65536, int(lines))

    def batches(self, **options: object) -> Batches:
        return Batches(self.split, boundary=self.boundary, lines=self.lines, **options)  # type: ignore[arg-type]

    def pairs(self, document: list[int], lead: int) -> list[tuple[int, int]]:
        """Every (input, target) of a document, by the definition."""
        inputs = [BOUNDARY] * (lead - 1) * (self.boundary is not None) + document
        targets = [*inputs[1:], BOUNDARY] if self.lines else inputs[1:]
        unscored = len(inputs) - len(document)
        return [(a, IGNORED if i < unscored else b) for i, (a, b) in enumerate(zip(inputs, targets, strict=self.lines))]

    def check_piece(self, ids: list[int], targets: list[int], lead: int, whole_at: int) -> int:
        """The piece stands so in exactly one document, from its start if it fits; gives the document."""
        known = [i for i in [*ids, *targets] if i not in (BOUNDARY, IGNORED)]
        if not known:  # nothing but boundaries: the start of any document
            assert set(ids) == {BOUNDARY}
            return -1
        k = self.document_of[known[0]]
        pairs = self.pairs(self.documents[k], lead)
        piece = list(zip(ids, targets, strict=True))
        starts = [s for s in range(len(pairs)) if pairs[s : s + len(piece)] == piece]
        assert starts, f"{piece} is not in document {k}"
        if len(pairs) <= whole_at:
            assert starts[0] == 0
        return k


def pieces(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The pieces of a batch by its positions."""
    B, T = batch.ids.shape
    positions = torch.arange(T).expand(B, T) if batch.positions is None else batch.positions
    found = []
    for row in range(B):
        starts = [t for t in range(T) if t == 0 or positions[row, t] == 0]
        assert positions[row, 0] == 0
        for a, b in zip(starts, [*starts[1:], T], strict=True):
            assert positions[row, a:b].tolist() == list(range(b - a))
            found.append((batch.ids[row, a:b].tolist(), batch.targets[row, a:b].tolist()))
    return found


SHAPES = {
    "words": [1, 2, 3, 5, 8, 2, 7, 4] * 3,
    "mixed": [3, 200, 1, 40, 15, 16, 17, 2, 90],
    "long": [300, 50, 71],
    "one": [500],
    "tiny": [2],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [1, 4])
@pytest.mark.parametrize(("boundary", "lines"), [(True, True), (True, False), (False, False)])
def test_packed_pieces_stay_within_their_documents(
    tmp_path: Path, shape: str, lead: int, boundary: bool, lines: bool
) -> None:
    lengths = [length for length in SHAPES[shape] if length > 1 or boundary]
    corpus = Corpus(tmp_path, lengths, boundary=boundary, lines=lines)
    T = 16
    batches = corpus.batches(batch_size=5, window=T, seed=3, lead=lead)
    shortest = min(len(corpus.pairs(document, lead)) for document in corpus.documents)
    seen = set()
    for step in range(100):
        batch = batches.at(step)
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert batch.ids.shape == batch.targets.shape == (5, T)
        assert (batch.positions is None) == (shortest >= T)
        for ids, targets in pieces(batch):
            seen.add(corpus.check_piece(ids, targets, lead, T))
        unscored = (batch.targets == IGNORED).float().mean()
        assert unscored == 0 if lead == 1 else unscored < 1
    assert seen - {-1} == set(range(len(corpus.documents)))


def test_one_text_follows_nanogpt(tmp_path: Path) -> None:
    """Starts are uniform in [0, n - window - 1], both ends included."""
    n, T = 40, 8
    corpus = Corpus(tmp_path, [n], boundary=False)
    batches = corpus.batches(batch_size=8, window=T, seed=0)
    starts: Counter[int] = Counter()
    for step in range(800):
        batch = batches.at(step)
        assert batch.positions is None
        first = batch.ids[:, :1]
        assert torch.equal(batch.ids, first + torch.arange(T))
        assert torch.equal(batch.targets, batch.ids + 1)
        starts.update((first[:, 0] - 1).tolist())
    assert sorted(starts) == list(range(n - T))
    expected = 6400 / (n - T)
    assert sum((count - expected) ** 2 / expected for count in starts.values()) < 80  # chi-square, 31 degrees


def test_packed_draws_documents_in_proportion_to_their_length(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [30, 60, 10], boundary=False)
    batches = corpus.batches(batch_size=16, window=100, seed=0)
    drawn: Counter[int] = Counter()
    for step in range(100):
        batch = batches.at(step)
        drawn.update(corpus.document_of[ids[0]] for ids, _ in pieces(batch))
    total = sum(drawn.values())
    assert [drawn[k] / total for k in range(3)] == pytest.approx([0.3, 0.6, 0.1], abs=0.03)


@pytest.mark.parametrize("lead", [1, 3])
@pytest.mark.parametrize("lines", [True, False])
def test_documents_come_whole_one_a_row(tmp_path: Path, lead: int, lines: bool) -> None:
    corpus = Corpus(tmp_path, [1, 2, 3, 9, 30], boundary=True, lines=lines)
    T = 12
    batches = corpus.batches(batch_size=4, window=T, seed=5, packing="documents", lead=lead)
    drawn: Counter[int] = Counter()
    for step in range(200):
        batch = batches.at(step)
        assert batch.positions is None
        widths = []
        for row in range(4):
            known = [i for i in batch.targets[row].tolist() if i not in (BOUNDARY, IGNORED)]
            k = corpus.document_of[known[0]]
            drawn[k] += 1
            pairs = corpus.pairs(corpus.documents[k], lead)[:T]
            widths.append(len(pairs))
            got = zip(batch.ids[row].tolist(), batch.targets[row].tolist(), strict=True)
            assert list(got)[: len(pairs)] == pairs
            assert set(batch.targets[row, len(pairs) :].tolist()) <= {IGNORED}
        assert batch.ids.shape == batch.targets.shape == (4, max(widths))
    assert [drawn[k] / 800 for k in range(5)] == pytest.approx([0.2] * 5, abs=0.05)


@pytest.mark.parametrize(("boundary", "lines"), [(True, True), (True, False), (False, False)])
def test_last_draws_every_target_alike(tmp_path: Path, boundary: bool, lines: bool) -> None:
    T = 4
    corpus = Corpus(tmp_path, [1 + 8 * (not boundary), 2, 3, 9], boundary=boundary, lines=lines)
    batches = corpus.batches(batch_size=10, window=T, seed=1, packing="last")
    # By the definition (makemore's build_dataset): each target with the ids before it, filled with the boundary.
    expected = Counter()
    for document in corpus.documents:
        ids = [BOUNDARY] * (T - 1) * boundary + document + [BOUNDARY] * lines
        expected.update((tuple(ids[i : i + T]), ids[i + T]) for i in range(len(ids) - T))
    drawn: Counter[tuple[tuple[int, ...], int]] = Counter()
    for step in range(400):
        batch = batches.at(step)
        assert batch.positions is None
        assert set(batch.targets[:, :-1].flatten().tolist()) == {IGNORED}
        rows = zip(batch.ids.tolist(), batch.targets[:, -1].tolist(), strict=True)
        drawn.update((tuple(ids), target) for ids, target in rows)
    assert set(drawn) == set(expected)
    share = 4000 / expected.total()
    assert all(abs(drawn[key] / expected[key] - share) < 6 * share**0.5 for key in expected)


def test_last_counts_are_those_of_makemores_lecture(tmp_path: Path) -> None:
    """emma, olivia, ava: one example per character and one per end (5 + 7 + 4)."""
    corpus = Corpus(tmp_path, [4, 6, 3], boundary=True, lines=True)
    batches = corpus.batches(batch_size=500, window=8, seed=1, packing="last")
    rows = {tuple(row) for row in batches.at(0).ids.tolist()}
    assert len(rows) == 5 + 7 + 4 - 2  # the three empty contexts look alike


@pytest.mark.parametrize("packing", ["packed", "documents", "last"])
def test_a_batch_depends_on_seed_step_and_micro_alone(tmp_path: Path, packing: str) -> None:
    corpus = Corpus(tmp_path, [5, 9, 70, 3, 31] * 9, boundary=True, lines=True)
    options = {"batch_size": 3, "window": 20, "packing": packing}

    def flat(batch: Batch) -> list[int]:
        return [*batch.ids.flatten().tolist(), *batch.targets.flatten().tolist()]

    first = corpus.batches(seed=7, **options)
    forward = {(s, m): flat(first.at(s, m)) for s in range(6) for m in range(3)}
    second = corpus.batches(seed=7, **options)
    assert {key: flat(second.at(*key)) for key in reversed(forward)} == forward
    assert len({tuple(batch) for batch in forward.values()}) == len(forward)
    others = [flat(corpus.batches(seed=seed, **options).at(0)) for seed in (0, 8, 2**63, 2**100)]
    assert forward[0, 0] not in others
    assert len({tuple(other) for other in others}) == 4
    assert flat(first.at(2**40)) != flat(first.at(2**40 + 1))


def test_only_what_a_batch_holds_is_read(tmp_path: Path) -> None:
    """With one damaged block of eight, batches from elsewhere are not affected."""
    writer = SplitWriter(tmp_path, "train", np.dtype("u1"))
    for _ in range(8):
        writer.append(np.zeros(1 << 20, np.uint8))
    writer.end_document()
    record = writer.finish()
    assert record is not None
    with (tmp_path / "train.tokens").open("r+b") as file:
        file.write(b"\1")
    split = Split(tmp_path, "train", record, "uint8", 256, 0)
    batches = Batches(split, batch_size=1, window=8, seed=0)
    outcomes = []
    for step in range(200):
        try:
            batches.at(step)
            outcomes.append(True)
        except DfError:
            outcomes.append(False)
    assert 0.7 < sum(outcomes) / 200 < 0.97


def test_too_little_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [5, 3], boundary=False)
    with pytest.raises(DfError, match="longer than the context of 5"):
        corpus.batches(batch_size=1, window=5, seed=0, packing="last")
    with pytest.raises(UsageError):
        corpus.batches(batch_size=0, window=5, seed=0)
    with pytest.raises(UsageError, match="no packing"):
        corpus.batches(batch_size=1, window=5, seed=0, packing="x")
