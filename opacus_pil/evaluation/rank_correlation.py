"""How well a score ranks instances by a target, and whether one score does so better than another.

Knows arrays only, one entry per instance (or per forget set). What the scores measure is
`difficulty.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .bootstrap import RESAMPLES, Estimate, Statistic, bootstrap, bootstrap_each
from .complete_cases import complete_cases

_METHODS = ("spearman", "kendall")


@dataclass(frozen=True)
class ScoreComparison:
    """One score beside a reference score, ranking the same instances by the same target.

    Attributes:
        correlation: Of the score with the target.
        difference: Correlation of the reference minus that of the score, from the same resamples.
            Zero, interval included, for the reference itself.
    """

    correlation: Estimate
    difference: Estimate

    @property
    def verdict(self) -> str:
        """What the interval of the difference says: reference "better", "worse" or "undecided"."""
        return {1: "better", -1: "worse", 0: "undecided"}[self.difference.sign]


def rank_correlation(
    score: npt.ArrayLike,
    *,
    target: npt.ArrayLike,
    method: str = "spearman",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
    nan_policy: str = "raise",
) -> Estimate:
    """Return a rank correlation of a score with a target, with a bootstrap interval.

    "spearman" is the Pearson correlation of mid-ranks; "kendall" is τ-b,
    (concordant − discordant) / √((pairs − ties in score)(pairs − ties in target)). Both are
    unchanged by increasing transformations of either argument, both treat ties as ties.

    Args:
        score: Shape (instances,). May be infinite (a privacy loss of +inf ranks highest).
        target: Shape (instances,), what should be ranked, for example time to unlearn.
        method: "spearman" or "kendall".
        level: Nominal coverage, in (0, 1).
        resamples: Number of bootstrap resamples, >= 100. A thousand of Kendall's τ on 5,000
            instances take some seconds.
        interval: "bca" or "percentile".
        seed: Of the resampling.
        nan_policy: NaN, the score of an instance that was never looked at: "raise" an error that
            names array and row, or "omit" the instance from all arrays; `count` says how many are
            left.

    Returns:
        Estimate, value in [-1, 1]; positive where both rise together. Instances are taken as
        independent: forget sets that share instances, or instances scored by one model, make the
        interval describe these data and not other trainings.

    Raises:
        ValueError: Lengths that differ, no instance, NaN (names the first row), or none left.

    Edge cases (first match wins):
        score or target constant   value NaN: there is nothing to rank
        perfect agreement          1 with interval [1, 1]: no resample disagrees

    Source: Spearman (1904); Kendall (1945), τ-b; interval: see `bootstrap`.
    Privacy: computed from private data where scores are; not private to release.

    >>> rank_correlation([1.0, 2.0, 3.0, 4.0], target=[10.0, 20.0, 40.0, 30.0]).value
    0.8
    """
    a, b = complete_cases([("score", score), ("target", target)], nan_policy=nan_policy)
    (estimate,) = bootstrap_each(
        _correlations([a], b, method), count=len(a), level=level, resamples=resamples,
        interval=interval, seed=seed,
    )  # fmt: skip
    return estimate


def correlation_difference(
    score: npt.ArrayLike,
    *,
    other: npt.ArrayLike,
    target: npt.ArrayLike,
    method: str = "spearman",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
    nan_policy: str = "raise",
) -> Estimate:
    """Return how much better one score ranks a target than another, by a paired bootstrap.

    Both correlations are computed in the same resample, so that what both scores share cancels.

    Args:
        score: Shape (instances,).
        other: Shape (instances,).
        target: Shape (instances,).
        method, level, resamples, interval, seed, nan_policy: As in `rank_correlation`.

    Returns:
        Estimate of correlation(score, target) − correlation(other, target), in [-2, 2].

    Raises:
        ValueError: As in `rank_correlation`.

    Edge cases (first match wins):
        one of the three constant              value NaN
        other ranks the instances like score   0 with interval [0, 0]

    Source: paired bootstrap of two correlations with one variable in common; see `bootstrap`.
    Privacy: as in `rank_correlation`.
    """
    a, b, t = complete_cases(
        [("score", score), ("other", other), ("target", target)], nan_policy=nan_policy
    )
    both = _correlations([a, b], t, method)

    def difference(taken: IntArray) -> FloatArray:
        found = both(taken)
        return np.asarray(found[:, 0] - found[:, 1])

    return bootstrap(
        difference, count=len(a), level=level, resamples=resamples, interval=interval, seed=seed
    )


def compare_scores(
    scores: Mapping[str, npt.ArrayLike],
    *,
    target: npt.ArrayLike,
    reference: str,
    method: str = "spearman",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
    nan_policy: str = "omit",
) -> dict[str, ScoreComparison]:
    """Put every score beside a reference score: who ranks the target better.

    Args:
        scores: Name -> shape (instances,), aligned so that larger means harder.
        target: Shape (instances,).
        reference: The name all others are compared with, for example "privacy_loss".
        method, level, resamples, interval, seed: As in `rank_correlation`.
        nan_policy: As in `rank_correlation`, but "omit" unless said: among several scores it is the
            rule that one does not know some instance. All are compared on the instances that every
            score and the target know, and the `count` of each Estimate is their number.

    Returns:
        Name -> ScoreComparison, in the order of `scores`. That the reference is not worse than
        *each* other score needs no correction for their number; that it is better than *some* one
        does: ask for level 1 − 0.05 / (number of scores).

    Raises:
        ValueError: As in `rank_correlation`; or `reference` is not among the scores.

    Source: as `correlation_difference`.
    Privacy: as in `rank_correlation`.
    """
    check.choice("reference", reference, list(scores), "Name one of the scores.")
    columns = complete_cases([*scores.items(), ("target", target)], nan_policy=nan_policy)
    correlations = _correlations(columns[:-1], columns[-1], method)
    base = list(scores).index(reference)

    def statistic(taken: IntArray) -> FloatArray:
        found = correlations(taken)
        return np.hstack([found, found[:, [base]] - found])

    estimates = bootstrap_each(
        statistic, count=len(columns[-1]), level=level, resamples=resamples, interval=interval,
        seed=seed,
    )  # fmt: skip
    pairs = zip(estimates[: len(scores)], estimates[len(scores) :], strict=True)
    return {
        name: ScoreComparison(correlation, difference)
        for name, (correlation, difference) in zip(scores, pairs, strict=True)
    }


def _correlations(scores: list[FloatArray], target: FloatArray, method: str) -> Statistic:
    """Return the correlation of each score with the target: shape (draws, scores)."""
    check.choice("method", method, _METHODS)
    if method == "kendall":
        each = [_kendall(score, target) for score in scores]
        return lambda taken: np.stack([statistic(taken) for statistic in each], axis=1)
    return spearman_statistics(scores, target)


def spearman_statistic(a: FloatArray, b: FloatArray) -> Statistic:
    """Return Spearman's correlation of two vectors as a statistic to resample: shape (draws,)."""
    both = spearman_statistics([a], b)
    return lambda taken: both(taken)[:, 0]


def spearman_statistics(scores: list[FloatArray], target: FloatArray) -> Statistic:
    """Return Spearman's correlations of several vectors with one: shape (draws, scores).

    Pearson correlations of mid-ranks, in time linear in the instances for every draw.
    """
    ranks, target_rank = [MidRanks(score) for score in scores], MidRanks(target)

    def statistic(taken: IntArray) -> FloatArray:
        middle = taken.sum(axis=1, keepdims=True) / 2.0  # mid-ranks have this mean exactly
        y = target_rank(taken) - middle
        weighted = taken * y
        spread = (weighted * y).sum(axis=1)
        found = np.empty((len(taken), len(ranks)))
        for k, rank in enumerate(ranks):
            x = rank(taken) - middle
            size = np.sqrt((taken * x * x).sum(axis=1) * spread)
            with np.errstate(invalid="ignore"):  # 0 / 0 where one is constant: NaN, as promised
                found[:, k] = np.clip((weighted * x).sum(axis=1) / size, -1.0, 1.0)
        return found

    return statistic


def _kendall(a: FloatArray, b: FloatArray) -> Statistic:
    # Ranks stand for the values: differences of infinities are never taken.
    ranks = [np.unique(values, return_inverse=True)[1] for values in (a, b)]

    def statistic(taken: IntArray) -> FloatArray:
        draws = (np.repeat(np.arange(taken.shape[1]), row) for row in taken)
        return np.array([kendalltau(ranks[0][rows], ranks[1][rows]).statistic for rows in draws])

    return statistic


class MidRanks:
    """Ranks of a vector's entries when each is taken a number of times; ties share the middle."""

    def __init__(self, values: FloatArray) -> None:
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        group = np.zeros(len(values), dtype=np.int64)
        group[self._starts[1:]] = 1
        self._group_of = np.empty(len(values), dtype=np.int64)
        self._group_of[self._order] = np.cumsum(group)

    def __call__(self, taken: IntArray) -> FloatArray:
        """Return the middle of each entry's ranks minus 1/2: shape (draws, instances)."""
        weight = np.add.reduceat(taken[:, self._order], self._starts, axis=1)
        middle = np.cumsum(weight, axis=1) - weight / 2.0
        return np.asarray(middle[:, self._group_of])

    def cumulative(self, taken: IntArray, amounts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return how many entries, and how much of `amounts`, lie up to each distinct value.

        Both of shape (draws, distinct values + 1), from 0.
        """
        ordered = taken[:, self._order]
        parts = (ordered, ordered * amounts[self._order])
        sums = [np.cumsum(np.add.reduceat(p, self._starts, axis=1), axis=1) for p in parts]
        zero = np.zeros((len(taken), 1))
        return np.hstack([zero, sums[0]]), np.hstack([zero, sums[1]])
