"""Claim (b), ranks: which score foresees best how far instances stay from the oracles.

Knows arrays, one case per training: its scores and how hard its instances turned out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..evaluation.bootstrap import Estimate, Statistic, bootstrap_nested
from ..evaluation.rank_correlation import spearman_statistics
from .claims import estimate, finite

Case = tuple[Mapping[str, FloatArray], FloatArray]


def score_claim(
    cases: Sequence[Case],
    *,
    reference: str,
    variants: Sequence[str],
    margin: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """(b) Which score ranks the instances of random forget sets best.

    Args:
        cases: One per training: name -> shape (instances,), higher is harder; and hardness, shape
            (instances,), the distance from the oracles after a fixed budget.
        reference: The score that the claim is about.
        variants: The privacy loss computed in other ways: listed, without a part in the verdict.
        margin: Of rank correlation: the reference is as good as the best proxy if the interval of
            its lead is above minus this.
        resamples, seed: Of intervals over trainings and, within them, instances; the lead of the
            reference over a score is of the same resamples.

    Returns:
        Per score its rank correlation and the reference's lead; the verdict is "no" where a proxy
        is better than the reference, "undecided" where the reference itself foresees nothing.
    """
    names = [name for name in cases[0][0] if all(name in scores for scores, _ in cases)]
    found = bootstrap_nested(
        [
            _leads([scores[n] for n in names], hard, names.index(reference))
            for scores, hard in cases
        ],
        counts=[len(hard) for _, hard in cases],
        resamples=resamples,
        seed=seed,
    )
    ranks = dict(zip(names, found[: len(names)], strict=True))
    leads = dict(zip(names, found[len(names) :], strict=True))
    proxies = [name for name in names if name != reference and name not in variants]
    best = max(proxies, key=lambda name: np.nan_to_num(ranks[name].value, nan=-1.0))
    worse = [name for name in proxies if leads[name].sign < 0]
    return {
        "instances": ranks[reference].count,
        "scores": {
            name: {
                "spearman": estimate(ranks[name], limit=1.0),
                "reference_minus_this": estimate(leads[name], limit=2.0),
                "reference_is": word(leads[name], "better", "worse"),
            }
            for name in names
        },
        "variants": [name for name in names if name in variants],
        "best_proxy": best,
        "margin": margin,
        "shortfall": finite(-leads[best].low),
        "within_margin": bool(leads[best].low >= -margin),
        "better_than": [name for name in proxies if leads[name].sign > 0],
        "worse_than": worse,
        "reproduced": "no" if worse else ("yes" if ranks[reference].sign > 0 else "undecided"),
    }


def word(lead: Estimate, above: str, below: str) -> str:
    """Return what the sign of a lead's interval says of the reference."""
    return {1: above, -1: below, 0: "undecided"}[lead.sign]


def _leads(scores: list[FloatArray], hardness: FloatArray, base: int) -> Statistic:
    """Return correlations, then the lead of one of them over each: shape (draws, 2 · scores)."""
    correlations = spearman_statistics(scores, hardness)

    def statistic(taken: IntArray) -> FloatArray:
        found = correlations(taken)
        return np.hstack([found, found[:, [base]] - found])

    return statistic
