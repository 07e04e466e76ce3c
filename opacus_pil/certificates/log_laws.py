"""Laws of the shift of several steps together, with logarithms of probabilities.

Knows sums of independent values. In a block of steps the rarest outcome may have a
probability of e^(−10⁶) and still matter, because its moment is as large: so no probability is ever
a plain number here. Every value is rounded up; every replacement of a law is a spread, which keeps
the mean and raises no expectation of a convex function by rounding down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .._validate import FloatArray
from .batch_laws import RAREST, Law

_UP = 1.0 + 4.0 * np.finfo(np.float64).eps  # after a product and a sum of values


@dataclass(frozen=True)
class LogLaw:
    """A discrete law: increasing values, logarithms of probabilities."""

    values: FloatArray
    logs: FloatArray

    @cached_property
    def weights(self) -> FloatArray:
        """Probabilities, none 0."""
        return np.maximum(np.exp(self.logs), RAREST)


def in_logs(law: Law) -> LogLaw:
    """Return the same law; probabilities below RAREST are raised to it."""
    return LogLaw(law.values, np.log(np.maximum(law.weights, RAREST)))


def mean_and_deviation(law: LogLaw) -> tuple[float, float]:
    """Expectation and standard deviation, for choices of levels only."""
    weights = np.exp(law.logs - law.logs.max())
    mean = float(weights @ law.values / weights.sum())
    return mean, math.sqrt(float(weights @ (law.values - mean) ** 2 / weights.sum()))


def summed(first: LogLaw, second: LogLaw, *, factor: float, count: int) -> LogLaw:
    """Law of factor·first + second, independent; spread upwards to about `count` values."""
    values = np.add.outer(factor * first.values, second.values).ravel() * _UP
    logs = np.add.outer(first.logs, second.logs).ravel()
    distinct, place = np.unique(values, return_inverse=True)
    return narrowed(LogLaw(distinct, _added(logs, place, len(distinct))), count=count)


def narrowed(law: LogLaw, *, count: int, below: float = 7.0, above: float = 7.0) -> LogLaw:
    """Spread to about `count` values: dense within so many deviations of the mean, sparse above."""
    if len(law.values) <= count:
        return law
    mean, deviation = mean_and_deviation(law)
    low, top = float(law.values[0]), float(law.values[-1])
    end = min(mean + above * deviation, top)
    far = count // 5
    levels = np.linspace(max(low, mean - below * deviation), end, count - far)
    if top > end:
        # Where next to all of the mass is at 0, the levels beyond begin at the first value there.
        start = max(end, float(law.values[law.values > 0.0][0]))
        levels = np.append(levels, np.geomspace(start, top, far + 1)[1:])
    # Roundings must not leave a value outside, nor two levels in the wrong order.
    levels = np.unique(np.append(np.minimum(levels, top), (low, top)))
    return _spread(law.values, law.logs, levels)


def _spread(values: FloatArray, logs: FloatArray, levels: FloatArray) -> LogLaw:
    """Move every value to the two levels around it, keeping its mean; levels cover the values."""
    if len(levels) == 1:
        return LogLaw(levels, _added(logs, np.zeros(len(logs), dtype=np.int64), 1))
    right = np.clip(np.searchsorted(levels, values, side="left"), 1, len(levels) - 1)
    share = (values - levels[right - 1]) / (levels[right] - levels[right - 1])
    share = np.clip(share, 0.0, 1.0)
    with np.errstate(divide="ignore"):  # a value on a level leaves nothing for the other one
        parts = np.concatenate((logs + np.log1p(-share), logs + np.log(share)))
    totals = _added(parts, np.concatenate((right - 1, right)), len(levels))
    kept = totals > -math.inf
    return LogLaw(levels[kept], totals[kept])


def _added(logs: FloatArray, place: np.ndarray, size: int) -> FloatArray:
    """Log of the sum of e^logs at each place; -inf where there is none."""
    peak = np.full(size, -math.inf)
    np.maximum.at(peak, place, logs)
    shift = np.where(np.isfinite(peak), peak, 0.0)
    total = np.bincount(place, np.exp(logs - shift[place]), size)
    with np.errstate(divide="ignore"):
        return shift + np.log(total)
