"""The compiled pick: `generation.sampling.pick` of one row, by the rules that stand there."""

from __future__ import annotations

import numpy as np

from dfcli.kernels.compile import inner
from dfcli.kernels.ops import ONE, any_order, exp

_LARGEST = np.float32(87)  # exp of it, and of its negative, are normal numbers
_ONE_BITS = int(ONE.view(np.int32))


@any_order
def _lowest(bits):
    """The smallest of some integers."""
    found = bits[0]
    for i in range(bits.size):
        found = min(found, bits[i])
    return found


@any_order
def _count(bits, least):
    """How many are at least `least`."""
    found = np.int32(0)
    for i in range(bits.size):
        found += np.int32(1) if bits[i] >= least else np.int32(0)
    return np.int64(found)


@any_order
def _mass(weights, least):
    """The sum, in float64, of those that are at least `least`."""
    total = 0.0
    for i in range(weights.size):
        total += np.float64(weights[i] if weights[i] >= least else np.float32(0))
    return total


@inner
def _weight(bits):
    """The float32 of these bits."""
    return np.int32(bits).view(np.float32)


@inner
def _drop(weights, lightest, surplus):
    """Drops what is below the bits `lightest`, and the last `surplus` of those that are level with them."""
    bits = weights.view(np.int32)
    for i in range(bits.size):
        weights[i] = weights[i] if bits[i] >= lightest else np.float32(0)
    if surplus > 0:
        for i in range(bits.size - 1, -1, -1):
            if bits[i] == lightest and surplus > 0:
                weights[i] = 0
                surplus -= 1


# Both filters look for the lightest weight that stays, without sorting: by halving the range of its bits, each time
# with one look at all weights. (Floats that are not negative order like their bits.) A look at 256 weights takes a
# twentieth of a microsecond, and about ten are enough.


@inner
def _top_k(weights, k, low):
    """Keeps the k heaviest; none has lower bits than `low`. Returns the lowest bits of what stays."""
    bits, high, count = weights.view(np.int32), np.int64(_ONE_BITS + 1), np.int64(weights.size)
    while count > k and high - low > 1:  # `count`, at least k, have at least the bits `low`; fewer have `high`
        middle = (low + high) >> 1
        above = _count(bits, np.int32(middle))
        if above >= k:
            low, count = middle, above
        else:
            high = middle
    _drop(weights, np.int32(low), count - k)
    return low


@inner
def _top_p(weights, p, low):
    """Keeps the fewest heaviest whose sum reaches the share p; what is not 0 has at least the bits `low`."""
    bits, high, above, mass = weights.view(np.int32), np.int64(_ONE_BITS + 1), 0.0, _mass(weights, np.float32(0))
    enough = p * mass
    # `mass`, enough, is the sum of those from `low` on; `above`, too little, of those from `high` on. Less than twice
    # the weight of `low` between them is one id.
    while high - low > 1 and mass - above >= 2 * _weight(low):
        middle = (low + high) >> 1
        part = _mass(weights, _weight(middle))
        if part >= enough:
            low, mass = middle, part
        else:
            high, above = middle, part
    surplus = np.int64(0)
    if high - low == 1:  # several may be level
        surplus = _count(bits, np.int32(low)) - _count(bits, np.int32(high))
        while above < enough and surplus > 0:
            above += _weight(low)
            surplus -= 1
    _drop(weights, np.int32(low), surplus)


@inner
def pick(logits, u, temperature, top_k, top_p, min_p, weights):
    """`sampling.pick` of one row: logits [V] float32 -> id; weights float32 [V] is scratch."""
    best = 0
    for i in range(logits.size):
        if logits[i] > logits[best]:
            best = i
    if temperature == 0:
        return best
    top, divisor = logits[best], np.float32(min(max(temperature, 1e-30), 1e30))
    for i in range(logits.size):
        x = (logits[i] - top) / divisor
        weights[i] = exp(x) if x >= -_LARGEST else np.float32(0)
    if top_k < logits.size or top_p < 1:
        low = np.int64(_lowest(weights.view(np.int32)))
        if top_k < logits.size:
            low = _top_k(weights, top_k, low)
        if top_p < 1:
            _top_p(weights, top_p, low)
    if min_p > 0:
        least = np.float32(min_p)
        for i in range(weights.size):
            weights[i] = weights[i] if weights[i] >= least else np.float32(0)

    target, total, last = u * _mass(weights, np.float32(0)), 0.0, 0
    for i in range(weights.size):
        total += weights[i]
        if total > target:
            return i
    for i in range(weights.size):  # the two sums, in different orders, differ in their last bits
        if weights[i] > 0:
            last = i
    return last
