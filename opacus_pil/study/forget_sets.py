"""Which instances are forgotten together: quantiles of privacy loss, random ones, tops, folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .._validate import FloatArray, IntArray


@dataclass(frozen=True)
class ForgetSet:
    """Rows that leave together.

    Attributes:
        name: Shown in tables.
        kind: "quantile", "random" or "top".
        rows: Ascending, shape (members,).
    """

    name: str
    kind: str
    rows: IntArray


def quantile_sets(score: FloatArray, *, ends: Sequence[float], size: int) -> list[ForgetSet]:
    """Return, for each end, the `size` instances whose ranks end there; 1 is the highest score."""
    order = np.argsort(score, kind="stable")
    found = []
    for end in ends:
        stop = max(round(end * len(score)), size)
        rows = np.sort(order[stop - size : stop])
        found.append(ForgetSet(f"P up to {100 * end:g} %", "quantile", rows))
    return found


def random_sets(count: int, *, sets: int, size: int, seed: int) -> list[ForgetSet]:
    """Return disjoint random sets of `count` instances: no score had a say in them."""
    order = np.random.default_rng(seed).permutation(count)
    return [
        ForgetSet(f"random {number + 1}", "random", np.sort(order[number * size :][:size]))
        for number in range(sets)
    ]


def top_sets(scores: Mapping[str, FloatArray], *, size: int) -> list[ForgetSet]:
    """Return the `size` instances that each score calls hardest, earlier rows first in ties.

    Two scores with the same top give equal sets, whose trainings are done once.
    """
    return [
        ForgetSet(name, "top", np.sort(np.argsort(-values, kind="stable")[:size]))
        for name, values in scores.items()
    ]


def folds(count: int, *, parts: int, seed: int) -> list[IntArray]:
    """Return a random partition of `count` instances, each part ascending."""
    order = np.random.default_rng([seed, 1]).permutation(count)  # not that of the random sets
    return [np.sort(part) for part in np.array_split(order, parts)]
