"""What a batch does to the distance of two runs: factor, shifts, and their laws.

Knows coins and sizes only. `spread` replaces a law by one with few values and the same mean; under
a convex function its expectation is never smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from .._validate import FloatArray

# Smaller probabilities are raised to this: what may happen must not vanish by underflow, because
# the moments of what happens then may be as large as e^(10⁹).
RAREST = 1e-300


@dataclass(frozen=True)
class Law:
    """A discrete law: increasing values, probabilities."""

    values: FloatArray
    weights: FloatArray

    @property
    def mean(self) -> float:
        """Expectation."""
        return float(self.values @ self.weights)

    @property
    def variance(self) -> float:
        """Variance."""
        return float((self.values - self.mean) ** 2 @ self.weights)


def spread(law: Law, levels: FloatArray) -> Law:
    """Move every value to the two levels around it, keeping its mean; levels cover the values."""
    right = np.clip(np.searchsorted(levels, law.values, side="left"), 1, len(levels) - 1)
    left = right - 1
    share = (law.values - levels[left]) / (levels[right] - levels[left])
    share = np.clip(share, 0.0, 1.0)
    weights = np.zeros(len(levels))
    np.add.at(weights, left, law.weights * (1.0 - share))
    np.add.at(weights, right, law.weights * share)
    kept = weights > 0.0
    return Law(levels[kept], weights[kept])


def sum_law(shifts: FloatArray, rate: float, *, levels: int = 16) -> Law:
    """Law of a sum of independent shifts, each present with probability `rate`; spread upwards.

    Exact while at most `levels` different sums occur.
    """
    law = Law(np.zeros(1), np.ones(1))
    for shift in shifts[shifts > 0.0].tolist():
        values = np.concatenate((law.values, law.values + shift))
        weights = np.concatenate((law.weights * (1.0 - rate), law.weights * rate))
        values, place = np.unique(values, return_inverse=True)
        merged = np.zeros(len(values))
        np.add.at(merged, place, weights)
        law = Law(values, np.maximum(merged, RAREST) if 0.0 < rate < 1.0 else merged)
        if len(values) > 4096:
            law = spread(law, np.linspace(0.0, values[-1], 2048))
    kept = law.weights > 0.0  # rate 0 or 1
    law = Law(law.values[kept], law.weights[kept])
    if len(law.values) <= levels:
        return law
    usual = min(law.mean + 8.0 * math.sqrt(law.variance), law.values[-1])
    grid = np.linspace(law.values[0], usual, levels - 1)
    return spread(law, np.unique(np.append(grid, law.values[-1])))


def step_factor(
    sizes: npt.ArrayLike,
    *,
    step_size: float,
    weight_decay: float,
    smoothness: float,
    expected_batch_size: float,
) -> FloatArray:
    """Lipschitz constant of θ ← (1 − ηλ)θ − (η/b)·Σ gradients of so many instances, rounded up."""
    steepest = weight_decay + smoothness * np.asarray(sizes) / expected_batch_size
    factor = np.maximum(abs(1.0 - step_size * weight_decay), np.abs(1.0 - step_size * steepest))
    return factor + 4.0 * np.spacing(np.maximum(1.0, factor))


def _binomial(trials: int, rate: float) -> Any:
    """Return scipy's law; it overflows at the smallest positive rates, which are raised."""
    return binom(trials, max(rate, 1e-100) if rate > 0.0 else 0.0)


def largest_size(*, trials: int, rate: float, tail: float) -> int:
    """Smallest size that a Binomial(trials, rate) batch exceeds with probability at most `tail`."""
    law = _binomial(trials, rate)
    size = max(int(law.isf(tail)), 0)
    while law.sf(size) * (1.0 + 1e-9) > tail:  # isf rounds
        size += 1
    return size


def factor_law(values: FloatArray, *, trials: int, rate: float) -> Law:
    """Law of values[B], nondecreasing in B ~ Binomial(trials, rate) given B < len(values); spread.

    About a dozen values: usual sizes are told apart evenly, rare ones by their rarity.
    """
    if values[0] == values[-1]:
        return Law(values[:1], np.ones(1))
    law = _binomial(trials, rate)
    weights = law.pmf(np.arange(len(values)))
    if 0.0 < rate < 1.0:
        weights = np.maximum(weights, RAREST)
    first = int(np.searchsorted(values, values[0], side="right")) - 1
    usual = np.linspace(first, max(float(law.isf(1e-4)), first), 6)
    rare = law.isf(10.0 ** -np.array([6.0, 8.0, 11.0, 15.0, 22.0, 40.0, 80.0, 160.0]))
    marks = np.clip(np.append(usual, rare), first, len(values) - 1).astype(int)
    levels = np.unique(np.concatenate((values[marks], values[[0, -1]])))
    kept = weights > 0.0
    return spread(Law(values[kept], weights[kept] / weights.sum()), levels)
