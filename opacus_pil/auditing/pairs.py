"""A model that is trained already: members against held-out rows, in pairs drawn by public coins.

Where the split was drawn at random, either row of a pair matched at random is the member with
probability 1/2, independently, given the pairs. That tests one instance exchanged for another, so
bounds stand beside the replacement curve of the steps, never beside the add/remove ε. Knows scores
by id; no model and no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import _validate as check
from .claim import Claim
from .guesses import Guesses, by_rank, planned
from .losses import REPLACE
from .lower_bound import LowerBound
from .one_run import (
    mahloujifar_bound,
    mahloujifar_p_value,
    require_small_delta,
    steinke_bound,
    steinke_expected,
)

RANDOM = "the split into members and held-out rows was drawn at random, by public coins"
_TOO_ORDERLY = 8  # of each kind; fewer ids may be in order by chance


@dataclass(frozen=True)
class PairedBounds:
    """Lower bounds on the ε of exchanging one instance for another.

    Attributes:
        lower: Steinke's, and with a claim Mahloujifar's against its replacement curve.
        pairs: Matched pairs.
        claimed: Replacement ε of the claim; None without one.
    """

    lower: tuple[LowerBound, ...]
    pairs: int
    claimed: float | None


def paired_bounds(
    members: Mapping[Hashable, float],
    *,
    held_out: Mapping[Hashable, float],
    delta: float,
    split: str,
    seed: int,
    claim: Claim | None = None,
    guesses: int | None = None,
    strata: Mapping[Hashable, Any] | None = None,
    confidence: float = 0.95,
) -> PairedBounds:
    """Bound the replacement ε of a model that is trained already, from its scores.

    Guarantee: as `one_run_lower_bound`, for exchanging one record, if the split was random and
        held-out rows were never used: not for selection, stopping or tuning. Pairs may depend on
        each other in any way.

    Args:
        members: Score of each training row by id, higher meaning member.
        held_out: The same of rows that were held out by the same coins.
        delta: δ of the statement; well below 1 / pairs, or Steinke's bound is left out.
        split: How the split was made. Only "random" proves anything.
        seed: Public, fixed before scores are seen: of the matching.
        claim: The training's steps; compared as a replacement.
        guesses: Pairs that are guessed; None: chosen from the claim before scores are seen, or all.
        strata: Stratum of each id, where the split was stratified: pairs stay within.
        confidence: In (0, 1).

    Raises:
        ValueError: A split by time or source; ids in both; too few pairs; rows in order.
    """
    level = 1.0 - check.real(
        "confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True
    )
    if split != "random":
        raise ValueError(
            check.expected(
                "split", "to be 'random'", split,
                "A split by time, source or order proves nothing: members differ from held-out "
                "rows for other reasons than membership. Split at random before training.",
            )
        )  # fmt: skip
    both = [i for i in members if i in held_out]
    if both:
        raise ValueError(
            f"Expected ids to be members or held out, got {len(both)} that are both (first: "
            f"{both[0]!r}). Score each row once."
        )
    _refuse_an_order(members, held_out)
    scores, coins = _matched(members, held_out, strata=strata, seed=seed)
    m = len(scores)
    if claim is None:
        require_small_delta(delta, m)
    exchanged = None if claim is None else Claim(claim.runs, delta=delta, neighbours=REPLACE)

    def found(score: Any) -> Guesses:
        count = guesses
        if count is None and exchanged is not None:
            count = planned(exchanged.losses(), canaries=m, score=score)
        return by_rank(scores, included=coins, guesses=count, seed=seed)

    lower = []
    if delta * m < 1.0:  # else it can reject nothing; the claim's own curve can
        steinke = steinke_bound(
            found(lambda g: steinke_expected(g, delta=delta, level=level)), delta=delta, level=level
        )
        lower.append(replace(steinke, condition=RANDOM))
    if exchanged is not None:
        half = exchanged.losses(2.0)
        ranked = found(
            lambda g: -mahloujifar_p_value(g.right, guesses=g.count, canaries=m, curve=half)
        )
        bound = mahloujifar_bound(ranked, claim=exchanged, level=level)
        lower.append(replace(bound, condition=f"{RANDOM}, and {bound.condition}"))
    claimed = None if exchanged is None else exchanged.epsilon
    return PairedBounds(tuple(lower), m, claimed)


def _matched(
    members: Mapping[Hashable, float],
    held_out: Mapping[Hashable, float],
    *,
    strata: Mapping[Hashable, Any] | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the score difference of each pair's first and second row, and whether the first is in.

    The matching is uniform within strata and blind to scores; which row comes first is a coin.
    """
    random = np.random.default_rng(check.integer("seed", seed, low=0))
    groups: dict[Any, tuple[list[Any], list[Any]]] = {}
    for number, ids in enumerate((members, held_out)):
        for each in ids:
            key = None if strata is None else _stratum(strata, each)
            groups.setdefault(key, ([], []))[number].append(each)
    differences, first_in = [], []
    for inside, outside in groups.values():
        count = min(len(inside), len(outside))
        left = [inside[i] for i in random.permutation(len(inside))[:count]]
        right = [outside[i] for i in random.permutation(len(outside))[:count]]
        for a, b in zip(left, right, strict=True):
            first = bool(random.random() < 0.5)
            gap = float(members[a]) - float(held_out[b])
            differences.append(gap if first else -gap)
            first_in.append(first)
    if len(differences) < 2:
        raise ValueError(
            f"Expected at least two pairs of a member and a held-out row, got {len(differences)}. "
            "Score more rows of both."
        )
    return np.array(differences), np.array(first_in)


def _stratum(strata: Mapping[Hashable, Any], each: Hashable) -> Any:
    if each not in strata:
        raise ValueError(
            f"Expected a stratum of every id, got none of {each!r}. Pass strata of all rows, or "
            "None for a split that was not stratified."
        )
    return strata[each]


def _refuse_an_order(members: Mapping[Any, float], held_out: Mapping[Any, float]) -> None:
    """Raise where all ids of one kind come before all of the other: no random split does that."""
    if min(len(members), len(held_out)) < _TOO_ORDERLY:
        return
    ids = [*members, *held_out]
    if not all(isinstance(i, int | np.integer) for i in ids):
        return
    if max(members) < min(held_out) or max(held_out) < min(members):
        raise ValueError(
            "Expected members and held-out rows drawn at random, got all of one before all of the "
            "other by id: a split by order, which often is one by time or source. Split at random "
            "before training."
        )
