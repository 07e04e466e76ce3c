"""What ε and δ allow somebody who guesses: the number that people without a course in privacy read.

Knows ε and δ; no training.
"""

from __future__ import annotations

import math

from .. import _validate as check

_ROUNDING = 1e-15  # four operations and an exponential, each off by half an ulp or a little more


def best_guess(epsilon: float, *, delta: float, two_sided: bool = True) -> float:
    """Return how often the best guesser is right about which of two models was shown, by a coin.

    Guarantee: if the two are (ε, δ)-indistinguishable, no rule is right with a larger probability,
        whatever else its owner knows; rounded up.

    Args:
        epsilon: >= 0; inf allowed.
        delta: In [0, 1].
        two_sided: (ε, δ) holds in both directions; False: in one only, whichever it is.

    Returns:
        In [1/2, 1].

    Raises:
        ValueError: A number outside its range.

    Edge cases: ε = 0 and δ = 0 give 1/2, a coin, up to rounding; ε = inf or δ = 1 give 1.

    Source: by the definition of (ε, δ), in both directions the two errors of every test sum to at
    least 2(1 − δ)/(1 + e^ε) (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776v4, section 2.1). In one
    direction only, P(A) − Q(A) is largest at P(A) = 1, Q(A) = (1 − δ)e^−ε, which gives
    1 − (1 − δ)e^−ε/2.

    >>> round(best_guess(1.0, delta=0.0), 4), best_guess(float("inf"), delta=0.0)
    (0.7311, 1.0)
    """
    share = math.exp(-epsilon if epsilon == math.inf else -check.epsilon(epsilon))
    rest = 1.0 - check.real("delta", delta, low=0.0, high=1.0)
    wrong = rest * share / (1.0 + share if two_sided else 2.0)
    return min(math.nextafter(1.0 - wrong * (1.0 - _ROUNDING), 2.0), 1.0)
