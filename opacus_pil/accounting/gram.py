"""Inner products of a forget set's gradients: their check, and the exact moment they give.

Does not know norms-only bounds or the other direction: that is `groups` and `mixtures`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from .. import _validate
from .._validate import FloatArray

_EPS = float(np.finfo(np.float64).eps)
_TERMS = 200_000  # multisets of subsets that the exact formula may enumerate
_TOLERANCE = 1e-6  # relative; room for inner products summed in single precision


def subsets(count: int) -> FloatArray:
    """All subsets as rows of 0 and 1, the empty one first, shape (2^count, count)."""
    return ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(np.float64)


def subset_log_masses(drawn: FloatArray, rate: float) -> FloatArray:
    """Log-probability that exactly these members are drawn, for each row."""
    size = drawn.sum(axis=1)
    return np.asarray(size * math.log(rate) + (drawn.shape[1] - size) * math.log1p(-rate))


def checked_gram(gram: npt.ArrayLike, sensitivities: FloatArray) -> FloatArray:
    """Inner products, symmetric and positive semidefinite, no entry below the one given.

    What is given off the diagonal is trusted: rounding there is seen only as an asymmetry.
    """
    cure = "Pass the inner products of the members' clipped gradients / max_grad_norm**2."
    products = _validate.real_array("gram", gram, cure=cure)
    count = len(sensitivities)
    if products.shape != (count, count):
        raise ValueError(
            f"Expected gram to have shape (members, members) = ({count}, {count}), "
            f"got gram of shape {products.shape}. {cure}"
        )
    if not count:
        return products
    sizes = np.outer(sensitivities, sensitivities)
    bad = np.abs(products - products.T) > _TOLERANCE * sizes
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"Expected gram to be symmetric, got {products[row, column]!r} and "
            f"{products[column, row]!r} at ({row}, {column}) and back. {cure}"
        )
    bad = np.abs(np.diag(products) - np.diag(sizes)) > _TOLERANCE * np.diag(sizes)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"Expected the diagonal of gram to be sensitivities**2, got {int(bad.sum())} of "
            f"{count} different (first: member {row}, {products[row, row]!r} against "
            f"{sizes[row, row]!r}). {cure}"
        )
    lowest = float(np.linalg.eigvalsh((products + products.T) / 2.0)[0])
    trace = float(np.trace(sizes))
    if lowest < -_TOLERANCE * trace:
        raise ValueError(
            f"Expected gram to be positive semidefinite, got smallest eigenvalue {lowest!r}. {cure}"
        )
    # Every inner product that grows lets the divergence grow.
    products = np.maximum(products, products.T)
    diagonal = np.maximum(np.diag(products), np.diag(sizes) * (1.0 + 2.0 * _EPS))
    np.fill_diagonal(products, diagonal + max(0.0, -lowest) + 4.0 * count * _EPS * trace)
    return products


def gram_forward(inner: FloatArray, rate: float, orders: FloatArray) -> FloatArray:
    """Exact D(with ‖ without) from the inner products, inf where not affordable.

    (α−1)·D = log E exp(Σ_{i<j} ⟨g_{S_i}, g_{S_j}⟩), S_1 … S_α independent Poisson subsets: a sum
    over multisets of non-empty subsets; real orders by the chord of the convex (α−1)·D.
    """
    kinds = 2 ** len(inner) - 1
    top = 1
    while top < orders.max() and math.comb(top + 1 + kinds, kinds) <= _TERMS:
        top += 1
    result = np.full(orders.size, np.inf)
    wanted = np.ceil(orders) <= top
    if not wanted.any():
        return result
    size, log_count, exponent = _multisets(inner, rate, top)
    empty = len(inner) * math.log1p(-rate)
    curve = np.zeros(top + 1)  # (α−1)·D at α = 0 … top; 0 at α = 1
    for order in range(2, top + 1):
        held = (size <= order) & (size >= 2)
        rest = order - size[held]
        log_mass = gammaln(order + 1.0) - gammaln(rest + 1.0) + log_count[held] + rest * empty
        curve[order] = _log_mean_exp(log_mass, exponent[held], order)
    low = np.floor(orders[wanted]).astype(np.int64)
    high = np.minimum(low + 1, top)
    part = orders[wanted] - low
    chord = (1.0 - part) * curve[low] + part * curve[high]
    result[wanted] = chord / (orders[wanted] - 1.0) * (1.0 + 16.0 * _EPS)
    return result


def _multisets(
    inner: FloatArray, rate: float, top: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """All multisets of up to `top` non-empty subsets: size, log Π p_S^c/c!, and the exponent."""
    kinds = subsets(len(inner))[1:]
    log_masses = subset_log_masses(kinds, rate)
    size, log_count, exponent = np.zeros(1), np.zeros(1), np.zeros(1)
    total = np.zeros((1, len(inner)))  # inner products of each member with the sum so far
    for subset, log_mass in zip(kinds, log_masses, strict=True):
        choices = (top - size + 1).astype(np.int64)
        again = np.repeat(np.arange(len(size)), choices)
        first = np.cumsum(choices) - choices
        times = (np.arange(len(again)) - first[again]).astype(np.float64)
        pull = inner @ subset
        exponent = exponent[again] + times * (total @ subset)[again]
        exponent += times * (times - 1.0) / 2.0 * float(subset @ pull)
        total = total[again] + times[:, None] * pull
        log_count = log_count[again] + times * log_mass - gammaln(times + 1.0)
        size = size[again] + times
    return size, log_count, exponent


def _log_mean_exp(log_mass: FloatArray, exponent: FloatArray, order: int) -> float:
    """log(1 + Σ mass·expm1(exponent)), raised by what rounding may have taken."""
    terms = log_mass + exponent
    slack = 64.0 * order * _EPS  # the exponents are sums of fewer than order² rounded products
    worst = float(np.abs(log_mass).max() + np.abs(exponent).max())
    if terms.max() > 600.0:  # the masses sum to 1 and no more
        peak = float(terms.max())
        return peak + math.log(float(np.exp(terms - peak).sum()) + math.exp(-peak)) + slack * worst
    # mass·e^x as one exponential: its factors may leave the range of doubles
    small = np.exp(log_mass) * np.expm1(np.minimum(exponent, 1.0))
    parts = np.where(exponent < 1.0, small, -np.exp(terms) * np.expm1(-np.maximum(exponent, 1.0)))
    spread = float(np.abs(parts).sum()) * (slack * (1.0 + worst)) + 1e-300
    return math.log1p(float(parts.sum()) + spread)
