"""Intervals of statistics by resampling the instances they were computed from.

A statistic is given as a function of how often each instance is taken, so that resampling, leaving
out and the sample itself are the same call, and a paired comparison is one statistic of one draw.
Knows no scores, models or privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from .. import _validate as check
from .._validate import FloatArray, IntArray

Statistic = Callable[[IntArray], FloatArray]

RESAMPLES = 2000
_CELLS = 1 << 17  # draws × instances handled at a time: arrays of a megabyte stay in the cache
_BLOCKS = 1000  # groups left out in turn where there are more instances


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, with a bootstrap interval.

    Attributes:
        value: The statistic of the sample itself.
        low, high: The interval. NaN where nothing can be said (fewer than 3 instances, or a
            statistic that hardly any resample defines).
        level: Nominal coverage of the interval, for example 0.95. Approximate, as all bootstraps:
            a few hundredths too small for some ten instances.
        resamples: Resamples the interval was read from: those in which the statistic is defined.
        count: Instances in the sample.
    """

    value: float
    low: float
    high: float
    level: float
    resamples: int
    count: int

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below, else 0: undecided."""
        return int(self.low > 0) - int(self.high < 0)


def bootstrap(
    statistic: Statistic,
    *,
    count: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
) -> Estimate:
    """Return a statistic of a sample with a bootstrap interval.

    Args:
        statistic: Maps shape (draws, instances), how often each instance is taken, to shape
            (draws,); NaN where it is not defined.
        count: Instances in the sample, >= 1. They are taken as independent draws.
        level: Nominal coverage, in (0, 1).
        resamples: Number of resamples, >= 100.
        interval: "bca" (bias-corrected and accelerated) or "percentile".
        seed: Of the resampling; the same seed gives the same interval.

    Returns:
        Estimate.

    Raises:
        ValueError: An argument outside its range.

    Edge cases (first match wins):
        statistic undefined on the sample           all of it NaN
        fewer than 3 instances                      low, high NaN
        defined in fewer than half of the resamples low, high NaN
        the same value in every resample            that value twice

    Source: Efron (1987), "Better bootstrap confidence intervals", JASA 82, eqs. 2.3 and 6.6.
        Ours: resamples without a value are left out and not counted; beyond 1,000 instances the
        acceleration is read off leaving out 1,000 random groups in turn, which estimates the same.
    Privacy: as private as the statistic.
    """
    (estimate,) = bootstrap_each(
        lambda taken: statistic(taken)[:, None], count=count, level=level, resamples=resamples,
        interval=interval, seed=seed,
    )  # fmt: skip
    return estimate


def bootstrap_each(
    statistic: Statistic,
    *,
    count: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
) -> tuple[Estimate, ...]:
    """Return several statistics of the same resamples: `statistic` gives shape (draws, several)."""
    size = check.integer("count", count, low=1)
    confidence = check.real(
        "level", level, low=0.0, high=1.0, open_low=True, open_high=True, cure="Pass 0.95."
    )
    draws = check.integer("resamples", resamples, low=100)
    check.choice("interval", interval, ("bca", "percentile"))
    generator = np.random.default_rng(check.integer("seed", seed, low=0))

    values = statistic(np.ones((1, size), dtype=np.int64))[0]
    found = np.concatenate(
        [statistic(_resample(rows, size, generator)) for rows in _chunks(draws, size)]
    )
    left_out = np.empty((0, len(values)))
    if interval == "bca" and size >= 3:
        left_out = _left_out(statistic, size, generator)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    estimates = []
    for value, drawn, others in zip(values.tolist(), found.T, left_out.T, strict=True):
        defined = drawn[~np.isnan(drawn)]
        low = high = np.nan
        if not np.isnan(value) and size >= 3 and 2 * len(defined) >= draws:
            at = tails
            if interval == "bca":
                at = _corrected(tails, value, defined, _acceleration(others))
            low, high = np.quantile(defined, at)
        estimates.append(Estimate(value, float(low), float(high), confidence, len(defined), size))
    return tuple(estimates)


def bootstrap_nested(
    statistics: Sequence[Statistic],
    *,
    counts: Sequence[int],
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Estimate, ...]:
    """Return statistics of several groups, averaged, with intervals over groups and instances.

    A group is a training with its split, or whatever else comes as a whole. A resample draws as
    many groups as there are, with replacement, and instances anew inside each draw of a group.

    Args:
        statistics: One per group: shape (draws, instances of the group) to shape (draws, several),
            the same several of every group; NaN where one is not defined.
        counts: Instances of each group, each >= 1.
        level: Nominal coverage, in (0, 1).
        resamples: Number of resamples, >= 100.
        seed: Of the resampling.

    Returns:
        One Estimate for each of the several: the mean over the groups, with percentile intervals;
        `count` is the number of all instances. With one group the interval says nothing about
        others. Few groups, such as three, are few: the interval is then a rough one.

    Raises:
        ValueError: No group, lengths that differ, or an argument outside its range.

    Edge cases (first match wins):
        a statistic undefined in one group          all of it NaN
        defined in fewer than half of the resamples low, high NaN
        the same value in every resample            that value twice

    Source: two-stage bootstrap, Davison and Hinkley (1997), Sec. 3.8, strategy 2. Resampled groups
        vary by (groups − 1) / groups of what groups do: their distances from the mean are stretched
        by the root of the inverse, which makes intervals wider, never narrower.
    Privacy: as private as the statistics.
    """
    if len(statistics) != len(counts):
        raise ValueError(
            f"Expected one count per statistic, got {len(statistics)} and {len(counts)}."
        )
    groups = check.integer("number of groups", len(counts), low=1)
    sizes = [check.integer("counts", count, low=1) for count in counts]
    confidence = check.real(
        "level", level, low=0.0, high=1.0, open_low=True, open_high=True, cure="Pass 0.95."
    )
    draws = check.integer("resamples", resamples, low=100)
    generator = np.random.default_rng(check.integer("seed", seed, low=0))
    own = np.stack(
        [f(np.ones((1, n), dtype=np.int64))[0] for f, n in zip(statistics, sizes, strict=True)]
    )
    middle = own.mean(axis=0)
    stretch = np.sqrt(groups / (groups - 1.0)) - 1.0 if groups > 1 else 0.0
    inside = np.stack(
        [
            np.concatenate([f(_resample(rows, n, generator)) for rows in _chunks(draws, n)])
            for f, n in zip(statistics, sizes, strict=True)
        ]
    )
    inside += stretch * (own - middle)[:, None]
    group = generator.integers(0, groups, size=(draws, groups))
    within = generator.integers(0, draws, size=(draws, groups))
    found = inside[group, within].mean(axis=1)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    estimates = []
    for value, drawn in zip(middle.tolist(), found.T, strict=True):
        defined = drawn[~np.isnan(drawn)]
        low = high = np.nan
        if not np.isnan(value) and 2 * len(defined) >= draws:
            low, high = np.quantile(defined, tails)
        estimates.append(
            Estimate(value, float(low), float(high), confidence, len(defined), sum(sizes))
        )
    return tuple(estimates)


def _chunks(total: int, size: int) -> list[int]:
    """Split a number of draws so that draws × instances fits in memory."""
    rows = max(1, _CELLS // size)
    return [min(rows, total - start) for start in range(0, total, rows)]


def _resample(draws: int, size: int, generator: np.random.Generator) -> IntArray:
    """Return how often each instance comes up in `size` draws with replacement."""
    taken = generator.integers(0, size, size=(draws, size))
    taken += size * np.arange(draws)[:, None]
    return np.bincount(taken.reshape(-1), minlength=draws * size).reshape(draws, size)


def _left_out(statistic: Statistic, size: int, generator: np.random.Generator) -> FloatArray:
    """Return the statistic with each instance (or random group of them) left out."""
    blocks = min(size, _BLOCKS)
    block_of = np.arange(size) if blocks == size else generator.permutation(size) % blocks
    parts = []
    start = 0
    for rows in _chunks(blocks, size):
        without = np.arange(start, start + rows)
        parts.append(statistic((block_of != without[:, None]).astype(np.int64)))
        start += rows
    return np.concatenate(parts)


def _acceleration(values: FloatArray) -> float:
    """Return Efron's acceleration from the values with one part left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0
    away = values.mean() - values
    square = float((away**2).sum())
    # Where leaving out changes nothing there is nothing to correct.
    return 0.0 if square == 0.0 else float((away**3).sum()) / (6.0 * square**1.5)


def _corrected(
    tails: FloatArray, value: float, found: FloatArray, acceleration: float
) -> FloatArray:
    """Return the tail probabilities at which the resamples' quantiles are read."""
    below = ((found < value).mean() + (found <= value).mean()) / 2  # ties count half
    edge = 0.5 / len(found)  # no resample beyond: as if half of one were
    bias = ndtri(np.clip(below, edge, 1 - edge))
    shifted = bias + ndtri(tails)
    return np.asarray(ndtr(bias + shifted / (1 - acceleration * shifted)))
