"""One measured quantity beside the accounted one, and the three ways to compare them.

Knows sums and counts; not what they were measured on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scipy.stats import beta, chi2, gamma

from .._validate import FloatArray
from .lower_bound import plain

AGREES, VIOLATES, DIFFERS, UNKNOWN = "agrees", "violates", "differs", "not measurable"
_SLACK = 1e-3  # of a standard deviation: float32 noise and its sums are no better


@dataclass(frozen=True)
class Check:
    """One measured quantity beside the accounted one.

    Attributes:
        name: Code, stable.
        what: The quantity, in words.
        accounted: What the ledger or the arguments say; None where words say it.
        measured: What was seen; None: not measurable.
        low, high: Interval of the quantity at the check's share of the family-wise level.
        p_value: Of "as accounted"; None for exact comparisons.
        state: "agrees", "violates" (less private than accounted), "differs" (otherwise than
            accounted, not less private) or "not measurable".
        reason: What is wrong, or why nothing can be said; empty if it agrees.
    """

    name: str
    what: str
    accounted: float | None = None
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    state: str = AGREES
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return plain(vars(self))

    def __str__(self) -> str:
        """Say the check in one line."""
        numbers = ""
        if self.measured is not None:
            numbers = f"{self.measured:.4g}"
            if self.low is not None and self.high is not None:
                numbers += f" [{self.low:.4g}, {self.high:.4g}]"
            if self.accounted is not None:
                numbers += f" against {self.accounted:.4g}"
        why = f": {self.reason}" if self.reason else ""
        return f"{self.state:<15} {self.what:<46} {numbers}{why}".rstrip()


def std_check(
    name: str, what: str, *, squares: float, count: float, each: float, tests: int = 1,
    subject: str = "noise",
) -> Check:  # fmt: skip
    """Compare a standard deviation, in units of the accounted one, with 1."""
    if count < 2:
        return Check(name, what, 1.0, state=UNKNOWN, reason="no noise was seen")
    alpha = each / tests
    ratio = math.sqrt(squares / count)
    below = float(chi2.cdf(squares / (1.0 - _SLACK) ** 2, count))
    above = float(chi2.sf(squares / (1.0 + _SLACK) ** 2, count))
    p = min(2.0 * min(below, above) * tests, 1.0)
    low = math.sqrt(squares / float(chi2.isf(alpha / 2, count)))
    high = math.sqrt(squares / float(chi2.ppf(alpha / 2, count)))
    state = AGREES if p >= each else VIOLATES if ratio < 1.0 else DIFFERS
    reason = ""
    if state != AGREES:
        reason = (
            f"no {subject} at all" if squares == 0 else f"{ratio:.3g} of the accounted {subject}"
        )
    return Check(name, what, 1.0, ratio, low, high, p, state, reason)


def correlation_check(
    name: str, what: str, largest: float, length: int, pairs: int, each: float, reason: str
) -> Check:
    """The squared cosine of two independent Gaussian vectors is Beta(1/2, (length − 1)/2)."""
    a, b = 0.5, (length - 1) / 2.0
    p = min(pairs * (float(beta.sf(min(largest, 1.0), a, b))), 1.0)
    most = math.sqrt(float(beta.isf(min(each / pairs, 1.0), a, b)))
    state = AGREES if p >= each else VIOLATES
    return Check(name, what, 0.0, math.sqrt(largest), 0.0, most, p, state,
                 "" if state == AGREES else reason)  # fmt: skip


def dispersion_check(
    name: str, what: str, counts: FloatArray, trials: int, rate: float, *, lost: int, each: float,
    small: str, large: str,
) -> Check:  # fmt: skip
    """Compare the variance of binomial counts with n·q·(1 − q), by a gamma law."""
    unit = trials * rate * (1.0 - rate)
    degrees = len(counts) - lost
    value = float(((counts - counts.mean()) ** 2).sum()) / unit
    excess = (1.0 - 6.0 * rate * (1.0 - rate)) / unit
    variance = degrees * (2.0 + max(excess, 0.0))
    shape, scale = degrees**2 / variance, variance / degrees
    below = float(gamma.cdf(value, shape, scale=scale))
    above = float(gamma.sf(value, shape, scale=scale))
    p = min(2.0 * min(below, above), 1.0)
    low = value / float(gamma.isf(each / 2, shape, scale=scale))
    high = value / max(float(gamma.ppf(each / 2, shape, scale=scale)), 1e-300)
    state = AGREES if p >= each else VIOLATES
    reason = "" if state == AGREES else small if below < above else large
    return Check(name, what, 1.0, value / degrees, low, high, p, state, reason)
