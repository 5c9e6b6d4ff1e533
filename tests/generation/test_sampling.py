"""Picking follows its rules: against a plain statement of them, in distribution, and to the bit for a seed."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.cores.protocols import Picking
from dfcli.errors import UsageError
from dfcli.generation.request import Filters
from dfcli.generation.sampling import Dice, pick
from tests.generation.engine import picking

NAN, INF = float("nan"), float("inf")


def by_the_rules(logits: list[float], filters: Filters, u: float) -> int:
    """The rules at the head of the module, one id at a time."""
    by_rank = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if filters.temperature == 0:
        return by_rank[0]
    largest = logits[by_rank[0]]
    weights = {i: math.exp((logits[i] - largest) / filters.temperature) for i in by_rank[: filters.top_k]}
    if filters.top_p is not None and filters.top_p < 1:
        enough, kept, total = 0.0, {}, math.fsum(weights.values())
        for i, weight in weights.items():
            if kept and enough >= filters.top_p * total:
                break
            kept[i] = weight
            enough += weight
        weights = kept
    if filters.min_p is not None:
        weights = {i: weight for i, weight in weights.items() if weight >= filters.min_p}
    ids = sorted(weights)
    sums = list(itertools.accumulate(weights[i] for i in ids))
    return next(i for i, total in zip(ids, sums, strict=True) if total > u * sums[-1])


def picked(logits: Any, filters: Filters, uniforms: Any) -> list[int]:
    return pick(np.array(logits, np.float32), filters.picking(), np.array(uniforms)).tolist()


# Logits in steps of 1/4, so that there are ties, and uniforms that are not on the border of two ids.
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.none() | st.integers(1, 12),
    st.none() | st.sampled_from([0.05, 0.3141, 0.5123, 0.9017, 1.0]),
    st.none() | st.sampled_from([0.0, 0.0501, 0.3003, 1.0]),
    st.sampled_from([0.0, 0.0123457, 0.2718281, 0.5772156, 0.9159655, 1 - 2**-53]),
)
def test_rules(logits: list[float], t: float, k: int | None, p: float | None, m: float | None, u: float) -> None:
    filters = Filters(t, None if k is None else min(k, len(logits)), p, m)
    assert picked([logits], filters, [u]) == [by_the_rules(logits, filters, u)]


def test_rows_of_a_batch_are_independent() -> None:
    random = np.random.default_rng(1)
    logits = (random.integers(-8, 8, (50, 20)) / 4).astype(np.float32)
    uniforms = random.random(50)
    for filters in (Filters(), Filters(0.7, 5), Filters(1, None, 0.7), Filters(1.3, 9, 0.6, 0.1), Filters(0)):
        together = picked(logits, filters, uniforms)
        assert together == [picked(row[None], filters, [u])[0] for row, u in zip(logits, uniforms, strict=True)]


def kept(logits: list[float], filters: Filters) -> list[int]:
    """The ids that can be picked at all."""
    uniforms = np.linspace(0, 1, 2001)[:-1]
    return sorted(set(picked([logits] * len(uniforms), filters, uniforms)))


def test_ties() -> None:
    level = [1.0, 3.0, 3.0, 0.0, 3.0, 3.0]
    assert kept(level, Filters(top_k=1)) == [1]
    assert kept(level, Filters(top_k=3)) == [1, 2, 4]
    assert kept(level, Filters(top_k=5)) == [0, 1, 2, 4, 5]
    assert kept([0.0] * 8, Filters(top_k=3)) == [0, 1, 2]
    assert kept([0.0] * 8, Filters(top_p=0.5)) == [0, 1, 2, 3]
    assert kept([0.0] * 8, Filters(top_p=0.51)) == [0, 1, 2, 3, 4]
    assert kept(level, Filters(min_p=1)) == [1, 2, 4, 5]
    assert picked([level], Filters(0), [0.99]) == [1]


def test_filters_that_filter_nothing() -> None:
    random = np.random.default_rng(2)
    logits, uniforms = random.normal(size=(200, 30)).astype(np.float32), random.random(200)
    plain = picked(logits, Filters(), uniforms)
    for filters in (Filters(top_k=30), Filters(top_p=1), Filters(min_p=0), Filters(1, 30, 1, 0)):
        assert picked(logits, filters, uniforms) == plain


def test_extremes() -> None:
    assert kept([0.0, -INF, 1.0], Filters()) == [0, 2]
    assert kept([1e30, 0.0, -1e30], Filters()) == [0]
    assert kept([1.0, 1.0001, 0.0], Filters(1e-300)) == [1]
    assert kept([1.0, 100.0, 0.0], Filters(1e300)) == [0, 1, 2]
    assert kept([5.0], Filters(1, 1, 0.1, 1)) == [0]
    assert kept([1.0, 2.0, 3.0], Filters(top_p=1e-9)) == [2]


def test_frequencies_are_the_probabilities() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    ids = pick(np.tile(logits, (40_000, 1)), picking(0.8), Dice(3, [0]).draw(40_000)[0])
    expected = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    assert np.bincount(ids, minlength=5) / 40_000 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": NAN}, "temperature"), ({"temperature": -0.1}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"top_k": 0}, "top-k"), ({"top_k": -3}, "top-k"),
        ({"top_p": 0.0}, "top-p"), ({"top_p": 1.1}, "top-p"), ({"top_p": NAN}, "top-p"), ({"top_p": -1.0}, "top-p"),
        ({"min_p": -0.1}, "min-p"), ({"min_p": 1.1}, "min-p"), ({"min_p": NAN}, "min-p"),
    ],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Filters(**options)


def test_top_k_beyond_the_vocabulary() -> None:
    assert Filters(0.5, 10, 0.9, 0.1).picking() == (0.5, 10, 0.9, 0.1)
    assert Filters().picking() == Picking()
    assert picked([[1.0, 0.0]], Filters(top_k=2**40), [0.9]) == picked([[1.0, 0.0]], Filters(), [0.9])


def test_dice_are_the_same_on_every_machine_and_version() -> None:
    assert Dice(1337, [0, 1]).draw(3).tolist() == [
        [0.9196162942606468, 0.9844011843586706, 0.11299073411855676],
        [0.5183563288539731, 0.7867645200068585, 0.962774487720172],
    ]
    assert all(0 <= u < 1 for u in Dice(0, [0]).draw(1000)[0])


def test_a_stream_depends_on_seed_and_clip_alone() -> None:
    whole = Dice(7, range(5)).draw(10)
    assert np.array_equal(Dice(7, [3]).draw(10)[0], whole[3])
    dice = Dice(7, range(2, 5))
    parts = [dice.draw(n) for n in (1, 3, 2, 4)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole[2:])
    assert len(np.unique(np.concatenate([whole, Dice(8, range(5)).draw(10)]))) == 100


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_wrong_seeds(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        Dice(seed, [0])


def test_filters_are_cheap_for_a_large_vocabulary() -> None:
    """A step of GPT-2 takes about 25 ms on a CPU. Only a gross mistake is caught, such as a full argsort (5 ms)."""
    logits = np.random.default_rng(1).normal(size=(1, 50_257)).astype(np.float32)
    u = np.array([0.5])
    for filters in (Picking(), Picking(top_k=50), Picking(min_p=0.05), Picking(top_p=0.9)):
        times = []
        for _ in range(20):
            began = time.perf_counter()
            pick(logits, filters, u)
            times.append(time.perf_counter() - began)
        assert min(times) < 0.0025, filters
