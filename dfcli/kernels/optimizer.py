"""Parts of the optimiser, compiled for small models on a CPU: Muon's products of matrices whose smaller side is up to
`WIDEST`, and the updates of the rows of n-gram tables. PyTorch's operations on them are so short that starting them
takes most of the time. `training.optim.orthogonalise_all` and `update_rows` are the references (tests).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy import uintp
from torch import Tensor

from dfcli.kernels.compile import Compiled, inner
from dfcli.kernels.gemm import COLUMNS, PANEL, prefetch, product, row_stride, transposed
from dfcli.kernels.gpt_train import MOST_TABLES
from dfcli.kernels.ops import ONE, ZERO, add_times, dot, fill
from dfcli.kernels.threads import WorkerPool, take
from dfcli.system.events import OnEvent

WIDEST = 128  # PyTorch's products of larger matrices are faster than ours
STEPS = 5
AHEAD = 8  # rows of a table: so long before its update one is fetched

_SMALLEST = np.float32(1e-7)


@inner
def _times(out, a, b, m, S):
    """out = a b, [m, m] with rows S row_stride; for an `out` that is symmetric, so that half of it is computed."""
    fill(out, 0, m * S, ZERO)
    for j in range(0, m, PANEL):
        n = min(PANEL, m - j)
        product(out, j, S, a, 0, S, 1, b, j, S, (j + n, n, m))
        transposed(out, j * S, S, out, j, S, j, n)


def newton_schulz(worker, workers, flags, yielder, matrices, places, rows, columns, coefficients, out):
    """One worker's share of U V^T, about, of matrices U S V^T: `training.optim.orthogonalise` of each, its steps on
    products of the smaller side, all of them polynomials of one symmetric matrix.

    matrices float32, flat: each begins at its place and has so many rows and columns (int64), multiples of COLUMNS.
    Out, zeros at first: the same way.
    """
    a, b, c = coefficients
    each = take(flags, workers, 0)
    while each < places.size:
        x, R, C = places[each], rows[each], columns[each]
        m, tall = min(R, C), R > C
        S = row_stride(m)
        gram, p, half = np.empty(m * S, np.float32), np.empty(m * S, np.float32), np.empty(m * S, np.float32)
        whole, other = np.empty(m * S, np.float32), np.empty(m * S, np.float32)
        fill(gram, 0, m * S, ZERO)
        if tall:
            product(gram, 0, S, matrices, x, 1, C, matrices, x, C, (m, m, R))
        else:
            turned = np.empty(C * S, np.float32)
            transposed(turned, 0, S, matrices, x, C, m, C)
            product(gram, 0, S, matrices, x, C, 1, turned, 0, S, (m, m, C))
        square = ZERO
        for i in range(m):
            square += gram[uintp(i * S + i)]
        scale = ONE / (np.sqrt(square) + _SMALLEST)
        for i in range(m * S):
            gram[uintp(i)] *= scale * scale
        for step in range(STEPS):
            _times(p, gram, gram, m, S)
            for i in range(m * S):
                p[uintp(i)] = b * gram[uintp(i)] + c * p[uintp(i)]
            for i in range(m):
                p[uintp(i * S + i)] += a
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
            product(out, x, C, matrices, x, C, 1, whole, 0, S, (R, C, m))
        else:
            product(out, x, C, whole, 0, S, 1, matrices, x, C, (R, C, m))
        each = take(flags, workers, 0)


def row_rmsprop(worker, workers, flags, yielder, many, tables, rows, grads, updates, squares, lr, eps):
    """One worker of `training.optim.update_rows` of `many` tables, in tuples of MOST_TABLES flat arrays; `rows` are
    int64."""
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


_newton_schulz, _row_rmsprop = (Compiled(f, [__file__]) for f in (newton_schulz, row_rmsprop))


class OptimizerKernels:
    """Compiled versions of `training.optim.orthogonalise_all` and `update_rows`. Raises what numba raises where it
    cannot compile."""

    def __init__(self, workers: WorkerPool, on_event: OnEvent) -> None:
        self._workers = workers
        nothing, none = np.zeros(0, np.float32), np.zeros(0, np.int64)
        self._empty = nothing, none, nothing, nothing, nothing
        workers.load(
            on_event,
            (_newton_schulz, (nothing, none, none, none, np.zeros(3, np.float32), nothing)),
            (_row_rmsprop, (0, *((empty,) * MOST_TABLES for empty in self._empty), ZERO, ZERO)),
        )

    def fits(self, matrix: Tensor) -> bool:
        """Whether `orthogonalise` takes a matrix [m, n]."""
        return min(matrix.shape) <= WIDEST and not any(side % COLUMNS for side in matrix.shape)

    def orthogonalise(self, matrices: list[Tensor], coefficients: tuple[float, float, float]) -> list[Tensor]:
        """Newton-Schulz steps of each matrix [m, n] with the quintic's coefficients."""
        if not matrices:
            return []
        sizes = [matrix.numel() for matrix in matrices]
        flat, ends = torch.cat([matrix.reshape(-1) for matrix in matrices]), np.cumsum(sizes)
        order = np.argsort(sizes, kind="stable")  # neighbours, which go to different threads, take equal times
        rows, columns = (np.array([matrix.shape[side] for matrix in matrices])[order] for side in (0, 1))
        out, factors = torch.zeros_like(flat), np.array(coefficients, np.float32)
        self._workers.run(_newton_schulz, flat, (ends - sizes)[order], rows, columns, factors, out)
        return [part.view(matrix.shape) for part, matrix in zip(out.split(sizes), matrices, strict=True)]

    def update_rows(self, tables: list[tuple[Tensor, ...]], lr: float, eps: float) -> None:
        if tables:
            columns = zip(zip(*tables, strict=True), self._empty, strict=True)
            arrays = [each + (empty,) * (MOST_TABLES - len(tables)) for each, empty in columns]
            self._workers.run(_row_rmsprop, len(tables), *arrays, np.float32(lr), np.float32(eps))
