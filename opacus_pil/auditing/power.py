"""Whether a one-run design could have seen a training of twice the claimed ε.

Knows claims and counts; no scores and no model.
"""

from __future__ import annotations

import numpy as np

from .claim import Claim, Losses
from .lower_bound import LowerBound
from .one_run import mahloujifar_p_value

_SHRINK, _TRIES = 0.95, 60  # of the noise, until ε is as large as asked


def could_have_seen(bound: LowerBound, *, claim: Claim, times: float, level: float) -> bool:
    """Whether the median audit of a training `times` as exposing refutes the claim.

    Of the training, not of the scores: scores may see far less than the training gives away.

    Args:
        bound: Of the design: how many canaries or pairs, and how many of them are guessed.
        claim: Its steps with less noise are the training of so much larger ε.
        times: Of the claimed ε.
        level: At which the claim would be refuted.
    """
    losses, scale = claim.losses(), 1.0
    for _ in range(_TRIES):
        if claim.losses(scale).epsilon >= times * losses.epsilon:
            break
        scale *= _SHRINK
    right = expected_right(claim.losses(scale), guesses=bound.guesses, canaries=bound.canaries)
    p = mahloujifar_p_value(
        right, guesses=bound.guesses, canaries=bound.canaries, curve=losses
    )  # fmt: skip
    return p < level


def expected_right(losses: Losses, *, guesses: int, canaries: int) -> int:
    """Return how many of the most certain guesses are right where a training attains its curve."""
    slope = np.gradient(losses.deltas, losses.epsilons)
    right = losses.deltas - slope  # of a canary: called rightly, with a loss above ε
    wrong = -np.exp(-losses.epsilons) * slope
    place = int(np.argmin(np.abs(canaries * (right + wrong) - guesses)))
    share = right[place] / max(right[place] + wrong[place], 1e-300)
    return int(np.clip(round(guesses * float(share)), 0, guesses))
