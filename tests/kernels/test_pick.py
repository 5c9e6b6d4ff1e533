"""The compiled building blocks against NumPy, and the compiled pick against `sampling.pick`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dfcli.cores.protocols import Picking
from dfcli.generation.sampling import pick as reference
from dfcli.kernels import gemm
from dfcli.kernels.compile import Compiled
from dfcli.kernels.gemm import multiply
from dfcli.kernels.ops import exp, tanh_sigmoid
from dfcli.kernels.pick import pick
from dfcli.system.events import ignore
from tests.generation.engine import picking
from tests.generation.rounding import from_bfloat16, untiled


def call_multiply(out, out_step, x, x_step, rows, weights, N, K):
    zero = np.int64(0)
    return multiply(out, zero, out_step, x, zero, x_step, rows, weights, zero, N, K)


def call_exp(out, x):
    for i in range(x.size):
        out[i] = exp(x[i])


def call_tanh_sigmoid(out, a, b):
    for i in range(a.size):
        out[i] = tanh_sigmoid(a[i], b[i])


def call_picks(out, logits, uniforms, temperature, top_k, top_p, min_p):
    weights = np.empty(logits.shape[1], np.float32)
    for row in range(len(logits)):
        out[row] = pick(logits[row], uniforms[row], temperature, top_k, top_p, min_p, weights)


def run(function: Any, *arguments: Any) -> Any:
    entry = Compiled(function, [__file__])
    entry.load(ignore, *arguments)
    return entry


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "K"), [(1, 50), (2, 50), (3, 300), (8, 128)])
def test_multiply(rows: int, K: int, packed: bool, rng: np.random.Generator) -> None:
    N = 96
    matrix = rng.standard_normal((N, K)).astype(np.float32)
    x = rng.standard_normal((rows, K + 1)).astype(np.float32)
    weights: Any = gemm.join([gemm.tiles(matrix)])
    if packed:
        weights = gemm.to_bfloat16(weights)
        matrix = untiled(from_bfloat16(weights), N, K)
    out = np.ones((rows, N + 2), np.float32)
    call = run(call_multiply, np.zeros(N, np.float32), N, x.ravel(), K, 0, weights, N, 2)
    assert call(out.ravel(), N + 2, x.ravel(), K + 1, rows, weights, N, K) == N * K
    np.testing.assert_allclose(out[:, :N], 1 + x[:, :K] @ matrix.T, atol=1e-4)
    assert (out[:, N:] == 1).all()


def test_packed_weights_are_the_nearest(rng: np.random.Generator) -> None:
    odd = [0.0, -0.0, 1e-30, -1e30, 1, -1, 3e-39, 2**-126, -0.7, 0.7, 1 / 3, -1 / 3, 1e30, -1e-30, -3e-39, 0.1]
    both = [np.repeat(odd, len(odd)), np.tile(odd, len(odd))]  # each beside each in a pair
    pairs = np.concatenate([np.stack(both, 1), rng.standard_normal((1600, 2))])
    weights = pairs.reshape(-1, 8, 2).swapaxes(1, 2).ravel().astype(np.float32)
    back = from_bfloat16(gemm.to_bfloat16(weights))
    tolerance = np.maximum(2.0**-8 * np.abs(weights), 1e-38)  # bfloat16 has 8 significant bits
    tolerance[weights == 0] = 2.0**-59
    assert (np.abs(back - weights) <= tolerance).all()


def test_packed_padding_is_not_denormal(rng: np.random.Generator) -> None:
    """Products of denormal numbers are up to 100 times slower."""
    padding = np.zeros(1600)
    for pair in ((rng.standard_normal(1600), padding), (padding, rng.standard_normal(1600)), (padding, padding)):
        weights = np.stack(pair, 1).reshape(-1, 8, 2).swapaxes(1, 2).ravel().astype(np.float32)
        back = np.abs(from_bfloat16(gemm.to_bfloat16(weights)))
        assert ((back == 0) | (back >= np.finfo(np.float32).tiny)).all()


def test_join_begins_a_large_page(rng: np.random.Generator) -> None:
    parts = [rng.standard_normal(size).astype(np.float32) for size in (1, 600_000, 3)]
    whole = gemm.join(parts)
    assert whole.ctypes.data % 2**21 == 0
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_exp() -> None:
    x = np.linspace(-87, 87, 200_001, dtype=np.float32)
    out = np.empty_like(x)
    run(call_exp, out, x)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=2 * 2.0**-24)


def test_tanh_sigmoid(rng: np.random.Generator) -> None:
    a, b = (10 * rng.standard_normal((2, 10_000))).astype(np.float32)
    a[:3], b[:3] = [1e30, -1e30, 0], [1e30, 1e30, -1e30]
    out = np.empty_like(a)
    call = run(call_tanh_sigmoid, out, a, b)
    exact = np.tanh(a.astype(np.float64)) / (1 + np.exp(-np.clip(b.astype(np.float64), -700, None)))
    np.testing.assert_allclose(out, exact, atol=3e-7)
    call(out, np.full_like(a, np.nan), b)
    assert np.isnan(out).all()  # a model that diverged is not made to look well


@pytest.mark.parametrize("V", [1, 5, 256])
@pytest.mark.parametrize(
    "filters",
    [
        picking(), picking(0), picking(0.7, 5), picking(1.3, None, 0.9), picking(0.8, 40, 0.8, 0.05), picking(1, 1),
        picking(1, None, 1e-9), picking(1, None, None, 0.3), picking(1e-30), picking(1e30),
    ],
)  # fmt: skip
def test_pick_is_the_pick_of_sampling(V: int, filters: Picking, rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal((300, V))).astype(np.float32)
    logits[::3] = logits[::3].round()  # with many equal ones
    if V > 1:
        logits[::7, 1] = -np.inf
    uniforms = rng.random(len(logits))
    uniforms[::10] = 0
    out = np.empty(len(logits), np.int64)
    run(call_picks, out, logits, uniforms, *filters)
    np.testing.assert_array_equal(out, reference(logits, filters, uniforms))
