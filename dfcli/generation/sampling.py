"""From logits to ids: how one is picked (`pick`) among those that may be (`request.Filters`), and where chance comes
from (`Dice`).

A pick is a pure function of the logits, the filters and one uniform number u in [0, 1), so that every engine,
whatever it is written in, makes the same choice:

1. temperature 0: the largest logit, the lowest id among equals. Nothing below applies.
2. An id weighs exp((logit - largest logit) / temperature), in float32.
3. top-k keeps exactly the k heaviest, the lower ids first among equals.
4. top-p keeps, of these, the fewest heaviest whose sum reaches the share p of theirs, the lower ids first among equals.
   Never less than one.
5. min-p drops what weighs less than min-p (the heaviest weighs 1).
6. The pick is the first id at which the running sum of the weights, in order of id and in float64, exceeds u times the
   whole sum. What was dropped weighs 0.

An engine whose logits or exponentials differ in the last bits of float32 makes the same pick except where u falls
within about 1e-7 of the border between two ids.

Sources: top-k: Fan et al. 2018 (arXiv 1805.04833); top-p: Holtzman et al. 2019 (1904.09751); min-p: Nguyen et al. 2024
(2407.01082).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dfcli.cores.protocols import Picking
from dfcli.generation.request import chosen_seed


def pick(logits: NDArray[np.float32], picking: Picking, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Picks one id a row, by the rules at the head of this module: logits [B, V], uniforms [B] in [0, 1) -> ids [B].

    In NumPy, because for one row of a small vocabulary its calls cost half of what PyTorch's do, and its sort of a
    large one a tenth.
    """
    size = logits.shape[-1]
    temperature, top_k, top_p, min_p = picking
    top_k = min(top_k, size)
    if temperature == 0:
        return logits.argmax(-1)
    weights = logits - logits.max(-1, keepdims=True)
    weights /= np.float32(min(max(temperature, 1e-30), 1e30))  # what float32 holds; beyond it nothing changes
    np.exp(weights, out=weights)
    if top_k < size or top_p < 1:
        largest = np.partition(weights, size - top_k, -1)[:, size - top_k :]
        if top_p < 1:
            largest = np.sort(largest, -1)[:, ::-1]
            sums = np.cumsum(largest, -1, dtype=np.float64)
            count = 1 + (sums[:, :-1] < top_p * sums[:, -1:]).sum(-1, keepdims=True)
            smallest = np.take_along_axis(largest, count - 1, -1)
        else:
            count, smallest = top_k, largest[:, :1]  # where the partition puts the smallest
        kept = weights >= smallest
        for row, surplus in enumerate((kept.sum(-1, keepdims=True) - count)[:, 0]):
            if surplus:  # of those level with the smallest kept one, the last
                kept[row, np.flatnonzero(weights[row] == smallest[row])[-surplus:]] = False
        weights *= kept
    if min_p > 0:
        weights *= weights >= np.float32(min_p)
    sums = np.cumsum(weights, -1, dtype=np.float64)
    return (sums <= uniforms[:, None] * sums[:, -1:]).sum(-1)


class Dice:
    """Streams of uniform numbers, one for each clip, so that a clip does not depend on how many others are
    made.

    Stream i is the Philox 4x64 generator with key (seed, i) (Salmon et al. 2011), the upper 53 bits of each
    draw. Raises as `chosen_seed`.
    """

    def __init__(self, seed: int, clips: Iterable[int]) -> None:
        key = chosen_seed(seed)
        self._streams = [np.random.Philox(key=np.array([key, clip], np.uint64)) for clip in clips]

    def draw(self, count: int) -> NDArray[np.float64]:
        """The next `count` numbers in [0, 1) of every stream: [clips, count] float64."""
        raw = np.stack([stream.random_raw(count) for stream in self._streams])
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
