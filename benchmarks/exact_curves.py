"""Exact (ε, δ) for `soundness.py`: conversions from RDP, and δ(ε) of Gaussians and mixtures.

mpmath only; nothing here calls opacus_pil.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath


def epsilon_at(divergence: Any, order: Any, delta: float) -> Any:
    """Canonne, Kamath, Steinke (2020), arXiv:2004.00010v4, Prop. 12, at one order."""
    a = mpmath.mpf(order)
    tail = (mpmath.log(mpmath.mpf(delta)) + mpmath.log(a)) / (a - 1)
    return mpmath.mpf(divergence) + mpmath.log1p(-1 / a) - tail


def log_delta_at(divergence: Any, order: Any, epsilon: float) -> Any:
    """The same solved for log δ."""
    a = mpmath.mpf(order)
    gap = mpmath.mpf(divergence) - mpmath.mpf(epsilon) + mpmath.log1p(-1 / a)
    return (a - 1) * gap - mpmath.log(a)


def gaussian_delta(mu: Any, epsilon: Any) -> Any:
    """δ(ε) of N(μ, 1) against N(0, 1): Balle, Wang (2018), arXiv:1805.06530, Thm. 8."""
    x, half = mpmath.mpf(epsilon) / mpmath.mpf(mu), mpmath.mpf(mu) / 2
    with mpmath.workdps(60 + 2 * int(abs(mpmath.log10(half)))):  # what cancels is about μ²
        return normal_tail(x - half) - mpmath.exp(epsilon) * normal_tail(x + half)


def gaussian_epsilon(mu: Any, delta: float) -> Any:
    """ε at which that δ is `delta`."""
    if gaussian_delta(mu, 0) <= delta:
        return mpmath.mpf(0)
    reach = mpmath.mpf(1)
    high = mu * (reach + mu / 2)
    while gaussian_delta(mu, high) > delta:
        reach *= 2
        high = mu * (reach + mu / 2)
    return bisect(lambda epsilon: delta - gaussian_delta(mu, epsilon), mpmath.mpf(0), high)


def mixture_delta(shifts: Sequence[Any], masses: Sequence[Any], epsilon: Any) -> tuple[Any, Any]:
    """δ at ε (of any sign) of Σ p_k·N(m_k, 1) from N(0, 1) and back; the density ratio rises."""
    digits = mpmath.mp.dps
    with mpmath.workdps(digits + 20):
        level = mpmath.exp(epsilon)

        def ratio(t: Any) -> Any:
            return mpmath.fsum(
                p * mpmath.exp(m * t - m * m / 2) for m, p in zip(shifts, masses, strict=True)
            )

        def mixed(t: Any, side: int) -> Any:  # probability beyond t under the mixture
            return mpmath.fsum(
                p * normal_tail(side * (t - m)) for m, p in zip(shifts, masses, strict=True)
            )

        here, there = _crossing(ratio, level), _crossing(ratio, 1 / level)
        forward = max(1 - level, 0) if here is None else mixed(here, 1) - level * normal_tail(here)
        back = max(1 - level, 0)
        if there is not None:
            back = normal_tail(-there) - level * mixed(there, -1)
        return +forward, +back


def normal_tail(x: Any) -> Any:
    return mpmath.erfc(x / mpmath.sqrt(2)) / 2


def _crossing(ratio: Callable[[Any], Any], level: Any) -> Any:
    """Where the rising function `ratio` passes `level`; None if it stays above."""
    low, high = mpmath.mpf(-1), mpmath.mpf(1)
    while ratio(high) < level:
        high *= 2
    while ratio(low) > level:
        low *= 2
        if low < -(2**40):
            return None
    # δ is stationary here, so half the digits are enough
    return bisect(lambda t: ratio(t) - level, low, high, digits=mpmath.mp.dps // 2)


def bisect(function: Callable[[Any], Any], low: Any, high: Any, *, digits: int = 0) -> Any:
    """Root of a rising function, to `digits` (default: all): halvings, then Illinois steps."""
    resolved = mpmath.mpf(10) ** -(digits or mpmath.mp.dps - 4)
    below, above = function(low), function(high)
    for count in range(500):
        if high - low <= abs(high) * resolved:
            break
        middle = (low + high) / 2
        if above > 0 > below and count > 6:
            middle = (low * above - high * below) / (above - below)
        value = function(middle)
        if value == 0:
            return middle
        if value < 0:
            low, below, above = middle, value, above / 2
        else:
            high, above, below = middle, value, below / 2
    return (low + high) / 2
