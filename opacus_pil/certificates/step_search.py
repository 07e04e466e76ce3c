"""The smallest number of steps that reaches a target, with few evaluations.

Knows a function that does not grow, and nothing of what it means. For functions that cost a tenth
of a second or more; where they cost nothing, bisection is as good.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

_FIRST = 16
_PATIENCE = 15  # evaluations before plain bisection


def smallest_steps(
    epsilon_at: Callable[[int], float], *, target: float, at_once: float, high: int
) -> int:
    """Smallest K in (0, high] with ε(K) <= target.

    Args:
        epsilon_at: ε of a number of steps.
        target: >= 0.
        at_once: ε(0), above the target.
        high: ε there is at most the target.

    Returns:
        K with ε(K) <= target and ε(K − 1) above it, whether or not ε ripples.

    >>> smallest_steps(lambda steps: 10.0 * 0.9**steps, target=1.0, at_once=10.0, high=1000)
    22
    """
    # log ε falls almost linearly in the end: a secant beyond the root, then regula falsi in the
    # bracket (Illinois: an end that stays twice counts half).
    low, below, above, beyond = 0, _excess(at_once, target), -math.inf, _FIRST
    moved_low = False
    for tried in itertools.count():
        if high - low <= 1:
            break
        steps = (low + high) // 2
        if above == -math.inf and tried < _PATIENCE:
            steps = min(beyond, steps)
        elif above > -math.inf and below < math.inf and tried < _PATIENCE:
            steps = round(low + (high - low) * below / (below - above))
        steps = min(max(steps, low + 1), high - 1)
        excess = _excess(epsilon_at(steps), target)
        if excess > 0.0:
            slope = (excess - below) / (steps - low)
            beyond = math.ceil(steps - 1.05 * excess / slope) if slope < 0.0 else 4 * steps
            above *= 0.5 if moved_low else 1.0
            low, below, moved_low = steps, excess, True
        else:
            below *= 1.0 if moved_low else 0.5
            high, above, moved_low = steps, excess, False
    return high


def _excess(epsilon: float, target: float) -> float:
    """Log of ε over the target; above 0 if and only if ε is above it."""
    if epsilon == 0.0:
        return -math.inf
    if target == 0.0 or epsilon == math.inf:
        return math.inf
    size = abs(math.log(epsilon) - math.log(target)) + 1e-300
    return size if epsilon > target else -size
