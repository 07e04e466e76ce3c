"""How noisy steps change a log-Sobolev constant, and how far they bring two laws together.

Knows maps with a Lipschitz constant and Gaussian noise, not what the laws mean. LSI with constant
C: Ent(f²) <= 2C·E|∇f|²; N(0, vI) has v. Exponents are logarithms, so that no number of steps
overflows.

Why the divergence decays. While both laws gain variance t, the second one has the constant C + t,
and Lemma 5 of Vempala and Wibisono (2019), arXiv:1903.08568, before its last term is dropped, is
∂_t D_α <= −(D_α/α + (α − 1)·∂_α D_α)/(C + t). With G = 1 + ζ²/C after variance ζ²:

- at a fixed order the last term is dropped (D grows with α): D_α <= G^{−1/α}·D⁰_α;
- on the curve α − 1 = (α₀ − 1)·G the term is part of the derivative, and D/α falls like 1/G:
  D_α <= α/(G + α − 1)·D⁰_{α₀}, α₀ = 1 + (α − 1)/G. This is hypercontractivity of the noise,
  ‖E[f(X) | X + noise]‖_α <= ‖f(X)‖_{α₀}: shown for bounded f, hence for min(f, n) + 1/n, n → ∞.

A noiseless ℓ-Lipschitz map before, or a projection after, is common to both laws: D falls at every
order, and C becomes ℓ²C or stays. So the steps' G multiply, in both forms.
"""

from __future__ import annotations

import math

import numpy as np

from .. import _validate
from .._validate import FloatArray
from .hull import pulled_back_variance

_EPS = float(np.finfo(np.float64).eps)
_ROUND_UP = 1.0 + 64.0 * _EPS


def lsi_constant_after(steps: int, *, start: float, lipschitz: float, noise_std: float) -> float:
    """Log-Sobolev constant of a law after noisy steps from one with constant `start`.

    Guarantee: at least ℓ^{2T}·v_0 + ζ²·Σ_{j<T} ℓ^{2j}, the constant after T maps that are
        ℓ-Lipschitz, each followed by N(0, ζ²I) and at most a projection to a convex set.

    Args:
        steps: T >= 0.
        start: v_0, the constant of the law before the first step: v for N(·, vI), 0 for a point.
            >= 0.
        lipschitz: ℓ of the noiseless step. >= 0.
        noise_std: ζ per step. >= 0.

    Returns:
        The constant, rounded up; may be inf.

    Raises:
        ValueError: A value outside its range.

    Edge cases (first match wins):
        steps = 0                start
        lipschitz = 0            noise_std**2
        beyond double range      inf

    Source: Chien, Wang, Chen, Li (2024), arXiv:2401.10371, Sec. 4: a Lipschitz map multiplies the
        constant by at most ℓ², independent Gaussian noise adds its variance.

    >>> round(lsi_constant_after(2, start=1.0, lipschitz=0.5, noise_std=1.0), 9)  # 1/16 + 1 + 1/4
    1.3125
    """
    steps = _validate.integer("steps", steps, low=0)
    start = _validate.real("start", start, low=0.0)
    ell = _validate.real("lipschitz", lipschitz, low=0.0)
    noise = _validate.real("noise_std", noise_std, low=0.0)
    if steps == 0:
        return start
    if ell == 0.0:
        return noise * noise * _ROUND_UP
    if start == 0.0 and noise == 0.0:
        return 0.0
    rate = 2.0 * math.log(ell)
    growth = rate * steps
    if growth > 700.0:
        return math.inf
    count = math.expm1(growth) / math.expm1(rate) if rate != 0.0 else float(steps)
    value = math.exp(growth) * start + noise * noise * count
    return value * (_ROUND_UP + 8.0 * _EPS * abs(growth))


def log_growth(
    steps: int, *, lipschitz: float, noise_std: float, lsi_constant: float, stationary: bool
) -> float:
    """Log of G = Π_k (1 + ζ²/(ℓ²C_k)), rounded down; inf where a step forgets everything.

    C_k stays C_0 = lsi_constant if `stationary`, else C_{k+1} = ℓ²C_k + ζ².
    """
    if steps > 0 and lipschitz == 0.0:
        return math.inf
    if steps == 0 or noise_std == 0.0:
        return 0.0
    # With moving C_k the product telescopes to 1 + (ζ²/C_0)·Σ_{j=1..K} ℓ^{−2j}.
    terms, factors = (1, steps) if stationary else (steps, 1)
    ratio = pulled_back_variance(terms, lipschitz, noise_std) - math.log(lsi_constant)
    size = abs(math.log(lsi_constant)) + 2.0 * abs(math.log(noise_std)) + 80.0
    # For ℓ > 1 the sum converges: its size does not grow with the number of terms.
    size += 4.0 * abs(math.log(lipschitz)) * (terms if lipschitz < 1.0 else 1)
    return factors * float(np.logaddexp(0.0, ratio - 8.0 * _EPS * size))


def fixed_order_factor(orders: FloatArray, growth: float) -> FloatArray:
    """G^{−1/α}, rounded up, for growth = log G < inf."""
    exponent = growth / orders
    with np.errstate(under="ignore"):  # exp loses half an ulp of its exponent
        return np.asarray(np.exp(-exponent) * (_ROUND_UP + _EPS * exponent))


def moving_order_factor(orders: FloatArray, growth: float) -> tuple[FloatArray, FloatArray]:
    """α₀ = 1 + (α − 1)/G and α/(G + α − 1), both rounded up, for growth = log G < inf."""
    first = (1.0 + (orders - 1.0) * math.exp(-growth)) * (1.0 + 4.0 * _EPS)
    factor = orders / (math.expm1(min(growth, 709.0)) + orders) * _ROUND_UP
    return np.minimum(first, orders), factor
