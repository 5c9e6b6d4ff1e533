"""Parts of the optimiser as compiled functions (numba), for small models on a CPU: Muon's products of matrices whose
smaller side is up to `WIDEST`, and the updates of the rows of n-gram tables. PyTorch's operations on them are so short
that starting them takes most of the time. `optim.orthogonalise_all` and `optim.update_rows` are the references (tests).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy import uintp
from torch import Tensor

from dfcli.kernels.compile import Compiled, inner
from dfcli.kernels.gpt_train import MOST_TABLES
from dfcli.kernels.ops import (
    COLUMNS,
    ONE,
    ZERO,
    WorkerPool,
    add_times,
    dot,
    fill,
    prefetch,
    product,
    row_stride,
    transposed,
)
from dfcli.system.events import OnEvent
from dfcli.training import optim

WIDEST = 128  # PyTorch's products of larger matrices are faster than ours
STEPS = 5
AHEAD = 8  # rows of a table: so long before its update one is fetched

_A, _B, _C = (np.float32(factor) for factor in optim.NEWTON_SCHULZ)
_SMALLEST = np.float32(1e-7)
_row_stride = inner(row_stride)


@inner
def _times(out, a, b, m, S):
    """out = a b, [m, m] with rows S row_stride; for an `out` that is symmetric, so that half of it is computed."""
    fill(out, 0, m * S, ZERO)
    for j in range(0, m, COLUMNS):
        product(out, j, S, a, 0, S, 1, b, j, S, j + COLUMNS, COLUMNS, m)
        for i in range(0, j, COLUMNS):
            transposed(out, j * S + i, S, out, i * S + j, S, COLUMNS, COLUMNS)


def newton_schulz(worker, workers, flags, yielder, matrices, places, rows, columns, out):
    """One worker's share of U V^T, about, of matrices U S V^T: `optim.orthogonalise` of each, its steps on products of
    the smaller side, all of them polynomials of one symmetric matrix.

    matrices float32, flat: each begins at its place and has so many rows and columns (int64), multiples of COLUMNS.
    Out, zeros at first: the same way.
    """
    for each in range(worker, places.size, workers):
        x, R, C = places[each], rows[each], columns[each]
        m, tall = min(R, C), R > C
        S = _row_stride(m)
        gram, p, half = np.empty(m * S, np.float32), np.empty(m * S, np.float32), np.empty(m * S, np.float32)
        whole, other = np.empty(m * S, np.float32), np.empty(m * S, np.float32)
        fill(gram, 0, m * S, ZERO)
        if tall:
            product(gram, 0, S, matrices, x, 1, C, matrices, x, C, m, m, R)
        else:
            turned = np.empty(C * S, np.float32)
            transposed(turned, 0, S, matrices, x, C, m, C)
            product(gram, 0, S, matrices, x, C, 1, turned, 0, S, m, m, C)
        square = ZERO
        for i in range(m):
            square += gram[uintp(i * S + i)]
        scale = ONE / (np.sqrt(square) + _SMALLEST)
        for i in range(m * S):
            gram[uintp(i)] *= scale * scale
        for step in range(STEPS):
            _times(p, gram, gram, m, S)
            for i in range(m * S):
                p[uintp(i)] = _B * gram[uintp(i)] + _C * p[uintp(i)]
            for i in range(m):
                p[uintp(i * S + i)] += _A
            if step == 0:
                for i in range(m * S):
                    whole[uintp(i)] = scale * p[uintp(i)]
            else:
                _times(other, whole, p, m, S)
                whole, other = other, whole
            if step + 1 < STEPS:
                _times(half, gram, p, m, S)
                _times(gram, half, p, m, S)
        if tall:
            product(out, x, C, matrices, x, C, 1, whole, 0, S, R, C, m)
        else:
            product(out, x, C, whole, 0, S, 1, matrices, x, C, R, C, m)


def row_rmsprop(worker, workers, flags, yielder, many, tables, rows, grads, updates, squares, lr, eps):
    """One worker of `optim.update_rows` of `many` tables, in tuples of MOST_TABLES flat arrays; `rows` are int64."""
    for table in range(many):
        N = rows[table].size
        C = grads[table].size // max(1, N)
        for i in range(worker * N // workers, (worker + 1) * N // workers):
            later = rows[table][uintp(min(i + AHEAD, N - 1))]
            prefetch(tables[table], later * C, C)
            prefetch(updates[table], later, 1)
            prefetch(squares[table], later, 1)
            row = rows[table][uintp(i)]
            count, square = updates[table][uintp(row)] + ONE, squares[table][uintp(row)]
            square += (dot(grads[table], i * C, grads[table], i * C, C) / np.float32(C) - square) / count
            updates[table][uintp(row)], squares[table][uintp(row)] = count, square
            step = lr / (np.sqrt(square) + eps)
            add_times(tables[table], row * C, -step, grads[table], i * C, C)


_newton_schulz, _row_rmsprop = (Compiled(f, [__file__, optim.__file__]) for f in (newton_schulz, row_rmsprop))


def speed_up(optimizer: optim.Optimizer, workers: WorkerPool, on_event: OnEvent) -> None:
    """Have `optimizer` compute by these functions what they can. Raises what numba raises where it cannot compile."""
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
    kinds = nothing, none, nothing, nothing, nothing
    workers.load(
        on_event,
        (_newton_schulz, (nothing, none, none, none, nothing)),
        (_row_rmsprop, (0, *((empty,) * MOST_TABLES for empty in kinds), ZERO, ZERO)),
    )

    def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
        ours = [matrix for matrix in matrices if _fits(matrix)]
        done = {id(matrix): new for matrix, new in zip(ours, _orthogonalise(ours, workers), strict=True)}
        others = [matrix for matrix in matrices if id(matrix) not in done]
        done |= {id(matrix): new for matrix, new in zip(others, optim.orthogonalise_all(others), strict=True)}
        return [done[id(matrix)] for matrix in matrices]

    def update_rows(tables: list[tuple[Tensor, ...]], lr: float, eps: float) -> None:
        if tables:
            columns = zip(zip(*tables, strict=True), kinds, strict=True)
            arrays = [each + (empty,) * (MOST_TABLES - len(tables)) for each, empty in columns]
            workers.run(_row_rmsprop, len(tables), *arrays, np.float32(lr), np.float32(eps))

    if optimizer.muon:
        optimizer.muon.orthogonalise_all = orthogonalise_all
    optimizer.rows.update_rows = update_rows


def _fits(matrix: Tensor) -> bool:
    return min(matrix.shape) <= WIDEST and not any(side % COLUMNS for side in matrix.shape)


def _orthogonalise(matrices: list[Tensor], workers: WorkerPool) -> list[Tensor]:
    if not matrices:
        return []
    sizes = [matrix.numel() for matrix in matrices]
    flat, ends = torch.cat([matrix.reshape(-1) for matrix in matrices]), np.cumsum(sizes)
    order = np.argsort(sizes, kind="stable")  # neighbours, which go to different threads, take equal times
    rows, columns = (np.array([matrix.shape[side] for matrix in matrices])[order] for side in (0, 1))
    out = torch.zeros_like(flat)
    workers.run(_newton_schulz, flat, (ends - sizes)[order], rows, columns, out)
    return [part.view(matrix.shape) for part, matrix in zip(out.split(sizes), matrices, strict=True)]
