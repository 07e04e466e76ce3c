"""The Rényi integral of a two-point Gaussian mixture, evaluated to about 12 digits and rounded up.

Knows shifts, orders and the mixing weight only; edge values and argument checks are in `rdp`.

With u(t) = q·expm1(rt − r²/2), L = log(1+u), t ~ N(0, 1), and because E[u] = 0,

    forward   exp((α−1)·D) = 1 + E[(1+u)^α − 1 − αu]              D(mixture ‖ N(0, 1))
    reverse   exp((α−1)·D) = 1 + E[(1+u)^(1−α) − 1 + (α−1)u]      D(N(0, 1) ‖ mixture)

Both brackets are sums of two non-negative terms in ψ(y) = expm1(y) − y, so nothing cancels:

    forward   e^L·( (α−1)·ψ(−L) + ψ((α−1)·L) )        reverse   ψ(−(α−1)·L) + (α−1)·ψ(L)

The integrals are taken by the trapezoid rule, whose error for a Gaussian-weighted integrand that
is analytic in |Im t| < d is of relative size exp(V·d²/2 − 2πd/h) (Trefethen & Weideman 2014,
SIAM Review 56(3), Thm. 5.1). V·d²/2 bounds the growth of the integrand into the strip:

- forward: |1 + u(t+id)| <= 1 + u(t), so V = 1, up to the branch point at d = π/r;
- reverse: |1 + u(t+id)|² = (1+u)²·(1 − 2p(1−p)(1−cos rd)) with p = (u+q)/(1+u), so for
  rd <= π/2 the growth is at most (α−1)·0.7·p(1−p)·r²d², hence V = 1 + 1.4(α−1)·max p(1−p)·r²
  over the nodes. Beyond them the contour may return to the line: the integrand is negligible.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import expit

from .._validate import FloatArray

_EPS = float(np.finfo(np.float64).eps)
MARGIN = 9.0  # a standard normal is farther out with probability 2e-19
DECAY = 34.0  # the trapezoid's error, about 100·exp(−34) = 2e-13 of the integral
_CHUNK = 1 << 15  # integrand values held at a time
_SERIES = [1.0 / k for k in range(14, 2, -1)]  # ψ(y) = y²/2·(1 + y/3·(1 + y/4·(…)))
SMALLEST = 1e-290  # a positive divergence below this is reported as this: doubles underflow


def renyi_divergence(
    shifts: FloatArray, orders: FloatArray, weight: float, *, forward: bool
) -> FloatArray:
    """Rényi divergence between (1−weight)·N(0,1) + weight·N(shift,1) and N(0,1), rounded up.

    Guarantee: entry i is not below the divergence at shifts[i], orders[i], and for orders up to
        4096, shifts up to 400 and weight >= 1e-200 at most 1e-9 above it, relative (`slack`).

    Args:
        shifts: One mean per pair, > 0, in units of the standard deviation; inf is allowed.
        orders: One Rényi order per pair, > 1.
        weight: Probability of the shifted component, in (0, 1).
        forward: True for D(mixture ‖ N(0,1)), False for D(N(0,1) ‖ mixture).

    Returns:
        Nats, one per pair, each a function of its own pair only. May be inf.
    """
    result, settled = _far_apart(shifts, orders, weight, forward)
    low, step, points = _grid(shifts, orders, weight, forward)
    for count in np.unique(points[~settled]):
        rows = np.flatnonzero((points == count) & ~settled)
        size = max(1, _CHUNK // int(count))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            nodes = low[part, None] + step[part, None] * np.arange(int(count))
            log_moment = _log_moment(nodes, step[part], shifts[part], orders[part], weight, forward)
            result[part] = log_moment / (orders[part] - 1.0)
    rounded = result * (1.0 + slack(orders, weight))
    if not forward:  # 1 + u >= 1 − q everywhere
        rounded = np.minimum(rounded, -math.log1p(-weight) * (1.0 + 4.0 * _EPS))
    return np.maximum(rounded, SMALLEST)


def slack(orders: FloatArray, weight: float) -> FloatArray:
    """Relative amount by which results are rounded up: more than the evaluation can be off by.

    The quadrature and the series are good to 1e-12. An exponent such as α·L or t²/2 carries a
    rounding error of a few ulps of itself, and where it is not settled in closed form it is at
    most about α/(α−1)·α·(45 + log(1/weight)).
    """
    exponent = orders * orders / (orders - 1.0) * (45.0 - math.log(weight))
    return 1e-12 + 2.0 * _EPS * exponent


def _far_apart(
    shifts: FloatArray, orders: FloatArray, weight: float, forward: bool
) -> tuple[FloatArray, np.ndarray]:
    """Closed-form upper bounds, and where they are exact to double precision (or all we offer)."""
    log_odds = math.log1p(-weight) - math.log(weight)
    with np.errstate(over="ignore"):
        if forward:
            # Minkowski: ‖(1−q) + q·e^X‖_α <= (1−q) + q·‖e^X‖_α; dropping 1−q bounds from below.
            exponent = (orders - 1.0) * shifts * shifts / 2.0
            log_norm = np.logaddexp(math.log1p(-weight), math.log(weight) + exponent)
            return orders / (orders - 1.0) * log_norm, (exponent > log_odds + 40.0) | (shifts > 400)
        # 1+u >= 1−q; the rest of the line has a normal probability below exp(−50)·q.
        logs = abs(math.log(weight)) + abs(math.log1p(-weight)) + np.log(orders)
        bound = np.full(shifts.shape, -math.log1p(-weight))
        return bound, shifts / 2.0 - logs / np.maximum(shifts, 1e-3) > 10.0


def _grid(
    shifts: FloatArray, orders: FloatArray, weight: float, forward: bool
) -> tuple[FloatArray, FloatArray, np.ndarray]:
    """First node, step and number of nodes of every pair's trapezoid rule."""
    shifts = np.minimum(shifts, 400.0)  # beyond, the closed forms answer
    with np.errstate(over="ignore"):
        if forward:
            # (1+u)^α tilts the normal by at most αr, and where u is small, u² does by 2r.
            low = np.full(shifts.shape, -MARGIN)
            high = np.maximum(orders, 2.0) * shifts + MARGIN
            growth = np.ones(shifts.shape)
            width = np.pi / np.maximum(shifts, 1e-3)
        else:
            peak = _reverse_peak(shifts, orders, weight)
            low = peak - MARGIN
            # u² tilts by 2r, but only up to where u = 1; then u takes over, which tilts by r.
            log_odds = math.log1p(-weight) - math.log(weight)
            turn = shifts / 2.0 + log_odds / np.maximum(shifts, 1e-3)
            high = np.minimum(2.0 * shifts, np.maximum(shifts, turn) + 1.0) + MARGIN
            share = np.minimum(_shifted_share(high, shifts, weight), 0.5)
            growth = 1.0 + 1.4 * (orders - 1.0) * share * (1.0 - share) * shifts * shifts
            width = np.pi / 2.0 / np.maximum(shifts, 1e-3)
    width = np.minimum(width, math.sqrt(2.0 * DECAY) / np.sqrt(growth))
    step = 2.0 * np.pi * width / (DECAY + growth * width * width / 2.0)
    points = np.ceil((high - low) / step) + 1.0
    # Few distinct sizes, so that equal ones share a rectangular array.
    grain = np.exp2(np.maximum(np.floor(np.log2(points)) - 3.0, 1.0))
    return low, step, np.ceil(points / grain) * grain


def _shifted_share(t: FloatArray, shifts: FloatArray, weight: float) -> FloatArray:
    """Posterior probability p(t) that t came from the shifted component."""
    log_odds = math.log(weight) - math.log1p(-weight)
    return np.asarray(expit(shifts * t - shifts * shifts / 2.0 + log_odds))


def _reverse_peak(shifts: FloatArray, orders: FloatArray, weight: float) -> FloatArray:
    """A point at most at the peak of the log-concave (1+u)^(1−α)·φ, where t + (α−1)·r·p(t) = 0."""
    tilt = (orders - 1.0) * shifts
    low, high = -tilt * _shifted_share(np.zeros_like(shifts), shifts, weight), np.zeros_like(shifts)
    for _ in range(40):
        middle = (low + high) / 2.0
        beyond = middle + tilt * _shifted_share(middle, shifts, weight) > 0
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return low


def _log_moment(
    t: FloatArray,
    step: FloatArray,
    shifts: FloatArray,
    orders: FloatArray,
    weight: float,
    forward: bool,
) -> FloatArray:
    """(α−1)·D of each row by the trapezoid rule on its nodes t, shape (pairs, nodes)."""
    if forward:  # the nodes depend on the shift alone: one evaluation serves all its orders
        _, first, same = np.unique(shifts, return_index=True, return_inverse=True)
        log_density = _log_density(t[first], shifts[first, None], weight)[same]
    else:
        log_density = _log_density(t, shifts[:, None], weight)
    half_square = 0.5 * t * t
    power = orders if forward else 1.0 - orders
    exponent = power[:, None] * log_density - half_square
    peak = exponent.max(axis=1)
    scale = step / math.sqrt(2.0 * math.pi)
    result = np.empty(len(t))
    large = peak > 3.0
    if large.any():
        moment = np.exp(exponent[large] - peak[large, None]).sum(axis=1)
        result[large] = peak[large] + np.log(scale[large] * moment)
    if not large.all():
        small = ~large
        if large.any():
            log_density, half_square = log_density[small], half_square[small]
        excess = forward_excess if forward else reverse_excess
        total = excess(log_density, half_square, orders[small, None] - 1.0).sum(axis=1)
        result[small] = np.log1p(scale[small] * total)
    return result


def _log_density(t: FloatArray, shifts: FloatArray, weight: float) -> FloatArray:
    """L(t) = log of mixture over N(0,1)."""
    x = shifts * t - 0.5 * shifts * shifts
    # Above 700 the slope of L is 1 (at most 1, which is the safe side, for weights near 1e-300).
    beyond = np.maximum(x - 700.0, 0.0)
    x -= beyond
    u = weight * np.expm1(x)
    result = np.log1p(u)
    if weight > 0.5:  # 1 + u would cancel where u is near −1; 1 − weight is exact here
        result = np.where(u < -0.5, np.log((1.0 - weight) + weight * np.exp(x)), result)
    return np.asarray(result + beyond)


def forward_excess(log_density: FloatArray, half_square: FloatArray, gap: FloatArray) -> FloatArray:
    """e^(−t²/2)·((1+u)^α − 1 − αu), gap = α − 1."""
    tilted = gap * log_density
    base = np.exp(log_density - half_square)
    first = gap * _psi(-log_density)
    result = base * (first + _psi(np.minimum(tilted, 50.0)))
    far = tilted > 50.0
    if far.any():  # then ψ(y) = e^y to double precision
        total = (log_density + tilted - half_square)[far]
        result[far] = np.exp(total) + (base * first)[far]
    return result


def reverse_excess(log_density: FloatArray, half_square: FloatArray, gap: FloatArray) -> FloatArray:
    """e^(−t²/2)·((1+u)^(1−α) − 1 + (α−1)u), gap = α − 1."""
    base = np.exp(-half_square)
    first = _psi(-gap * log_density)
    result = base * (first + gap * _psi(np.minimum(log_density, 50.0)))
    far = log_density > 50.0
    if far.any():
        result[far] = (gap * np.exp(log_density - half_square) + base * first)[far]
    return result


def _psi(y: FloatArray) -> FloatArray:
    """expm1(y) − y without cancellation."""
    near = np.clip(y, -0.5, 0.5)
    series = 1.0 + near * _SERIES[0]
    for reciprocal in _SERIES[1:]:
        series *= near
        series *= reciprocal
        series += 1.0
    series *= 0.5 * near * near
    far = np.abs(y) > 0.5
    if far.any():
        distant = y[far]
        series[far] = np.expm1(distant) - distant
    return series
