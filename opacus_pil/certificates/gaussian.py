"""The exact (ε, δ) curve of two unit Gaussians a distance μ apart.

Knows nothing about training: a certificate that reduces to this pair asks here. With
x = ε/μ − μ/2, density φ and Mills ratio m(t) = Φ(−t)/φ(t), the curve
δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2) is δ = φ(x)·(m(x) − m(x + μ)): no factor overflows and
the difference is ∫ (1 − t·m(t)) dt over [x, x + μ], whose integrand is positive.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr, ndtri

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)  # the integrand is analytic: full precision
_LOG_ROOT_2PI = 0.5 * math.log(2.0 * math.pi)
_FAR = 1e3  # beyond it 1 − t·m(t) loses digits; its bound 1/(1 + t²) is then within 2e-6
_SMALLEST = math.ulp(0.0)


def _mills(t: float) -> float:
    """Φ(−t)/φ(t) for t not far below 0."""
    return math.sqrt(math.pi / 2.0) * float(erfcx(t / math.sqrt(2.0)))


def _log_delta(x: float, mu: float) -> float:
    """Log of δ at ε = μx + μ²/2 >= 0, for 0 < μ < inf."""
    if x > _FAR:
        log_gap = min(math.log(mu) - math.log(x), 0.0) - math.log(x)  # gap <= min(μ/x², 1/x)
    elif mu <= 1.0:
        t = x + mu * 0.5 * (1.0 + _NODES)
        slope = 1.0 - t * math.sqrt(math.pi / 2.0) * erfcx(t / math.sqrt(2.0))
        log_gap = math.log(mu) + math.log(float(_WEIGHTS @ slope) / 2.0)
    elif x > 0.0:
        log_gap = math.log(_mills(x) - _mills(x + mu))
    else:
        return math.log(float(ndtr(-x)) - math.exp(-x * x / 2.0 - _LOG_ROOT_2PI) * _mills(x + mu))
    return -x * x / 2.0 - _LOG_ROOT_2PI + log_gap


def _slack(x: float) -> float:
    """Bound on the rounding error of `_log_delta`: 1 − t·m(t) loses about t² ulps."""
    return 1e-14 * (1.0 + max(x, 0.0) ** 2)


def gaussian_delta(mu: float, *, epsilon: float) -> float:
    """Smallest δ for which N(0, 1) and N(μ, 1) are (ε, δ)-close, rounded up.

    Guarantee: at least the exact δ(ε), which both orders of the two laws share; above it by about
        1e-12 relatively where δ > 1e-300.

    Args:
        mu: Distance of the two means in standard deviations. In [0, inf].
        epsilon: In nats, finite, >= 0.

    Returns:
        δ in [0, 1].

    Edge cases (first match wins):
        mu = 0     0
        mu = inf   1

    Source: Balle, Wang (2018), arXiv:1805.06530v2, Theorem 8; Dong, Roth, Su (2019),
        arXiv:1905.02383v3, Corollary 2.13.

    >>> round(gaussian_delta(1.0, epsilon=0.0), 6)  # 2Φ(1/2) − 1
    0.382925
    """
    if mu == 0.0:
        return 0.0
    x = epsilon / mu - mu / 2.0
    if not math.isfinite(x):
        return 1.0 if x < 0.0 or mu == math.inf else _SMALLEST
    # x itself is a rounded difference; δ falls in x, so rounding x down rounds δ up.
    x = max(x - 4.0 * math.ulp(max(epsilon / mu, mu)), -mu / 2.0)
    return min(1.0, max(math.exp(min(_log_delta(x, mu) + _slack(x), 0.0)), _SMALLEST))


def gaussian_epsilon(mu: float, *, delta: float) -> float:
    """Smallest ε for which N(0, 1) and N(μ, 1) are (ε, δ)-close, rounded up.

    Guarantee: the exact δ at the returned ε is at most `delta`.

    Args:
        mu: Distance of the two means in standard deviations. In [0, inf].
        delta: In (0, 1).

    Returns:
        ε in nats, >= 0.

    Edge cases (first match wins):
        mu = 0     0
        mu = inf   inf

    Source: as `gaussian_delta`, solved for x = ε/μ − μ/2, where nothing cancels.

    >>> round(gaussian_epsilon(1.0, delta=1e-5), 4)
    4.3772
    """
    if mu == 0.0:
        return 0.0
    if mu * mu == math.inf:
        return math.inf

    def excess(x: float) -> float:
        return _log_delta(x, mu) + _slack(x) - math.log(delta)

    low = -mu / 2.0  # ε = 0
    if excess(low) <= 0.0:
        return 0.0
    high, step = max(low, -float(ndtri(delta))), 1e-9  # δ <= Φ(−x): the root is near or below
    while excess(high) > 0.0:
        high, step = high + step, 2.0 * step
    x = float(brentq(excess, low, high, xtol=1e-13))
    step = math.ulp(x)
    while excess(x) > 0.0:
        x, step = x + step, 2.0 * step
    product = mu * (x + mu / 2.0)
    return product + 4.0 * (math.ulp(mu * x) + math.ulp(mu * mu))
