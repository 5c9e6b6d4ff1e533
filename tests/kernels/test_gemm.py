"""Matrix products of every size of tile, beside NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from dfcli.kernels import gemm
from dfcli.kernels.compile import OPTIONS, njit


@njit(**OPTIONS)
def call_product(out, o_row, a, a_row, a_k, b, b_row, size):
    gemm.product(out, 3, o_row, a, 5, a_row, a_k, b, 7, b_row, size)


@njit(**OPTIONS)
def call_panels(out, o_row, a, a_row, b, columns, size):
    _, N, K = size
    packed = np.zeros(2 + K * N, np.float32)
    gemm.pack(packed, 2, b, 0, columns, 1, K, columns)
    gemm.panel_product(out, 3, o_row, a, 5, a_row, packed, 2, size)


@pytest.mark.parametrize("N", [16, 32, 48, 80])
def test_products_are_numpys(N: int) -> None:
    generator = np.random.default_rng(N)
    for M in (*range(1, 20), 65):
        for K in (1, 5, 64):
            a, b = generator.normal(size=(M, K)), generator.normal(size=(K, N))
            before = generator.normal(size=(M, N + 1))  # a row has one number more than is multiplied
            right = before.copy()
            right[:, :N] += a @ b
            for across in (False, True):  # a by rows, and by columns
                out, flat_a = _flat(before, 3), _flat(a.T if across else a, 5)
                steps = (1, M) if across else (K, 1)
                call_product(out, N + 1, flat_a, *steps, _flat(b, 7), N, (M, N, K))
                np.testing.assert_allclose(out[3:].reshape(M, N + 1), right, rtol=1e-4, atol=1e-4)
            columns = N - 15  # what `pack` rounds up to N
            out, right[:, columns:N] = _flat(before, 3), before[:, columns:N]
            call_panels(out, N + 1, _flat(a, 5), K, _flat(b[:, :columns], 0), columns, (M, N, K))
            np.testing.assert_allclose(out[3:].reshape(M, N + 1), right, rtol=1e-4, atol=1e-4)


def _flat(matrix: np.ndarray, before: int) -> np.ndarray:
    """float32, behind so many numbers that are no part of it."""
    return np.concatenate([np.full(before, np.nan), matrix.ravel()]).astype(np.float32)
