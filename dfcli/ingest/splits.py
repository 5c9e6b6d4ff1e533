"""Which part of the data trains, which validates and which tests: fixed by the data alone, never by chance.

One text (or one recording) is cut by position, and so is each of a few. More documents are dealt out whole, by a
shuffle that is the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from dfcli.errors import UsageError
from dfcli.system.words import counted

TRAIN, VAL, TEST = 0, 1, 2
SEED = 1337
FEW = 5  # texts or recordings up to which each is cut by position: a whole one would say little of the others
GROUP = 1 << 20  # documents shuffled at once, so that a billion lines need no more memory than a million

Labels = Callable[[int, int], np.ndarray]
"""labels(start, stop): uint8 [stop - start], the split (TRAIN, VAL, TEST) of each of these documents."""


def check_fractions(val: float, test: float) -> None:
    """Raises UsageError unless both lie in [0, 1) and leave something to train on."""
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise UsageError(
            f"fractions of {val:g} for validation and {test:g} for testing leave nothing to train on",
            "give fractions between 0 and 1 that add up to less than 1",
        )


def constant(label: int) -> Labels:
    """The same split for all."""
    return lambda start, stop: np.full(stop - start, label, np.uint8)


def by_position(n: int, val: float, test: float) -> tuple[list[int], str]:
    """Sizes of train, val and test when `n` characters or samples are cut by position, and the rule as a
    sentence.

    The first int(0.9 n) train with `val` 0.1 and `test` 0, as in nanoGPT.
    """
    train_end, val_end = int(round(1 - val - test, 12) * n), int(round(1 - test, 12) * n)
    sizes = [train_end, val_end - train_end, n - val_end]
    parts = _parts(val, test, ["the first", "the next" if test else "the last", "the last"])
    return sizes, f"by position: {parts}"


def by_shuffle(n: int, val: float, test: float, what: str) -> tuple[Labels, str]:
    """Deals `n` documents (each called `what`) out by a fixed shuffle; each split that is asked for gets at
    least one.

    The rule says no shares: documents differ in size, see `shares`. Raises UsageError where there are fewer documents
    than splits.
    """
    needed = 1 + (val > 0) + (test > 0)
    if n < needed:
        raise UsageError(
            f"{counted(n, what)} cannot be split into {needed} parts",
            "`df data prepare` takes `--val-fraction 0`, or a source for validation with `--val`",
        )
    group: dict[int, np.ndarray] = {}

    def labels_of_group(g: int) -> np.ndarray:
        start, stop = g * GROUP, min(n, (g + 1) * GROUP)
        counts = [round(share * stop) - round(share * start) for share in (val, test)]
        if n <= GROUP:
            counts = [max(count, 1) if share else 0 for count, share in zip(counts, (val, test), strict=True)]
            while sum(counts) >= n:
                counts[counts.index(max(counts))] -= 1
        # The raw numbers of a bit generator stay the same in every version of numpy, shuffles may not.
        numbers = np.random.Philox(key=SEED, counter=[0, 0, 0, g]).random_raw(stop - start)
        labels = np.full(stop - start, TRAIN, np.uint8)
        for label, count in ((TEST, sum(counts)), (VAL, counts[0])):  # those with the lowest numbers
            if count:
                labels[numbers <= np.partition(numbers, count - 1)[count - 1]] = label
        return labels

    def labels(start: int, stop: int) -> np.ndarray:
        found = []
        while start < stop:
            g = start // GROUP
            if g not in group:
                group.clear()
                group[g] = labels_of_group(g)
            end = min(stop, (g + 1) * GROUP)
            found.append(group[g][start - g * GROUP : end - g * GROUP])
            start = end
        return np.concatenate(found) if found else np.empty(0, np.uint8)

    return labels, f"by a fixed shuffle of {counted(n, what)} (seed {SEED})"


def shares(sizes: Sequence[int]) -> str:
    """The true shares of train, val and test, of which documents dealt out whole made these `sizes`."""
    val, test = (size / max(1, sum(sizes)) for size in sizes[1:])
    return _parts(_rounded(val), _rounded(test), ["", "", ""])


def _rounded(share: float) -> float:
    return round(share, 3) or float(f"{share:.1g}")


def makemore(n: int) -> tuple[Labels, str]:
    """The split of Karpathy's makemore lectures: words shuffled by Python's random with seed 42, then 80/10/10."""
    order = list(range(n))
    random.Random(42).shuffle(order)
    labels = np.full(n, TRAIN, np.uint8)
    labels[order[int(0.8 * n) : int(0.9 * n)]] = VAL
    labels[order[int(0.9 * n) :]] = TEST
    rule = "the shuffle of the makemore lectures (Python's random, seed 42): 80% train, 10% val, 10% test"
    return lambda start, stop: labels[start:stop], rule


def makemore_transformer(n: int) -> tuple[Labels, str]:
    """The split of makemore.py: torch.randperm with seed 3407; the last 1,000 words, or 10% if fewer, test.
    They are labelled TEST; makemore.py validates on them too."""
    import torch

    size = min(1000, int(n * 0.1))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3407)).numpy()
    labels = np.full(n, TRAIN, np.uint8)
    labels[order[n - size :]] = TEST
    rule = (
        f"the shuffle of makemore.py (torch.randperm, seed 3407): the last {counted(size, 'line')} to validate and to "
        "test, the others to train"
    )
    return lambda start, stop: labels[start:stop], rule


def _parts(val: float, test: float, places: list[str]) -> str:
    shares = (round(1 - val - test, 12), val, test)
    words = [
        f"{place} {100 * share:.10g}% {verb}".strip()
        for place, share, verb in zip(places, shares, ("train", "validate", "test"), strict=True)
        if share
    ]
    return ", ".join(words)
