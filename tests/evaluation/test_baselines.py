"""Baselines equal their definition, and the published figure of the bigram on tiny shakespeare."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from dfcli.evaluation import baselines as room
from dfcli.evaluation.baselines import baselines, count_targets
from tests.evaluation.memory import dataset, sequences
from tests.shared import shared_file

V = 5


def texts(seed: int, lengths: list[int]) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, V, length).tolist() for length in lengths]


def by_definition(data: Any, order: int) -> float:
    """Nats per target: (count(context, target) + 1) / (count(context) + V), with dictionaries."""
    nothing = V if data.boundary is None else data.boundary

    def pairs(split: str) -> list[tuple[tuple[int, ...], int]]:
        found = []
        for inputs, targets, first in sequences(data, split):
            history = [nothing, *inputs]
            found += [(tuple(history[i + 2 - (order - 1) : i + 2]), targets[i]) for i in range(first, len(inputs))]
        return found

    both, contexts = Counter(pairs("train")), Counter(context for context, _ in pairs("train"))
    scored = pairs("val")
    nats = -sum(math.log((both[pair] + 1) / (contexts[pair[0]] + V)) for pair in scored)
    return nats / len(scored)


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("kind", ["running", "several", "documents", "lines"])
def test_definition(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_BLOCK", block)
    if kind in ("running", "several"):
        lengths = [60] if kind == "running" else [20, 1, 2, 9, 3, 1]
        data = dataset(V, texts(1, lengths), train=texts(2, [90, 2, 1, 7]))
    else:
        data = dataset(V, texts(1, [0, 6, 1, 0, 9]), boundary=0, lines=kind == "lines", train=texts(2, [9, 0, 1, 25]))
    found = baselines((data, "val"), (data, "train"))
    assert list(found) == ["uniform", "unigram", "bigram", "trigram"]
    assert found["uniform"] == math.log(V)
    for order, name in enumerate(("unigram", "bigram", "trigram"), 1):
        assert found[name] == pytest.approx(by_definition(data, order), rel=1e-12), name


def test_further_boundaries_change_nothing() -> None:
    plain, padded = (
        dataset(V, texts(1, [6, 1, 9]), boundary=0, lines=True, lead=lead, train=texts(2, [9, 0, 25]))
        for lead in (1, 8)
    )
    assert baselines((plain, "val"), (plain, "train")) == baselines((padded, "val"), (padded, "train"))


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_where_no_table_fits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(V, texts(1, [60]), train=texts(2, [90]))
    whole = baselines((data, "val"), (data, "train"))
    monkeypatch.setattr(room, "_BLOCK", block)
    monkeypatch.setattr(room, "_TABLE", V * V)
    without = baselines((data, "val"), (data, "train"))
    del whole["trigram"]
    assert without == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(room, "_TABLE", V)
    assert baselines((data, "val"), (data, "train")) == pytest.approx(without, rel=1e-12)


def test_without_a_train_split_only_chance_is_known() -> None:
    data = dataset(V, texts(1, [60]))
    assert baselines((data, "val"), None) == {"uniform": math.log(V)}


def test_targets_are_counted() -> None:
    assert count_targets(dataset(V, [[1, 2, 2], [3, 4]]), "val").tolist() == [0, 0, 2, 0, 1]
    assert count_targets(dataset(V, [[1, 2, 2], [3]], boundary=0), "val").tolist() == [0, 1, 2, 1, 0]
    assert count_targets(dataset(V, [[1, 2, 2], [3]], boundary=0, lines=True), "val").tolist() == [2, 1, 2, 1, 0]


def test_bigram_of_tiny_shakespeare() -> None:
    text = np.frombuffer(shared_file("tinyshakespeare.txt").read_bytes(), np.uint8)
    ids = np.searchsorted(np.unique(text), text)
    cut = int(0.9 * len(ids))  # nanoGPT's split
    data = dataset(65, [ids[cut:].tolist()], train=[ids[:cut].tolist()])
    found = baselines((data, "val"), (data, "train"))
    assert count_targets(data, "val").sum() == 111_539
    assert round(found["bigram"], 2) == 2.48
    assert found["uniform"] == math.log(65)
    assert found["trigram"] < found["bigram"] < found["unigram"] < found["uniform"]
