"""Compiled operations over flat float32 arrays, each once for training and generation. They are called from compiled
code only. How arrays and places are passed: see `gemm`."""

from __future__ import annotations

import numpy as np
from numpy import uintp

from dfcli.kernels.compile import INNER, OPTIONS, inner, njit

# Sums of these may be taken in any order, which makes vector code of them.
any_order = njit(**OPTIONS | INNER | {"fastmath": {"contract", "nsz", "reassoc"}})

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


@any_order
def layer_norm(out, o, x, i, n):
    """LayerNorm without gain and bias: out[o : o + n] = scale * (x[i : i + n] - mean). Returns the scale, 1 /
    sqrt(variance + 1e-5)."""
    total = ZERO
    for k in range(n):
        total += x[uintp(i + k)]
    mean, total = total / np.float32(n), ZERO
    for k in range(n):
        total += (x[uintp(i + k)] - mean) * (x[uintp(i + k)] - mean)
    scale = np.float32(1 / np.sqrt(total / np.float32(n) + np.float32(1e-5)))
    for k in range(n):
        out[uintp(o + k)] = (x[uintp(i + k)] - mean) * scale
    return scale


@inner
def norm_back(dx, d, dy, g, y, i, scale, n):
    """The gradient of `norm`, added: dx[d : d + n] from dy[g : g + n], what the norm gave y[i : i + n], its scale."""
    mean = dot(dy, g, y, i, n) / np.float32(n)
    for k in range(n):
        dx[uintp(d + k)] += scale * (dy[uintp(g + k)] - y[uintp(i + k)] * mean)


@any_order
def layer_norm_back(dx, d, dy, g, y, i, scale, n):
    """The gradient of `layer_norm`, as `norm_back`."""
    slope, total = dot(dy, g, y, i, n) / np.float32(n), ZERO
    for k in range(n):
        total += dy[uintp(g + k)]
    mean = total / np.float32(n)
    for k in range(n):
        dx[uintp(d + k)] += scale * (dy[uintp(g + k)] - mean - y[uintp(i + k)] * slope)


@inner
def rotate(x, i, D, cos, sin, angle, direction):
    """Turns the pairs (x[i + k], x[i + D / 2 + k]) by the angles that begin at `angle`: forwards, or back where the
    direction is -1 (float32)."""
    half = D // 2
    for k in range(half):
        a, b = x[uintp(i + k)], x[uintp(i + half + k)]
        c, s = cos[uintp(angle + k)], direction * sin[uintp(angle + k)]
        x[uintp(i + k)], x[uintp(i + half + k)] = a * c - b * s, a * s + b * c


ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh")  # `kind` is the place in this list
_E0, _E1, _E2, _E3, _E4 = (np.float32(a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
_CUBE, _TANH = np.float32(0.044715), np.float32(2 * (2 / np.pi) ** 0.5)


@inner
def _gelu(x):
    """The normal distribution's function of x, and its density times x. GELU is x times the first; its derivative is
    their sum. To 1.5e-7: Abramowitz & Stegun 7.1.26."""
    z = abs(x) * np.float32(0.5**0.5)
    t = ONE / (ONE + np.float32(0.3275911) * z)
    e = exp(max(-z * z, _LEAST))
    tail = _HALF * ((((_E4 * t + _E3) * t + _E2) * t + _E1) * t + _E0) * t * e
    return (ONE - tail if x > ZERO else tail), x * np.float32(0.3989422804) * e


@inner
def _gelu_tanh(x):
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 and x times its derivative: as `_gelu`."""
    z = _TANH * (x + _CUBE * x * x * x)
    s = ONE / (ONE + exp(clamp(-z, np.float32(87))))
    return s, x * s * (ONE - s) * _TANH * (ONE + np.float32(3) * _CUBE * x * x)


@inner
def relu(out, o, x, i, n):
    """out[o : o + n] = what is positive of x[i : i + n], else zero; not a number stays so."""
    for k in range(n):
        out[uintp(o + k)] = ZERO if x[uintp(i + k)] < ZERO else x[uintp(i + k)]


@inner
def activate(out, o, x, i, n, kind):
    """out[o : o + n] = the activation of x[i : i + n]."""
    if kind == 3:
        for k in range(n):
            out[uintp(o + k)] = x[uintp(i + k)] * _gelu_tanh(x[uintp(i + k)])[0]
    elif kind == 2:
        for k in range(n):
            out[uintp(o + k)] = x[uintp(i + k)] * _gelu(x[uintp(i + k)])[0]
    elif kind == 1:
        for k in range(n):
            value = ZERO if x[uintp(i + k)] < ZERO else x[uintp(i + k)]
            out[uintp(o + k)] = value * value
    else:
        relu(out, o, x, i, n)


@inner
def activate_back(dy, d, y, o, x, i, n, kind):
    """y[o : o + n] = the activation of x[i : i + n], again; dy[d : d + n] becomes the gradient with respect to x."""
    if kind == 3:
        for k in range(n):
            share, rest = _gelu_tanh(x[uintp(i + k)])
            y[uintp(o + k)] = x[uintp(i + k)] * share
            dy[uintp(d + k)] *= share + rest
    elif kind == 2:
        for k in range(n):
            share, rest = _gelu(x[uintp(i + k)])
            y[uintp(o + k)] = x[uintp(i + k)] * share
            dy[uintp(d + k)] *= share + rest
    else:
        power = kind + 1
        for k in range(n):
            value = ZERO if x[uintp(i + k)] < ZERO else x[uintp(i + k)]
            y[uintp(o + k)] = value * value if power == 2 else value
            dy[uintp(d + k)] *= TWO * value if power == 2 else (ONE if value > ZERO else ZERO)


@inner
def _mixed(x, more):
    """A hash of 32 bits (lowbias32 of Chris Wellons, with another key in its middle); vector code."""
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(np.uint32(x ^ (x >> np.uint32(15))) + more) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@inner
def dropped(out, o, x, i, n, seed, stream, first, p):
    """out[o : o + n] = dropout of x[i : i + n]: zero with probability p, else x / (1 - p).

    The elements have the numbers `first`, ... of their `stream`. Whether one stays is a pure function of seed, stream
    and number, so that the backward pass makes the same choice."""
    key = _mixed(np.uint32(seed), np.uint32(stream))
    more = _mixed(key, np.uint32(seed >> 32))
    least, scale = np.uint32(p * 4294967296.0), np.float32(1 / (1 - p))
    for k in range(n):
        stays = _mixed(np.uint32(np.uint32(first + k) ^ key), more) >= least
        out[uintp(o + k)] = x[uintp(i + k)] * scale if stays else ZERO


@inner
def set_rows(out, o, o_row, x, i, rows, n):
    """Put x[i : i + n] into each of the `rows` rows that begin at out[o], o_row apart."""
    for r in range(rows):
        copy(out, o + r * o_row, x, i, n)


@inner
def add_rows(out, o, x, i, x_row, rows, n):
    """out[o : o + n] += the sum of the `rows` rows that begin at x[i], x_row apart."""
    for r in range(rows):
        add(out, o, x, i + r * x_row, n)


@inner
def tanh_sigmoid(a, b):
    """tanh(a) * sigmoid(b) with one division, to 1e-7."""
    e = exp(-TWO * clamp(a, np.float32(10)))
    return (ONE - e) / ((ONE + e) * (ONE + exp(-clamp(b, np.float32(40)))))
