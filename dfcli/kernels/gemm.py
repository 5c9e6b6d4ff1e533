"""Matrix products, and everything else here that is generated as LLVM code.

Why it exists: a small model's products are so short that calling a library for each takes longer than the work, and
no C compiler may be expected on a user's machine. numba compiles plain loops, but LLVM keeps the sums of a product in
memory there, which costs a third of the speed or more. So the inner loop alone is generated as vector code, which LLVM
translates for any CPU: a vector of 8 floats is one AVX2 register, two of NEON; with AVX-512 `product` uses 16.

What is generated, here for a tile of 4 rows and 2 vectors; the sums stay in registers during the loop:

                          b row k:  [ vector 0 | vector 1 ]          out[m, :] += sum over k of a[m, k] * b[k, :]
    a[0, k]  -> broadcast   x       [  sums 0  |  sums 1  ]
    a[1, k]  -> broadcast   x       [  sums 2  |  sums 3  ]          in NumPy: out += a @ b
    a[2, k]  -> broadcast   x       [  sums 4  |  sums 5  ]
    a[3, k]  -> broadcast   x       [  sums 6  |  sums 7  ]

One generator (`_tile`) serves two products:

- `product`, for training: tiles of up to 8 rows and 32 columns. `a` may lie either way round, b by rows.
  `panel_product` is the same for a large b that `pack` has put into panels of as many columns, so that a tile reads b
  from front to back.
- `multiply`, for generation: one or two rows times a matrix in tiles of 32 outputs (`tiles`). At batch 1 each weight is
  read once and multiplied once, so the memory or cache that holds the weights is the limit if they are read from front
  to back. A single row has two sets of sums, because an addition waits for the one before. Two rows use each weight
  twice. The weights may be bfloat16 in pairs, half the bytes: a word shifted left is one float32, and the same word
  taken as a float32 is the other, whose lower 16 bits are then the first (`to_bfloat16`).

Where a processor has AMX, tiles of 16 rows of 64 bytes with a unit that multiplies them, training takes bfloat16
products with float32 sums, at 4 to 5 times the speed (`linear`, `outer`). A word of 32 bits holds two successive k:

    tile of a, 16 rows m:  [ a[m, 0] a[m, 1] | a[m, 2] a[m, 3] | ... 16 words ]       sums[m, n] += sum over the words w
    tile of b, 16 words w: [ b[2w, 0] b[2w + 1, 0] | b[2w, 1] b[2w + 1, 1] | ... ]    of a[m, w] . b[w, n]

Arrays are flat float32. They come with the place where to begin, not as slices, because numba counts references to
every slice by atomic operations. Indices are unsigned, because a look at their sign forbids vector code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import config, extending, types
from numpy import uintp
from numpy.typing import NDArray

from dfcli.kernels.compile import called, inner
from dfcli.kernels.ops import ZERO, add, fill

COLUMNS = 16  # of the narrowest tile of `product`
# Lanes of a vector, rows of a tile, and of a second one for the 4 of 16 rows that tiles of 6 leave (0: none). Two
# vectors a row, two of b and one of a fit in 32 registers of 16 floats (AVX-512), or in 16 of 8.
LANES, ROWS, FEW = (16, 8, 0) if binding.get_host_cpu_features().get("avx512f") else (8, 6, 4)
PANEL = 2 * LANES  # columns of the widest tile, two vectors
TILE = 32  # outputs of one tile of `multiply`, in vectors of WIDTH; channels are padded to multiples of it
WIDTH = 8
TINY = (127 - 60) << 23  # the bits of 2^-60 as a float32
_NEAR = 128  # inputs of such a tile whose weights take 16 KiB
AMX = (  # whether this processor has it, and numba is not told to compile for another one
    sys.platform == "linux"
    and binding.get_host_cpu_features().get("amx-bf16", False)
    and not (config.CPU_NAME or config.CPU_FEATURES)  # type: ignore[attr-defined]
)
WORDS = 16  # of a row of an AMX tile, and its rows
SIDE = 32  # rows and columns of the sums that four tiles hold; and the k of a tile
# The tiles' sizes as a processor reads them: palette 1, 64 bytes a row from byte 16 on, 16 rows from byte 48 on.
_TILES = np.array([1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8, np.uint8)

_I64, _I32, _I8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_intrinsic: Any = extending.intrinsic
_size = types.int64


# ---- generated code


def _pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """The address of an array's element."""
    return builder.gep(context.make_array(kind)(context, builder, value=array).data, [offset])


def _vector(builder: Any, pointer: Any, index: int, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [_I64(kind.count * index)]), kind.as_pointer())


def _broadcast(builder: Any, value: Any, kind: Any) -> Any:
    """A vector that holds the value in each lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, _I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


def _b_row(builder: Any, b: Any, vectors: int, kind: Any, paired: bool) -> list[Any]:
    """The vectors of one row of b, which may be bfloat16 in pairs."""
    if not paired:
        return [builder.load(_vector(builder, b, v, kind), align=4) for v in range(vectors)]
    found, words = [], ir.VectorType(_I32, kind.count)
    for v in range(vectors // 2):
        word = builder.load(_vector(builder, b, v, words), align=4)
        low = builder.shl(word, ir.Constant(words, [16] * kind.count))
        found += [builder.bitcast(low, kind), builder.bitcast(word, kind)]
    return found


def _loop(builder: Any, starts: list[Any], K: Any, step: Callable[..., list[Any]]) -> list[Any]:
    """Code that repeats `step`, from values to the next ones, while the first of them is below K: from `starts` on, at
    least once. Gives the last ones."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    phis = [builder.phi(start.type) for start in starts]
    following = step(*phis)
    for phi, start, value in zip(phis, starts, following, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following[0], K), loop, after)
    builder.position_at_end(after)
    return following


def _tile(rows: int, columns: int, lanes: int, chains: int = 1) -> Any:
    """Code of `out[o + m o_row + n] += sum over k < K of a[i + m a_row + k a_k] * b[j + k b_row + n]`, for m < rows and
    n < columns, in vectors of `lanes`, with `chains` sets of sums. K is a positive multiple of `chains`.

    Its arguments: out, o, o_row, a, i, a_row, a_k, b, j, b_row, K.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds, kind, vectors = signature.args, ir.VectorType(ir.FloatType(), lanes), columns // lanes
        out, o, o_row, a, i, a_row, a_k, b, j, b_row, K = arguments
        paired = kinds[7].dtype != types.float32
        if paired:
            j, b_row = (builder.lshr(value, _I64(1)) for value in (j, b_row))
        first = _pointer(context, builder, kinds[0], out, o)
        outs = [builder.gep(first, [builder.mul(o_row, _I64(m))]) for m in range(rows)]
        begins = [builder.mul(a_row, _I64(m)) for m in range(rows)]
        starts = [_I64(0), _pointer(context, builder, kinds[3], a, i), _pointer(context, builder, kinds[7], b, j)]
        starts += [builder.load(_vector(builder, row, v, kind), align=4) for row in outs for v in range(vectors)]
        starts += [ir.Constant(kind, [0.0] * lanes)] * (rows * vectors * (chains - 1))

        def step(k: Any, a: Any, b: Any, *totals: Any) -> list[Any]:
            sums = []
            for _ in range(chains):
                weights = _b_row(builder, b, vectors, kind, paired)
                for begin in begins:
                    value = _broadcast(builder, builder.load(builder.gep(a, [begin])), kind)
                    for weight in weights:
                        part = builder.fmul(weight, value, flags=("contract",))
                        sums.append(builder.fadd(part, totals[len(sums)], flags=("contract",)))
                a, b = builder.gep(a, [a_k]), builder.gep(b, [b_row])
            return [builder.add(k, _I64(chains)), a, b, *sums]

        _, _, _, *sums = _loop(builder, starts, K, step)
        count = rows * vectors
        for n in range(count):
            total = sums[n]
            for chain in range(1, chains):
                total = builder.fadd(total, sums[chain * count + n])
            builder.store(total, _vector(builder, outs[n // vectors], n % vectors, kind), align=4)
        return context.get_dummy_value()

    return codegen


def _tile_function(rows: int, columns: int, lanes: int, chains: int = 1) -> Any:
    """`_tile` of this size, to be called from compiled code."""

    def tile(_context, out, o, o_row, a, i, a_row, a_k, b, j, b_row, K):
        kind = types.void(out, _size, _size, a, _size, _size, _size, b, _size, _size, _size)
        return kind, _tile(rows, columns, lanes, chains)

    return _intrinsic(tile)


_one_row, _few_rows, _rows = (_tile_function(rows, COLUMNS, LANES) for rows in (1, FEW, ROWS))
_row_of_pair, _rows_of_pair = (_tile_function(rows, PANEL, LANES) for rows in (1, ROWS))
_one_wide_row, _two_wide_rows = _tile_function(1, TILE, WIDTH, chains=2), _tile_function(2, TILE, WIDTH)


@_intrinsic
def _prefetch_line(_context, x, i):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # to be read, kept in all caches, data
        return context.get_dummy_value()

    return types.void(x, _size), codegen


@_intrinsic
def store_release(_context, flags, i, value):
    """flags[i] = value; a thread that reads it by `load_acquire` sees everything written before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags, i, value = arguments
        builder.store_atomic(value, _pointer(context, builder, signature.args[0], flags, i), "release", 8)
        return context.get_dummy_value()

    return types.void(flags, _size, _size), codegen


@_intrinsic
def load_acquire(_context, flags, i):
    """flags[i], and what was written before it by `store_release`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature.args[0], *arguments), "acquire", 8)

    return _size(flags, _size), codegen


@_intrinsic
def fetch_add(_context, flags, i):
    """flags[i], which is 1 more afterwards; no two threads get the same number."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", pointer, _I64(1), "monotonic")

    return _size(flags, _size), codegen


@_intrinsic
def call(_context, function):
    """Call a C function without arguments at this address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(builder.inttoptr(arguments[0], ir.FunctionType(_I32, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(_size), codegen


def _amx(builder: Any, name: str, *arguments: Any) -> None:
    """Call one of LLVM's AMX functions; elsewhere nothing is made, and nothing may come here."""
    if AMX:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        known = builder.module.globals.get(f"llvm.x86.{name}")
        builder.call(known or ir.Function(builder.module, kind, f"llvm.x86.{name}"), arguments)


@_intrinsic
def _begin_tiles(_context, config):
    """Give the tiles of this thread these sizes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args[0], arguments[0], _I64(0))
        _amx(builder, "ldtilecfg", builder.bitcast(place, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(config), codegen


@_intrinsic
def _end_tiles(_context):

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _amx(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@_intrinsic
def _square(_context, out, o, o_row, a, i, a_row, b, j, b_row, K):
    """The sums of SIDE rows m and SIDE columns n: out[o + m o_row + n] += sum over w < K / 2 of the two products of
    a[i + m a_row + w] and b[j + w b_row + n], words of two bfloat16. K is a multiple of SIDE,
    and not 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        out, o, o_row, a, i, a_row, b, j, b_row, K = arguments

        def place(kind: Any, array: Any, offset: Any) -> Any:
            return builder.bitcast(_pointer(context, builder, kind, array, offset), _I8.as_pointer())

        def moved(pointer: Any, rows: int, stride: Any) -> Any:
            return builder.gep(pointer, [builder.mul(stride, _I64(rows))])

        out_step, a_step, b_step = (builder.mul(row, _I64(4)) for row in (o_row, a_row, b_row))
        sums = [place(kinds[0], out, o)]
        sums.append(builder.gep(sums[0], [_I64(64)]))
        sums += [moved(pointer, 16, out_step) for pointer in sums]
        for tile, pointer in enumerate(sums):
            _amx(builder, "tileloadd64", _I8(tile), pointer, out_step)
        starts = [_I64(0), place(kinds[3], a, i), place(kinds[6], b, j)]

        def step(k: Any, a: Any, b: Any) -> list[Any]:
            for half in (0, 1):
                _amx(builder, "tileloadd64", _I8(4 + half), moved(a, 16 * half, a_step), a_step)
                _amx(builder, "tileloadd64", _I8(6 + half), builder.gep(b, [_I64(64 * half)]), b_step)
            for tile in range(4):
                _amx(builder, "tdpbf16ps", _I8(tile), _I8(4 + tile // 2), _I8(6 + tile % 2))
            return [builder.add(k, _I64(SIDE)), builder.gep(a, [_I64(64)]), moved(b, 16, b_step)]

        _loop(builder, starts, K, step)
        for tile, pointer in enumerate(sums):
            _amx(builder, "tilestored64", _I8(tile), pointer, out_step)
        return context.get_dummy_value()

    return types.void(out, _size, _size, a, _size, _size, b, _size, _size, _size), codegen


@_intrinsic
def _turn(_context, out, o, o_row, x, i, x_row):
    """out[o + c o_row + r] = x[i + r x_row + c], for r and c < 16, of 32 bits each: in four rounds, each of which swaps
    the off-diagonal quarters of squares half as large."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, o, o_row, x, i, x_row = arguments
        kind = ir.VectorType(_I32, 16)

        def row(array_kind: Any, array: Any, begin: Any, stride: Any, number: int) -> Any:
            offset = builder.add(begin, builder.mul(stride, _I64(number)))
            return builder.bitcast(_pointer(context, builder, array_kind, array, offset), kind.as_pointer())

        rows = [builder.load(row(signature.args[3], x, i, x_row, r), align=4) for r in range(16)]
        for side in (1, 2, 4, 8):
            upper = [16 + c - side if c & side else c for c in range(16)]
            lower = [16 + c if c & side else c + side for c in range(16)]
            for r in range(16):
                if not r & side:
                    pair = rows[r], rows[r + side]
                    rows[r] = builder.shuffle_vector(*pair, ir.Constant(kind, upper))
                    rows[r + side] = builder.shuffle_vector(*pair, ir.Constant(kind, lower))
        for r, value in enumerate(rows):
            builder.store(value, row(signature.args[0], out, o, o_row, r), align=4)
        return context.get_dummy_value()

    return types.void(out, _size, _size, x, _size, _size), codegen


# ---- compiled functions


@inner
def _columns(pair, out, o, o_row, a, i, a_row, a_k, b, j, b_row, size):
    """`product` for the columns of one tile: COLUMNS of them, or, for a pair of vectors, PANEL."""
    M, _, K = size
    m = 0
    while m + ROWS <= M:
        if pair:
            _rows_of_pair(out, o + m * o_row, o_row, a, i + m * a_row, a_row, a_k, b, j, b_row, K)
        else:
            _rows(out, o + m * o_row, o_row, a, i + m * a_row, a_row, a_k, b, j, b_row, K)
        m += ROWS
    while FEW and m + FEW <= M:
        _few_rows(out, o + m * o_row, o_row, a, i + m * a_row, a_row, a_k, b, j, b_row, K)
        m += FEW
    while m < M:
        if pair:
            _row_of_pair(out, o + m * o_row, o_row, a, i + m * a_row, a_row, a_k, b, j, b_row, K)
        else:
            _one_row(out, o + m * o_row, o_row, a, i + m * a_row, a_row, a_k, b, j, b_row, K)
        m += 1


@inner
def product(out, o, o_row, a, i, a_row, a_k, b, j, b_row, size):
    """out[o + m o_row + n] += sum over k < K of a[i + m a_row + k a_k] * b[j + k b_row + n], for m < M and n < N, where
    `size` is (M, N, K).

    With a_k = 1 the rows of `a` are multiplied, with a_row = 1 its columns. N is a multiple of COLUMNS. Made for a `b`
    of which K rows of a tile stay in the nearest cache, and an `a` that does.
    """
    N, n = size[1], 0
    while n + PANEL <= N:
        _columns(PANEL > COLUMNS, out, o + n, o_row, a, i, a_row, a_k, b, j + n, b_row, size)
        n += PANEL
    if n < N:
        _columns(False, out, o + n, o_row, a, i, a_row, a_k, b, j + n, b_row, size)


@inner
def panel_product(out, o, o_row, a, i, a_row, b, j, size):
    """`product` of the rows of `a` with a `b` that `pack` has put into panels: for one too large for the nearest
    caches. N is that of `pack`, rounded up to a multiple of COLUMNS."""
    _, N, K = size
    n = 0
    while n + PANEL <= N:
        _columns(PANEL > COLUMNS, out, o + n, o_row, a, i, a_row, 1, b, j + n * K, PANEL, size)
        n += PANEL
    if n < N:
        _columns(False, out, o + n, o_row, a, i, a_row, 1, b, j + n * K, COLUMNS, size)


@called
def pack(out, o, x, i, x_row, x_column, K, N):
    """The matrix x[i + k x_row + n x_column] of K rows and N columns as panels of PANEL columns, one after the other;
    the last has COLUMNS if at most COLUMNS are left. Columns of `out` beyond N stay as they are."""
    n = 0
    while n < N:
        width = PANEL if N - n > COLUMNS else COLUMNS
        for k in range(K):
            for c in range(min(width, N - n)):
                out[uintp(o + n * K + k * width + c)] = x[uintp(i + k * x_row + (n + c) * x_column)]
        n += width


@inner
def transposed(out, o, o_row, x, i, x_row, rows, columns):
    """out[o + c o_row + r] = x[i + r x_row + c]"""
    for r in range(rows):
        for c in range(columns):
            out[uintp(o + c * o_row + r)] = x[uintp(i + r * x_row + c)]


class Rounding(NamedTuple):
    """Of one thread: what products in bfloat16 take besides their arguments."""

    on: bool  # False: products in float32, and no memory
    words: Any  # uint32: first the rows of `a` in words [m, k / 2], behind its middle two rows a word [k / 2, n]


def rounding_words(rows, width):
    """The size of the words that `rounding` takes."""
    return 2 * (rows + SIDE) * (width + 3 * SIDE)


_rounding_words = inner(rounding_words)


@inner
def rounding(on, rows, width):
    """Memory for products of up to so many `rows` and a matrix of up to `width` inputs and outputs, and tiles, until
    `end_rounding`."""
    if AMX and on:
        _begin_tiles(_TILES)
    return Rounding(on, np.empty(_rounding_words(rows, width) if on else 0, np.uint32))


@inner
def end_rounding(rounding):
    """This thread's tiles need not be kept by the system any longer."""
    if AMX and rounding.on:
        _end_tiles()


@inner
def round_up(n, to=COLUMNS):
    """n rounded up to a multiple of `to`."""
    return (n + to - 1) // to * to


@inner
def row_stride(width):
    """Floats from the beginning of a matrix's row to that of the next, for rows of `width` floats rounded up to
    COLUMNS: an odd number of cache lines, so that rows use all the sets of the nearest cache. Rows of 128 floats would
    share 8 of its 64 sets."""
    return ((width + COLUMNS - 1) // COLUMNS | 1) * COLUMNS


@inner
def _words(K):
    """Words from one row of K bfloat16 to the next."""
    return row_stride(round_up(K, SIDE) // 2)


@inner
def _bits(x):
    """The bits of a float32, its upper half rounded to the nearest bfloat16; of a NaN those of one or of infinity."""
    bits = np.uint32(min(np.float32(x).view(np.int32), np.int32(0x7FFF0000)))  # rounded up, a larger one would be -0,
    bits = min(bits, np.uint32(0xFFFF0000))  # or 0
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))


@inner
def _round_rows(words, row, x, i, x_row, rows, columns):
    """The rows of x as bfloat16, `row` words apart, with zeros up to a multiple of SIDE."""
    halves = words.view(np.uint16)
    for r in range(rows):
        for c in range(columns):
            halves[uintp(2 * r * row + c)] = np.uint16(_bits(x[uintp(i + r * x_row + c)]) >> np.uint32(16))
        fill(halves, 2 * r * row + columns, round_up(columns, SIDE) - columns, np.uint16(0))


@inner
def _round_pairs(words, o, row, x, i, x_row, rows, columns):
    """Two successive rows of x as bfloat16 in one row of words, `row` apart, with zeros up to a multiple of SIDE."""
    for r in range(0, round_up(rows, SIDE), 2):
        for c in range(columns):
            low = _bits(x[uintp(i + r * x_row + c)]) >> np.uint32(16) if r < rows else np.uint32(0)
            high = _bits(x[uintp(i + (r + 1) * x_row + c)]) & np.uint32(0xFFFF0000) if r + 1 < rows else np.uint32(0)
            words[uintp(o + r // 2 * row + c)] = high | low


@inner
def _squares(words, out, o, o_row, a_row, b, j, b_row, b_next, size):
    """out += the matrix in `words` times b, of which the next SIDE columns begin `b_next` words later."""
    M, N, K = size
    sums, K = np.empty(SIDE * SIDE, np.float32), round_up(K, SIDE)  # the sums of a square at the edge
    for n in range(0, N, SIDE):
        begin = j + n // SIDE * b_next
        for m in range(0, M, SIDE):
            if m + SIDE <= M and n + SIDE <= N:
                _square(out, o + m * o_row + n, o_row, words, m * a_row, a_row, b, begin, b_row, K)
            else:
                fill(sums, 0, SIDE * SIDE, ZERO)
                _square(sums, 0, SIDE, words, m * a_row, a_row, b, begin, b_row, K)
                for r in range(min(SIDE, M - m)):
                    add(out, o + (m + r) * o_row + n, sums, r * SIDE, min(SIDE, N - n))


@called
def pack_pairs(rounding, out, o, x, i, x_row, x_column, K, N):
    """`pack` for `linear` in bfloat16, where either x_row or x_column is 1: panels of SIDE columns, each of words of
    two rows, K and N filled up to multiples of SIDE. `o` counts elements, two a word."""
    size, row = round_up(K, SIDE) // 2 * SIDE, _words(K)
    for n in range(0, N, SIDE):
        columns, place = min(SIDE, N - n), o // 2 + n // SIDE * size
        if x_column == 1:
            _round_pairs(out, place, SIDE, x, i + n, x_row, K, columns)
        else:
            _round_rows(rounding.words, row, x, i + n * x_column, x_column, columns, K)
            for k in range(0, size // SIDE, WORDS):
                for half in range(0, SIDE, WORDS):
                    _turn(out, place + k * SIDE + half, SIDE, rounding.words, half * row + k, row)


@called
def linear(rounding, out, o, o_row, a, i, a_row, b, j, size):
    """`panel_product`, in bfloat16 where `rounding` is on: b is then as `pack_pairs` has left it, and j counts its
    elements."""
    M, _, K = size
    if AMX and rounding.on:
        row = _words(K)
        _round_rows(rounding.words, row, a, i, a_row, M, K)
        _squares(rounding.words, out, o, o_row, row, b, j // 2, SIDE, round_up(K, SIDE) // 2 * SIDE, size)
    else:
        panel_product(out, o, o_row, a, i, a_row, b, j, size)


@called
def outer(rounding, out, o, o_row, a, i, a_row, b, j, b_row, size):
    """`product` of the columns of `a`, out[o + m o_row + n] += sum over k < K of a[i + k a_row + m] * b[j + k b_row +
    n]: a weight's gradient, over K positions. In bfloat16 where `rounding` is on."""
    M, N, K = size
    if AMX and rounding.on:
        row, wide = _words(K), round_up(max(M, N))
        pairs, half = rounding.words, rounding.words.size // 2
        _round_pairs(pairs, half, wide, a, i, a_row, K, M)
        for k in range(0, round_up(K, SIDE) // 2, WORDS):
            for m in range(0, M, WORDS):
                _turn(rounding.words, m * row + k, row, pairs, half + k * wide + m, wide)
        _round_pairs(pairs, half, wide, b, j, b_row, K, N)
        _squares(rounding.words, out, o, o_row, row, pairs, half, wide, SIDE, size)
    else:
        product(out, o, o_row, a, i, 1, a_row, b, j, b_row, size)


@inner
def multiply(out, o, out_row, x, i, x_row, rows, weights, w, N, K):
    """out[o + r out_row + n] += the matrix [N, K] times x[i + r x_row :], for each row r.

    The matrix lies at weights[w:] as `tiles` (float32, or `to_bfloat16` words, of which w counts the elements). N is a
    multiple of TILE, K even and at least 2. Returns where the next matrix begins.
    """
    for n in range(o, o + N, TILE):
        begin = 0
        while begin < K:  # of a tile, as much as stays in the nearest cache while the rows pass
            size = K - begin if rows <= 2 else min(K - begin, _NEAR)
            for r in range(0, rows - 1, 2):
                _two_wide_rows(
                    out, n + r * out_row, out_row, x, i + begin + r * x_row, x_row, 1, weights, w, TILE, size
                )
            if rows % 2 == 1:
                r = rows - 1
                _one_wide_row(out, n + r * out_row, out_row, x, i + begin + r * x_row, x_row, 1, weights, w, TILE, size)
            w += TILE * size
            begin += size
    return w


@inner
def prefetch(x, i, n):
    """Have x[i : i + n] fetched while other work goes on, where it lies anywhere in a large table."""
    for k in range(0, n, COLUMNS):
        _prefetch_line(x, i + k)


# ---- layout, in NumPy


def padded(size: int) -> int:
    """`size` rounded up to a multiple of TILE."""
    return -(-size // TILE) * TILE


def pad(array: NDArray[np.float32], *shape: int) -> NDArray[np.float32]:
    """`array` with zeros behind it along every axis."""
    return np.pad(array, [(0, size - old) for size, old in zip(shape, array.shape, strict=True)])


def tiles(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix [N, K], N a multiple of TILE and K even, as the flat tiles [N / 32, K, 32] of `multiply`."""
    N, K = matrix.shape
    return matrix.reshape(N // TILE, TILE, K).swapaxes(1, 2).ravel()


def join(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The parts behind each other, from an address where a large page begins: large pages spare address look-ups."""
    size, page = sum(part.size for part in parts), 2**21 // 4
    buffer = np.empty(size + page, np.float32)
    start = -(buffer.ctypes.data // 4) % page
    return np.concatenate([part.ravel() for part in parts], out=buffer[start : start + size])


def to_bfloat16(weights: NDArray[np.float32]) -> NDArray[np.uint32]:
    """float32 tiles as bfloat16 in pairs: a word holds elements i and i + 8 of 16 successive floats. The second is
    rounded so that, with the first behind it, it is within half a unit of bfloat16's last place. A zero beside another
    number, such as padding, becomes 2^-60: with that number behind it alone it would be denormal, which is slow."""
    low, high = (part.astype(np.int64) for part in weights.view(np.uint32).reshape(-1, 2, WIDTH).swapaxes(0, 1))
    low = (low + 0x7FFF + (low >> 16 & 1)) >> 16
    sign, high = high & 1 << 31, high & ~(1 << 31)
    # The word nearest to `high` that ends in `low`; nothing lies below 0.
    word = np.maximum(high - low + 0x8000 & ~0xFFFF, 0) + low
    word = np.where((high == 0) & (low != 0), TINY + low, word)
    return (sign + word).astype(np.uint32).ravel()
