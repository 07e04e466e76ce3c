"""Groups of a score's quantiles: how hard each decile is, and whose top decile is hardest.

Knows arrays only, one entry per instance (or per forget set).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .bootstrap import RESAMPLES, Estimate, Statistic, bootstrap, bootstrap_each
from .complete_cases import complete_cases
from .rank_correlation import MidRanks


@dataclass(frozen=True)
class GroupComparison:
    """Mean hardness in the groups of one score, and of its top group beside the reference's.

    Attributes:
        groups: Mean hardness from the lowest to the highest group of the score.
        difference: Mean hardness in the reference's top group minus that in this score's top
            group, from the same resamples. Zero for the reference itself.
    """

    groups: tuple[Estimate, ...]
    difference: Estimate

    @property
    def top(self) -> Estimate:
        """Mean hardness in the highest group."""
        return self.groups[-1]

    @property
    def verdict(self) -> str:
        """Whether the reference's top group is "harder", "easier" or "undecided"."""
        return {1: "harder", -1: "easier", 0: "undecided"}[self.difference.sign]


def group_hardness(
    score: npt.ArrayLike,
    *,
    hardness: npt.ArrayLike,
    groups: int = 10,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
    nan_policy: str = "raise",
) -> tuple[Estimate, ...]:
    """Return the mean hardness in each quantile group of a score, lowest group first.

    Group k of G holds the instances whose ranks by the score lie in [k/G, (k+1)/G] of all. An
    instance on a boundary counts in both groups by its parts, and tied instances share their places
    equally: each mean is the expectation over random tie-breaking, so nothing depends on the order
    of the rows. Groups are formed anew in every resample.

    Args:
        score: Shape (instances,). May be infinite.
        hardness: Shape (instances,), finite, for example the gap to the oracle; larger is harder.
        groups: Number of groups G, >= 2, at most the number of instances; 10 for deciles.
        level, resamples, interval, seed, nan_policy: As in `rank_correlation`.

    Returns:
        One Estimate per group.

    Raises:
        ValueError: Lengths that differ, NaN (names the first row), a hardness that is infinite
            (it has no mean: cap it, and say so), fewer instances than groups.

    Edge cases:
        score constant   every group has the mean of all

    Source: definition of this package.
    Privacy: computed from private data; not private to release.

    >>> [round(e.value, 9) for e in group_hardness([1, 2, 3, 4], hardness=[0, 1, 2, 9], groups=2)]
    [0.5, 5.5]
    """
    count = check.integer("groups", groups, low=2)
    hard, values = _cases([("score", score)], hardness, groups=count, nan_policy=nan_policy)
    return bootstrap_each(
        _means(values, hard, count), count=len(hard), level=level, resamples=resamples,
        interval=interval, seed=seed,
    )  # fmt: skip


def top_group_difference(
    score: npt.ArrayLike,
    *,
    other: npt.ArrayLike,
    hardness: npt.ArrayLike,
    groups: int = 10,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
    nan_policy: str = "raise",
) -> Estimate:
    """Return how much harder the top group of one score is than that of another, paired.

    Args:
        score, other: Shape (instances,).
        hardness: Shape (instances,), finite.
        groups: As in `group_hardness`; 10 compares top deciles.
        level, resamples, interval, seed, nan_policy: As in `rank_correlation`.

    Returns:
        Estimate of the mean hardness in the top group of `score` minus that in the top group of
        `other`, both of the same resample.

    Raises:
        ValueError: As in `group_hardness`.

    Source: paired bootstrap, see `bootstrap`.
    Privacy: as in `group_hardness`.
    """
    count = check.integer("groups", groups, low=2)
    hard, *both = _cases(
        [("score", score), ("other", other)], hardness, groups=count, nan_policy=nan_policy
    )
    first, second = (_means(values, hard, count) for values in both)
    return bootstrap(
        lambda taken: (first(taken) - second(taken))[:, -1], count=len(hard), level=level,
        resamples=resamples, interval=interval, seed=seed,
    )  # fmt: skip


def compare_groups(
    scores: Mapping[str, npt.ArrayLike],
    *,
    hardness: npt.ArrayLike,
    reference: str,
    groups: int = 10,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    interval: str = "bca",
    seed: int = 0,
    nan_policy: str = "omit",
) -> dict[str, GroupComparison]:
    """Put every score's groups beside those of a reference score.

    Args:
        scores: Name -> shape (instances,), aligned so that larger means harder.
        hardness: Shape (instances,), finite.
        reference: The name all others are compared with.
        groups, level, resamples, interval, seed: As in `group_hardness`.
        nan_policy: As in `compare_scores`: "omit" unless said.

    Returns:
        Name -> GroupComparison, in the order of `scores`. The score whose top group is hardest is
        `max(result, key=lambda name: result[name].top.value)`.

    Raises:
        ValueError: As in `group_hardness`; or `reference` is not among the scores.

    Source: as `top_group_difference`.
    Privacy: as in `group_hardness`.
    """
    check.choice("reference", reference, list(scores), "Name one of the scores.")
    count = check.integer("groups", groups, low=2)
    hard, *columns = _cases(scores.items(), hardness, groups=count, nan_policy=nan_policy)
    each = [_means(values, hard, count) for values in columns]
    base = list(scores).index(reference)

    def statistic(taken: IntArray) -> FloatArray:
        found = np.stack([means(taken) for means in each], axis=1)
        ahead = found[:, [base], -1:] - found[:, :, -1:]
        return np.concatenate([found, ahead], axis=2).reshape(len(taken), -1)

    estimates = bootstrap_each(
        statistic, count=len(hard), level=level, resamples=resamples, interval=interval, seed=seed
    )  # fmt: skip
    result = {}
    for number, name in enumerate(scores):
        own = estimates[number * (count + 1) : (number + 1) * (count + 1)]
        result[name] = GroupComparison(own[:-1], own[-1])
    return result


def _cases(
    scores: Iterable[tuple[str, npt.ArrayLike]],
    hardness: npt.ArrayLike,
    *,
    groups: int,
    nan_policy: str,
) -> list[FloatArray]:
    """Return hardness, finite, and each score of the instances that all of them know."""
    hard, *values = complete_cases([("hardness", hardness), *scores], nan_policy=nan_policy)
    check.real_array(
        "hardness", hard, cure="A mean needs finite values; cap what never ends, and say so."
    )
    check.integer("number of instances", len(hard), low=groups, cure="Form fewer groups.")
    return [hard, *values]


def _means(values: FloatArray, hard: FloatArray, groups: int) -> Statistic:
    """Return the mean hardness of each group, shape (draws, groups)."""
    ranks = MidRanks(values)

    def statistic(taken: IntArray) -> FloatArray:
        # Up to rank r, instances in the order of the score have this much hardness together. Tied
        # ones lie on one straight piece: half of their places hold half of their hardness.
        place, held = ranks.cumulative(taken, hard)
        cuts = np.linspace(0.0, 1.0, groups + 1)
        up_to = np.stack(
            [np.interp(cuts * p[-1], p, h) for p, h in zip(place, held, strict=True)]
        )  # fmt: skip
        return np.asarray(np.diff(up_to, axis=1) * groups / place[:, -1:])

    return statistic
