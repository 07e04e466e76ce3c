"""Slow, independent truths that the tests hold the package against."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import mpmath
import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr
from scipy.stats import norm


def sampled_gaussian_divergence(
    shift: float, order: float, sample_rate: float, *, forward: bool, digits: int = 50
) -> mpmath.mpf:
    """Rényi divergence of one step by Gauss–Legendre panels in `digits` digits.

    The integrand is written as it stands in the definition; its cancellation, at most about
    (q·shift)², is paid for with digits. Good to about 20 digits while order · shift < 2000.
    """
    with mpmath.workdps(digits):
        q, r = mpmath.mpf(sample_rate), mpmath.mpf(shift)
        power = mpmath.mpf(order) if forward else 1 - mpmath.mpf(order)

        def excess(t: mpmath.mpf) -> mpmath.mpf:
            u = q * (mpmath.exp(r * t - r * r / 2) - 1)
            return (mpmath.power(1 + u, power) - 1 - power * u) * mpmath.npdf(t)

        # Panels fit the fastest scale: 1, the branch points π/r off the line, the reverse peak.
        curvature = 1.0 if forward else 1.0 + (order - 1.0) * shift**2 * min(0.25, sample_rate)
        width = min(1.0, 4.0 / shift, 3.0 / math.sqrt(curvature))
        low = -14.0 if forward else -14.0 + _reverse_peak(shift, order, sample_rate)
        high = (order * shift if forward else 2.0 * shift) + 14.0
        edges = np.linspace(low, high, 2 + math.ceil((high - low) / width))
        middles = [excess(mpmath.mpf(float(t))) for t in (edges[1:] + edges[:-1]) / 2]
        floor = max(middles) * mpmath.mpf(10) ** -32
        total = mpmath.mpf(0)
        for index, middle in enumerate(middles):
            if max(middles[max(index - 2, 0) : index + 3]) > floor or middle > floor:
                panel = [mpmath.mpf(float(edges[index])), mpmath.mpf(float(edges[index + 1]))]
                total += _gauss_legendre(excess, *panel)
        return mpmath.log1p(total) / (mpmath.mpf(order) - 1)


def _reverse_peak(shift: float, order: float, sample_rate: float) -> float:
    """Where (1+u)^(1−order)·φ is largest: t = −(order−1)·shift·P(component is shifted | t)."""

    def slope(t: float) -> float:
        odds = math.log(sample_rate / (1 - sample_rate)) + shift * t - shift**2 / 2
        return t + (order - 1) * shift * float(expit(odds))

    return float(brentq(slope, -(order - 1) * shift - 1.0, 0.0)) if slope(0.0) > 0 else 0.0


def _gauss_legendre(
    function: Callable[[mpmath.mpf], mpmath.mpf], low: mpmath.mpf, high: mpmath.mpf
) -> mpmath.mpf:
    """Thirty-six-point Gauss–Legendre rule on one panel."""
    half, middle = (high - low) / 2, (high + low) / 2
    nodes = _legendre_nodes(36, mpmath.mp.dps)
    return half * mpmath.fsum(weight * function(middle + half * x) for x, weight in nodes)


@functools.cache
def _legendre_nodes(count: int, digits: int) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    """Nodes and weights by Newton's method from double-precision starts."""
    result = []
    with mpmath.workdps(digits):
        for start in np.polynomial.legendre.leggauss(count)[0]:
            x = mpmath.mpf(float(start))
            for _ in range(4):
                before, value = mpmath.mpf(1), x
                for k in range(2, count + 1):
                    before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
                slope = count * (x * value - before) / (x * x - 1)
                x -= value / slope
            result.append((x, 2 / ((1 - x * x) * slope * slope)))
    return result


def integer_order_divergence(shift: float, order: int, sample_rate: float) -> mpmath.mpf:
    """D(mixture ‖ N(0,1)) at an integer order: the binomial sum, every term positive, exact."""
    with mpmath.workdps(40):
        q, square = mpmath.mpf(sample_rate), mpmath.mpf(shift) ** 2
        ratio = q / (1 - q)
        weight = (1 - q) ** order
        terms = []
        for i in range(1, order + 1):
            weight *= ratio * (order - i + 1) / i
            if i > 1:
                terms.append(weight * mpmath.expm1(i * (i - 1) * square / 2))
        return mpmath.log1p(mpmath.fsum(terms)) / (order - 1)


def epsilon_of_curve(rdp: Sequence[float], orders: Sequence[float], delta: float) -> mpmath.mpf:
    """Canonne, Kamath, Steinke (2020), arXiv:2004.00010v4, Prop. 12, one order after the other."""
    with mpmath.workdps(40):
        best = mpmath.inf
        for value, order in zip(rdp, orders, strict=True):
            if math.isfinite(value):
                a = mpmath.mpf(float(order))
                tail = (mpmath.log(mpmath.mpf(delta)) + mpmath.log(a)) / (a - 1)
                best = min(best, mpmath.mpf(float(value)) + mpmath.log(1 - 1 / a) - tail)
        return max(best, mpmath.mpf(0))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) of N(mu, 1) against N(0, 1), exact (Balle & Wang 2018, arXiv:1805.06530, Thm. 8)."""
    loss = log_ndtr(-epsilon / mu - mu / 2)
    return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + loss))
