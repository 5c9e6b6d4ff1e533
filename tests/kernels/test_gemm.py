"""Matrix products of every size of tile, beside NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfcli.kernels import gemm
from dfcli.kernels.compile import OPTIONS, njit
from tests.kernels.passes import needs_amx


@njit(**OPTIONS)
def call_product(out, o_row, a, a_row, a_k, b, b_row, size):
    gemm.product(out, 3, o_row, a, 5, a_row, a_k, b, 7, b_row, size)


@njit(**OPTIONS)
def call_panels(out, o_row, a, a_row, b, columns, size):
    _, N, K = size
    packed = np.zeros(2 + K * N, np.float32)
    gemm.pack(packed, 2, b, 0, columns, 1, K, columns)
    gemm.panel_product(out, 3, o_row, a, 5, a_row, packed, 2, size)


@njit(**OPTIONS)
def call_linear(out, o_row, a, a_row, b, steps, size):
    M, N, K = size
    rounding = gemm.rounding(True, M, max(N, K))
    packed = np.zeros(32 + (K + 32) * (N + 32) // 2, np.uint32)
    gemm.pack_pairs(rounding, packed, 64, b, 7, steps[0], steps[1], K, N)
    gemm.linear(rounding, out, 3, o_row, a, 5, a_row, packed.view(np.float32), 64, size)
    gemm.end_rounding(rounding)


@njit(**OPTIONS)
def call_outer(out, o_row, a, b, b_row, size):
    M, N, K = size
    rounding = gemm.rounding(True, K, max(M, N))
    gemm.outer(rounding, out, 3, o_row, a, 5, M, b, 7, b_row, size)
    gemm.end_rounding(rounding)


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


@needs_amx
@pytest.mark.parametrize("N", [1, 16, 32, 65, 96])
def test_products_in_bfloat16_are_those_of_rounded_numbers(N: int) -> None:
    generator = np.random.default_rng(N)
    for M in (1, 5, 31, 32, 33, 64, 80):
        for K in (1, 5, 31, 32, 65, 96):
            a, b = _rounded(generator.normal(size=(M, K))), _rounded(generator.normal(size=(K, N)))
            noise = 1 + 2**-10 * generator.uniform(-1, 1, (K, N))  # what rounding takes away again
            before = generator.normal(size=(M, N + 1)).astype(np.float32)
            right = before.copy()
            right[:, :N] += a @ b
            for across in (False, True):  # the weights by rows, and by columns
                out, steps = _flat(before, 3), (1, K) if across else (N, 1)
                weights = b * noise
                call_linear(out, N + 1, _flat(a, 5), K, _flat(weights.T if across else weights, 7), steps, (M, N, K))
                np.testing.assert_allclose(out[3:].reshape(M, N + 1), right, rtol=1e-5, atol=1e-5)
            out = _flat(before, 3)
            call_outer(out, N + 1, _flat(a.T, 5), _flat(b, 7), N, (M, N, K))
            np.testing.assert_allclose(out[3:].reshape(M, N + 1), right, rtol=1e-5, atol=1e-5)


@needs_amx
def test_what_is_not_finite_stays_so_in_bfloat16() -> None:
    odd = np.array([0x7F800001, 0x7FFF8000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaNs too
    for value in [*np.array([np.nan, -np.nan, np.inf, 3.4e38], np.float32), *odd]:
        out = np.zeros(3 + 9, np.float32)
        call_linear(out, 3, _flat(np.full((3, 4), value), 5), 4, _flat(np.ones((4, 3)), 7), (3, 1), (3, 3, 4))
        assert not np.isfinite(out[3:]).any()


def _rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


def _flat(matrix: np.ndarray, before: int) -> np.ndarray:
    """float32, behind so many numbers that are no part of it."""
    return np.concatenate([np.full(before, np.nan, np.float32), matrix.ravel().astype(np.float32)])
