"""The ε of the most private member of a claim's family that a test still refutes.

The family is the claim's steps with all noise multiplied by one number. Knows how to search it; no
test and no scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .claim import Claim
from .lower_bound import LowerBound

FAMILY = "rate, steps and the form of the noise are as accounted"
SCALES = (1.0 / 8.0, 64.0)
_HALVINGS = 12  # of the range of scales: the last interval is 1.5e-3 of the noise


def family_bound(
    claim: Claim,
    *,
    rejects: Callable[[float], bool],
    best: Callable[[float], bool],
    level: float,
) -> LowerBound:
    """Return the ε of the most private member of the claim's family that is still refuted.

    Guarantee: where the training is a member, its ε is below the bound with probability at most
        `level`, if `rejects` refutes a true member no more often than that.

    Args:
        claim: Its runs with all noise multiplied by a scale are the family.
        rejects: Whether a scale is refuted at `level`; larger scales are refuted more easily.
        best: The same for the best outcome that the design has.
        level: 1 − confidence.

    Returns:
        LowerBound to be completed by the caller: ε from below, its ceiling roughly.
    """
    scale = least_rejected_scale(rejects)
    top = least_rejected_scale(best, halvings=7)
    return LowerBound(
        epsilon=0.0 if scale is None else claim.epsilon_from_below(scale),
        delta=claim.delta,
        confidence=1.0 - level,
        method="",
        assumption="none",
        condition=FAMILY,
        ceiling=0.0 if top is None else claim.losses(top).epsilon,
    )


def least_rejected_scale(
    rejects: Callable[[float], bool], *, halvings: int = _HALVINGS
) -> float | None:
    """Return the least multiple of the noise that is refuted, from above; None: none is.

    Args:
        rejects: Monotone: what is refuted at a scale is refuted at every larger one.
        halvings: Of the range of scales; the same ones come up in every search.
    """
    low, high = map(math.log, SCALES)
    if not rejects(SCALES[1]):
        return None
    if rejects(SCALES[0]):
        return SCALES[0]
    for _ in range(halvings):
        middle = (low + high) / 2.0
        low, high = (low, middle) if rejects(math.exp(middle)) else (middle, high)
    return math.exp(high)
