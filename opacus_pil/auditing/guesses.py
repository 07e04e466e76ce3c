"""From scores and coins to guesses: who is called a member, who is not, and how many were right.

How many are guessed is fixed before the scores are seen; ties are broken without looking at the
coins. Knows scores and coins, joined by id; no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray

BoolArray = npt.NDArray[np.bool_]
PERMUTATIONS = 200


@dataclass(frozen=True)
class Guesses:
    """What was guessed about canaries whose coins were fair and thrown before training.

    Attributes:
        right: Right guesses.
        count: Guesses, fixed before scores were seen.
        canaries: All canaries, guessed or not.
        null_right: Shape (permutations,), right guesses of the same scores on permuted coins.
    """

    right: int
    count: int
    canaries: int
    null_right: npt.NDArray[np.int64]

    @property
    def wrong(self) -> int:
        """Wrong guesses."""
        return self.count - self.right

    def null_share(self, detects: Callable[[int], bool]) -> float | None:
        """Share of permutations whose number of right guesses is taken for evidence."""
        if not len(self.null_right):
            return None
        values, times = np.unique(self.null_right, return_counts=True)
        found = np.array([detects(int(v)) for v in values])
        return float(times[found].sum() / times.sum())


def by_rank(
    scores: Mapping[Any, float] | npt.ArrayLike,
    *,
    included: Mapping[Any, bool] | npt.ArrayLike,
    guesses: int | None = None,
    seed: int = 0,
) -> Guesses:
    """Call the higher half of the extreme scores members and the lower half not.

    Args:
        scores: Of each canary, higher meaning member: {id: score}, or shape (canaries,).
        included: Whether its coin put it into the training set: {id: bool} with the same ids, or an
            array in the same order.
        guesses: How many, from both ends alike; the rest is abstained from. None: all.
        seed: Of the order among equal scores, and of the permutations of the null check.

    Raises:
        ValueError: Ids or lengths that do not match, scores that are NaN, more guesses than
            canaries.
        TypeError: One of both with ids and the other without.
    """
    values, inside = matched(scores, included)
    m = len(values)
    r = m if guesses is None else check.integer("guesses", guesses, low=1, high=m)
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(m), values))  # ties at random, without a look at the coins
    low = r // 2
    called_out, called_in = order[:low], order[m - (r - low) :]
    right = int((~inside[called_out]).sum() + inside[called_in].sum())
    null = np.empty(PERMUTATIONS, dtype=np.int64)
    for i in range(PERMUTATIONS):
        coins = random.permutation(inside)
        null[i] = (~coins[called_out]).sum() + coins[called_in].sum()
    return Guesses(right, r, m, null)


def planned(losses: Any, *, canaries: int, score: Callable[[Guesses], float]) -> int:
    """Return how many guesses to make, from the claim alone, before any score is seen.

    At least a twentieth of the canaries, and 20 of them.

    Args:
        losses: What the claim allows: a `Losses`.
        canaries: All of them.
        score: What is to be large in the run that the claim makes likely, from its guesses.
    """
    # A claim of little leaves little to guess; a broken one more. A twentieth is always guessed.
    least = min(canaries, max(20, canaries // 20))
    slope = np.gradient(losses.deltas, losses.epsilons)
    right, wrong = losses.deltas - slope, -np.exp(-losses.epsilons) * slope  # |score| above ε
    best, most = canaries, -np.inf
    for share, error in zip(right[:160:4], wrong[:160:4], strict=True):
        count = min(round(canaries * (share + error)), canaries)
        if count < least:
            break
        expected = min(round(canaries * share), count)
        value = score(Guesses(expected, count, canaries, np.zeros(0, dtype=np.int64)))
        if value > most:
            best, most = count, value
    return best


def matched(
    scores: Mapping[Any, float] | npt.ArrayLike, included: Mapping[Any, bool] | npt.ArrayLike
) -> tuple[FloatArray, BoolArray]:
    """Return scores and coins in one order, joined by id where there are ids."""
    if isinstance(scores, Mapping) != isinstance(included, Mapping):
        raise TypeError(
            "Expected scores and coins both with ids or both without, got one of each. Pass "
            "{id: score} and {id: bool}."
        )
    if isinstance(scores, Mapping) and isinstance(included, Mapping):
        require_same_ids(scores, included)
        ids = list(included)
        scores, included = [scores[i] for i in ids], [included[i] for i in ids]
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    coins = np.asarray(included).reshape(-1)
    check.same_length("included", coins, "scores", len(values))
    if not np.isin(coins, (0, 1)).all():
        raise ValueError("Expected coins to be true or false, got other values.")
    bad = np.isnan(values)
    if bad.any():
        raise ValueError(
            f"Expected a score for every canary, got {int(bad.sum())} of {len(values)} NaN (first: "
            f"row {int(np.flatnonzero(bad)[0])}). Leaving some out after a look at the scores "
            "biases the audit: give the worst score instead."
        )
    if not len(values):
        raise ValueError("Expected at least one canary, got none.")
    return values, coins.astype(bool)


def require_same_ids(scores: Mapping[Any, Any], canaries: Mapping[Any, Any]) -> None:
    """Raise unless scores and canaries have the same ids."""
    missing = [i for i in canaries if i not in scores]
    foreign = [i for i in scores if i not in canaries]
    if missing or foreign:
        first = f"no score for {missing[0]!r}" if missing else f"{foreign[0]!r} is no canary"
        raise ValueError(
            f"Expected one score for every canary id, got {len(missing)} ids without a score and "
            f"{len(foreign)} scores of others ({first}). Score the canaries of this audit, joined "
            "by id."
        )
