"""Compiled functions over flat float32 arrays that serve both training and generation: exp, sums, matrix products, and
a meeting of threads. They are called from compiled code only.

Arrays come with the place where to begin, not as slices, and indices are unsigned: numba would count references to
every slice, by atomic operations, and look at the sign of every index, which forbids vector code.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numpy import uintp
from torch import Tensor

from dfcli.kernels.compile import OPTIONS, Compiled, inner, njit
from dfcli.system.events import OnEvent

WIDTH = 8  # floats of one vector: one AVX2 register, or two of NEON
COLUMNS = 2 * WIDTH  # that a product computes at once
ROWS = 6  # so that a product needs 12 + 2 + 1 of 16 registers, and does not wait for its sums
FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
I64, I32 = ir.IntType(64), ir.IntType(32)

intrinsic: Any = extending.intrinsic
# Sums of these may be taken in any order, which makes vector code of them.
any_order = njit(
    **OPTIONS | {"fastmath": {"contract", "nsz", "reassoc"}}, no_cpython_wrapper=True, no_cfunc_wrapper=True
)

_LEAST = np.float32(-87)  # what exp takes
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
_HALF = np.float32(0.5)
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has 12 bits: n * it is exact
_P0, _P1, _P2, _P3, _P4, _P5 = (
    np.float32(p)
    for p in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@inner
def exp(x):
    """exp of a float32 in [-87, 87], to 2 units of the last place; a loop over it becomes vector code.

    The method and the polynomial of Cephes' expf (Moshier 1992): 2^n e^r with |r| <= ln(2) / 2.
    """
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + ONE) * power


@inner
def largest(x, i, n):
    """The largest of x[i : i + n], n >= 1, by four chains, as a comparison waits for the one before."""
    a = b = c = d = x[uintp(i)]
    for k in range(0, n - 3, 4):
        a, b = max(a, x[uintp(i + k)]), max(b, x[uintp(i + k + 1)])
        c, d = max(c, x[uintp(i + k + 2)]), max(d, x[uintp(i + k + 3)])
    for k in range(n // 4 * 4, n):
        a = max(a, x[uintp(i + k)])
    return max(max(a, b), max(c, d))


@any_order
def exp_sum(x, i, n, factor, most):
    """x[i : i + n] = exp(factor * (x - most)), for what is at most `most`; and its sum."""
    total = ZERO
    for k in range(n):
        value = factor * (x[uintp(i + k)] - most)
        e = exp(_LEAST if value < _LEAST else value)
        x[uintp(i + k)] = e
        total += e
    return total


@inner
def cross_entropy(logits, i, V, target, factor):
    """The cross-entropy of logits[i : i + V], in nats; they become `factor` times its gradient."""
    most = largest(logits, i, V)
    right = logits[uintp(i + target)] - most
    total = exp_sum(logits, i, V, ONE, most)
    share = factor / total
    for v in range(V):
        logits[uintp(i + v)] *= share
    logits[uintp(i + target)] -= factor
    return np.log(total) - right


@inner
def clamp(x, most):
    """x within [-most, most]; not a number stays so."""
    return -most if x < -most else (most if x > most else x)


@any_order
def dot(x, i, y, j, n):
    """The sum of x[i : i + n] * y[j : j + n]."""
    total = ZERO
    for k in range(n):
        total += x[uintp(i + k)] * y[uintp(j + k)]
    return total


@inner
def fill(out, o, n, value):
    """out[o : o + n] = value"""
    for k in range(n):
        out[uintp(o + k)] = value


@inner
def copy(out, o, x, i, n):
    """out[o : o + n] = x[i : i + n]"""
    for k in range(n):
        out[uintp(o + k)] = x[uintp(i + k)]


@inner
def add(out, o, x, i, n):
    """out[o : o + n] += x[i : i + n]"""
    for k in range(n):
        out[uintp(o + k)] += x[uintp(i + k)]


@inner
def add_times(out, o, factor, x, i, n):
    """out[o : o + n] += factor * x[i : i + n]"""
    for k in range(n):
        out[uintp(o + k)] += factor * x[uintp(i + k)]


@inner
def norm(out, o, x, i, n):
    """RMSNorm without gain, as torch's: out[o : o + n] = scale * x[i : i + n]. Returns the scale, 1 / sqrt(mean square
    + smallest step above 1)."""
    scale = np.float32(1 / np.sqrt(dot(x, i, x, i, n) / np.float32(n) + np.float32(2**-23)))
    for k in range(n):
        out[uintp(o + k)] = x[uintp(i + k)] * scale
    return scale


@inner
def norm_back(dx, d, dy, g, y, i, scale, n):
    """The gradient of `norm`, added: dx[d : d + n] from dy[g : g + n], what the norm gave y[i : i + n], its scale."""
    mean = dot(dy, g, y, i, n) / np.float32(n)
    for k in range(n):
        dx[uintp(d + k)] += scale * (dy[uintp(g + k)] - y[uintp(i + k)] * mean)


@inner
def rotate(x, i, D, cos, sin, angle, direction):
    """Turns the pairs (x[i + k], x[i + D / 2 + k]) by the angles that begin at `angle`: forwards, or back where the
    direction is -1 (float32)."""
    half = D // 2
    for k in range(half):
        a, b = x[uintp(i + k)], x[uintp(i + half + k)]
        c, s = cos[uintp(angle + k)], direction * sin[uintp(angle + k)]
        x[uintp(i + k)], x[uintp(i + half + k)] = a * c - b * s, a * s + b * c


@intrinsic
def _prefetch_line(_context, x, i):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # to be read, kept in all caches, data
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@inner
def prefetch(x, i, n):
    """Have x[i : i + n] fetched while other work goes on, where it lies anywhere in a large table."""
    for k in range(0, n, COLUMNS):
        _prefetch_line(x, i + k)


# ---- products of matrices that fit the caches, in which a library's calls would take longer than the work


def broadcast(builder: Any, value: Any) -> Any:
    """A vector of 8 times the value."""
    nothing = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, WIDTH), [0] * WIDTH))


def multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), total, flags=("contract",))


def _tile(rows: int) -> Any:
    """Code of `out[o + m o_row + n] += sum over k < K of a[i + m a_row + k a_k] * b[j + k b_row + n]` for m < rows and
    n < COLUMNS: the sums stay in registers, which LLVM does not do with plain loops.

    Its arguments: out, o, o_row, a, i, a_row, a_k, b, j, b_row, K; K >= 1.
    """
    vectors = COLUMNS // WIDTH

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def at(array: int, offset: Any) -> Any:
            data = context.make_array(signature.args[array])(context, builder, value=arguments[array]).data
            return builder.gep(data, [offset])

        def vector(pointer: Any, index: int) -> Any:
            return builder.bitcast(builder.gep(pointer, [I64(WIDTH * index)]), FLOATS.as_pointer())

        o, o_row, i, a_row, a_k, j, b_row, K = (arguments[n] for n in (1, 2, 4, 5, 6, 8, 9, 10))
        outs = [builder.gep(at(0, o), [builder.mul(o_row, I64(m))]) for m in range(rows)]
        begins = [builder.mul(a_row, I64(m)) for m in range(rows)]
        starts = [I64(0), at(3, i), at(7, j)]
        starts += [builder.load(vector(out, v), align=4) for out in outs for v in range(vectors)]

        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        phis = [builder.phi(start.type) for start in starts]
        k, a, b, *sums = phis
        factors = [builder.load(vector(b, v), align=4) for v in range(vectors)]
        for m in range(rows):
            value = broadcast(builder, builder.load(builder.gep(a, [begins[m]])))
            for v in range(vectors):
                sums[m * vectors + v] = multiply_add(builder, factors[v], value, sums[m * vectors + v])
        following = [builder.add(k, I64(1)), builder.gep(a, [a_k]), builder.gep(b, [b_row]), *sums]
        for phi, start, value in zip(phis, starts, following, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following[0], K), loop, after)

        builder.position_at_end(after)
        for n, value in enumerate(sums):
            builder.store(value, vector(outs[n // vectors], n % vectors), align=4)
        return context.get_dummy_value()

    return codegen


_size = types.int64


@intrinsic
def _one_row(_context, out, o, o_row, a, i, a_row, a_k, b, j, b_row, K):
    return types.void(out, _size, _size, a, _size, _size, _size, b, _size, _size, _size), _tile(1)


@intrinsic
def _four_rows(_context, out, o, o_row, a, i, a_row, a_k, b, j, b_row, K):
    return types.void(out, _size, _size, a, _size, _size, _size, b, _size, _size, _size), _tile(4)


@intrinsic
def _rows(_context, out, o, o_row, a, i, a_row, a_k, b, j, b_row, K):
    return types.void(out, _size, _size, a, _size, _size, _size, b, _size, _size, _size), _tile(ROWS)


@inner
def product(out, o, o_row, a, i, a_row, a_k, b, j, b_row, M, N, K):
    """out[o + m o_row + n] += sum over k < K of a[i + m a_row + k a_k] * b[j + k b_row + n], for m < M and n < N.

    So `a` may lie either way round: with a_k = 1 its rows are multiplied, with a_row = 1 its columns. N is a multiple
    of COLUMNS. Made for a `b` of which K rows of COLUMNS, and an `a` that, stay in the nearest cache.
    """
    for n in range(0, N, COLUMNS):
        m = 0
        while m + ROWS <= M:
            _rows(out, o + m * o_row + n, o_row, a, i + m * a_row, a_row, a_k, b, j + n, b_row, K)
            m += ROWS
        if m + 4 <= M:
            _four_rows(out, o + m * o_row + n, o_row, a, i + m * a_row, a_row, a_k, b, j + n, b_row, K)
            m += 4
        while m < M:
            _one_row(out, o + m * o_row + n, o_row, a, i + m * a_row, a_row, a_k, b, j + n, b_row, K)
            m += 1


@inner
def packed_product(out, o, o_row, a, i, a_row, a_k, b, j, M, N, K):
    """`product` with a `b` that lies as `pack` has put it: made for one too large for the nearest caches."""
    for n in range(0, N, COLUMNS):
        product(out, o + n, o_row, a, i, a_row, a_k, b, j + n * K, COLUMNS, M, COLUMNS, K)


@inner
def pack(out, o, x, i, x_row, x_column, K, N):
    """The matrix x[i + k x_row + n x_column] of K rows and N columns for `packed_product`: COLUMNS of its columns after
    the others, so that what is read at once lies together. Of an `out` for `whole` columns the rest stays."""
    for n in range(0, N, COLUMNS):
        for k in range(K):
            for c in range(min(COLUMNS, N - n)):
                out[uintp(o + n * K + k * COLUMNS + c)] = x[uintp(i + k * x_row + (n + c) * x_column)]


@inner
def transposed(out, o, o_row, x, i, x_row, rows, columns):
    """out[o + c o_row + r] = x[i + r x_row + c]"""
    for r in range(rows):
        for c in range(columns):
            out[uintp(o + c * o_row + r)] = x[uintp(i + r * x_row + c)]


def round_up(n):
    """n rounded up to whole columns of a product."""
    return (n + COLUMNS - 1) // COLUMNS * COLUMNS


def row_stride(width):
    """Floats from the beginning of a matrix's row to that of the next, for rows of `width` floats in whole columns of a
    product: an odd number of cache lines, so that rows lie in all the sets of the nearest cache. Rows of 128 floats
    would share 8 of its 64 sets."""
    return ((width + COLUMNS - 1) // COLUMNS | 1) * COLUMNS


# ---- threads that each advance a worker of the same work


@intrinsic
def _publish(_context, flags, i, value):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        builder.store_atomic(arguments[2], builder.gep(data, [arguments[1]]), "release", 8)
        return context.get_dummy_value()

    return types.void(flags, _size, _size), codegen


@intrinsic
def _look(_context, flags, i):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(flags, _size), codegen


@intrinsic
def _yield(_context, function):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(builder.inttoptr(arguments[0], ir.FunctionType(I32, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(_size), codegen


_FLAG_STRIDE = 8  # int64 of one cache line
_PATIENCE = 2000  # looks, about 10 microseconds


def _yield_address() -> int:
    """The address of the system's function by which a thread lets others run."""
    library = ctypes.WinDLL("kernel32").SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield  # type: ignore[attr-defined]
    return ctypes.cast(library, ctypes.c_void_p).value or 0


@inner
def barrier(flags, worker, workers, count, yielder):
    """Wait until all `workers` threads have come here for the `count`-th time; what they wrote before is then seen.
    False where one never will: then stop.

    `flags` and `way` come from `WorkerPool`."""
    _publish(flags, worker * _FLAG_STRIDE, count)
    for other in range(workers):
        looks = 0
        while _look(flags, other * _FLAG_STRIDE) < count:
            looks += 1
            if looks > _PATIENCE:  # its thread may wait for this very core
                if _look(flags, workers * _FLAG_STRIDE):
                    return False
                _yield(yielder)
    return True


def _flat(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_flat(each) for each in argument)
    return argument.detach().view(-1).numpy() if isinstance(argument, Tensor) else argument


class WorkerPool:
    """Runs a compiled function `function(worker, workers, flags, yielder, ...)` on threads, one a worker."""

    def __init__(self, threads: int) -> None:
        self.count, self._pool, self._yield_address = threads, ThreadPoolExecutor(threads), _yield_address()

    def run(self, function: Callable[..., None], *arguments: Any, count: int | None = None) -> None:
        """In `count` workers, or as many as there are threads. Tensors among the arguments, or in tuples there, must be
        contiguous; they are passed as flat arrays."""
        count = count or self.count
        flat = [_flat(a) for a in arguments]
        flags = np.zeros((count + 1) * _FLAG_STRIDE, np.int64)
        try:
            running = [
                self._pool.submit(function, worker, count, flags, self._yield_address, *flat) for worker in range(count)
            ]
            for each in wait(running, return_when=FIRST_EXCEPTION).done:
                each.result()
        except BaseException:  # a worker that failed or never began, or a signal: nobody is to wait for it
            flags[-_FLAG_STRIDE] = 1
            raise

    def load(self, on_event: OnEvent, *functions: tuple[Compiled, tuple[Any, ...]]) -> None:
        """Compile functions or load them: `Compiled.load`, each with arguments that make it do nothing."""
        told: list[object] = []

        def once(event: object) -> None:  # that it takes some seconds
            if not told:
                told.append(event)
                on_event(event)

        for function, arguments in functions:
            function.load(once, 0, 1, np.zeros(2 * _FLAG_STRIDE, np.int64), self._yield_address, *arguments)
