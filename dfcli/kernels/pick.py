"""What the compiled engines are built from: matrix-vector products, exp and its relatives, and the pick.

At batch 1 a model's step reads every weight once and multiplies it once, so that the speed of the memory
or cache that holds the weights is the limit, if the arithmetic keeps up. It does by the layout of the
weights: a matrix [N, K] is cut into tiles of 32 outputs, [N / 32, K, 32], which are read from front to
back while the 32 sums stay in registers (4 vectors of 8 floats; two sets of them, as an addition waits for
the one before). What LLVM makes of plain loops keeps the sums in memory and is a third slower; so the inner
loop alone is given to it as vector code, which it translates for any CPU: one AVX2 register is two of NEON
or SSE. Two rows at once (two clips, or two moments of one) use each weight twice.

The weights may be bfloat16, in pairs: half the bytes. A pair is one 32-bit word; shifted left it is the
one float32, taken as it is the other, whose lower 16 bits are then the first: `pack` rounds the second
such that both are within half a unit of bfloat16's last place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from dfcli.kernels.compile import inner
from dfcli.kernels.ops import (
    FLOATS,
    I32,
    I64,
    ONE,
    TWO,
    WIDTH,
    any_order,
    broadcast,
    clamp,
    copy,
    exp,
    intrinsic,
    multiply_add,
)

TILE = 32  # outputs of one tile; numbers of channels are padded to multiples of it
_VECTORS = TILE // WIDTH
_WORDS = ir.VectorType(I32, WIDTH)
_NEAR = 128  # inputs of a tile whose weights take 16 KiB


# ---- layout, in NumPy


def padded(size: int) -> int:
    """`size` rounded up to whole tiles."""
    return -(-size // TILE) * TILE


def pad(array: NDArray[np.float32], *shape: int) -> NDArray[np.float32]:
    """`array` with zeros behind it along every axis."""
    return np.pad(array, [(0, size - old) for size, old in zip(shape, array.shape, strict=True)])


def tiles(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix [N, K], N whole tiles and K even, as the flat tiles [N / 32, K, 32]."""
    N, K = matrix.shape
    return matrix.reshape(N // TILE, TILE, K).swapaxes(1, 2).ravel()


def join(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The parts behind each other, from an address where large pages begin: they spare address look-ups."""
    size, page = sum(part.size for part in parts), 2**21 // 4
    whole = np.empty(size + page, np.float32)
    start = -(whole.ctypes.data // 4) % page
    return np.concatenate([part.ravel() for part in parts], out=whole[start : start + size])


def pack(weights: NDArray[np.float32]) -> NDArray[np.uint32]:
    """float32 tiles as bfloat16 in pairs: a word holds elements i and i + 8 of 16 successive floats."""
    low, high = (part.astype(np.int64) for part in weights.view(np.uint32).reshape(-1, 2, WIDTH).swapaxes(0, 1))
    low = (low + 0x7FFF + (low >> 16 & 1)) >> 16
    sign, high = high & 1 << 31, high & ~(1 << 31)
    # The word nearest to `high` that ends in `low`. Nothing lies below 0, where a padding zero stands beside a weight.
    word = np.maximum(high - low + 0x8000 & ~0xFFFF, 0) + low
    return (sign + word).astype(np.uint32).ravel()


def unpack(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """What the products make of `pack`ed weights."""
    pairs = words.reshape(-1, 1, WIDTH)
    return np.concatenate([pairs << 16, pairs], axis=1).view(np.float32).ravel()


# ---- the inner loop, as vector code for LLVM


def _multiply(rows: int) -> Any:
    """Code of `out[o_r + j] += sum over k < K of x[i_r + k] * weights[w + 32 k + j]`, j < 32, for each row r.

    Its arguments: out, o_r..., x, i_r..., weights, w, K.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        outs, xs, kinds = arguments[1 : 1 + rows], arguments[2 + rows : 2 + 2 * rows], signature.args
        w, K = arguments[-2:]
        packed = kinds[-3].dtype != types.float32

        def at(array: int, offset: Any) -> Any:
            data = context.make_array(kinds[array])(context, builder, value=arguments[array]).data
            return builder.gep(data, [offset])

        def vector(pointer: Any, index: int, kind: ir.VectorType = FLOATS) -> Any:
            place = builder.gep(pointer, [I64(WIDTH * index)])
            return builder.bitcast(place, kind.as_pointer())

        def load(pointer: Any, index: int, kind: ir.VectorType = FLOATS) -> Any:
            return builder.load(vector(pointer, index, kind), align=4)

        def tile_row(k: Any) -> list[Any]:
            """The 32 weights of input k."""
            if not packed:
                row = builder.gep(tile, [builder.mul(k, I64(TILE))])
                return [load(row, i) for i in range(_VECTORS)]
            row = builder.gep(tile, [builder.mul(k, I64(TILE // 2))])
            found = []
            for i in range(_VECTORS // 2):
                word = load(row, i, _WORDS)
                low = builder.shl(word, ir.Constant(_WORDS, [16] * WIDTH))
                found += [builder.bitcast(low, FLOATS), builder.bitcast(word, FLOATS)]
            return found

        outs = [at(0, offset) for offset in outs]
        xs = [at(1 + rows, offset) for offset in xs]
        tile = at(2 + 2 * rows, builder.lshr(w, I64(1)) if packed else w)
        sums = [[load(out, i) for i in range(_VECTORS)] for out in outs]
        if rows == 1:  # the second set of sums, for odd k
            sums.append([ir.Constant(FLOATS, [0.0] * WIDTH)] * _VECTORS)

        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(I64)
        k.add_incoming(I64(0), before)
        running = []
        for first in sums:
            running.append([builder.phi(FLOATS) for _ in first])
            for phi, value in zip(running[-1], first, strict=True):
                phi.add_incoming(value, before)

        step = 2 if rows == 1 else 1
        moments = [builder.add(k, I64(i)) for i in range(step)]
        factors = [tile_row(moment) for moment in moments] * (1 if rows == 1 else rows)
        inputs = [broadcast(builder, builder.load(builder.gep(x, [moment]))) for x in xs for moment in moments]
        sums = [
            [multiply_add(builder, weight, value, total) for weight, total in zip(row, totals, strict=True)]
            for row, value, totals in zip(factors, inputs, running, strict=True)
        ]
        following = builder.add(k, I64(step))
        k.add_incoming(following, loop)
        for phis, values in zip(running, sums, strict=True):
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, K), loop, after)

        builder.position_at_end(after)
        if rows == 1:
            sums = [[builder.fadd(a, b) for a, b in zip(*sums, strict=True)]]
        for out, values in zip(outs, sums, strict=True):
            for i, value in enumerate(values):
                builder.store(value, vector(out, i), align=4)
        return context.get_dummy_value()

    return codegen


@intrinsic
def _one_row(_context: Any, out: Any, o: Any, x: Any, i: Any, weights: Any, w: Any, K: Any) -> Any:
    size = types.int64
    return types.void(out, size, x, size, weights, size, size), _multiply(1)


@intrinsic
def _two_rows(_context: Any, out: Any, o1: Any, o2: Any, x: Any, i1: Any, i2: Any, weights: Any, w: Any, K: Any) -> Any:
    size = types.int64
    return types.void(out, size, size, x, size, size, weights, size, size), _multiply(2)


# ---- compiled functions


@inner
def multiply(out, o, out_step, x, i, x_step, rows, weights, w, N, K):
    """out[o + r out_step + n] += the matrix [N, K] times x[i + r x_step :], for each row r.

    out, x float32, flat; the matrix lies at weights[w:] in tiles (float32, or packed uint32, of which w
    counts the elements). N is whole tiles, K even and at least 2. Returns where the next matrix begins.
    """
    for n in range(o, o + N, TILE):
        begin = 0
        while begin < K:  # of a tile, as much as stays in the nearest cache while the rows pass
            size = K - begin if rows <= 2 else min(K - begin, _NEAR)
            place = i + begin
            for r in range(0, rows - 1, 2):
                a, b = r, r + 1
                _two_rows(
                    out, n + a * out_step, n + b * out_step, x, place + a * x_step, place + b * x_step, weights, w, size
                )
            if rows % 2 == 1:
                r = rows - 1
                _one_row(out, n + r * out_step, x, place + r * x_step, weights, w, size)
            w += TILE * size
            begin += size
    return w


@inner
def copy_to_rows(out, o, rows, x, i, n):
    """Puts x[i : i + n] into each of the `rows` rows of n that begin at out[o]."""
    for r in range(rows):
        copy(out, o + r * n, x, i, n)


@inner
def relu(x):
    for i in range(x.size):
        x[i] = max(x[i], np.float32(0))


@inner
def tanh_sigmoid(a, b):
    """tanh(a) * sigmoid(b) with one division, to 1e-7."""
    e = exp(-TWO * clamp(a, np.float32(10)))
    return (ONE - e) / ((ONE + e) * (ONE + exp(-clamp(b, np.float32(40)))))


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
