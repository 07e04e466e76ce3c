"""Lower hull of a noisy contracting chain, built step by step in O(steps).

Knows chains only: z_t = c_t·z_{t−1} + s_t with noise ζ_t. Of the points (W_t, S_t), noise variance
and shift collected up to step t and carried to the end of the chain, it keeps the segments of the
greatest convex minorant; μ² = Σ (ΔS)²/ΔW over them.

A segment (log ΔS, log ΔW, log Πc_t) lives in the frame of its own last step. There (ΔS)²/ΔW is
what it is at the end of the chain, and its product of c_t carries the left neighbour into the
frame. With logarithms a chain of any length, shrinking or growing, neither overflows nor loses a
segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .._validate import FloatArray

Segment = tuple[float, float, float]  # log ΔS, log ΔW, log Πc_t; -inf is the logarithm of 0

# μ below this is reported as this: squares of smaller numbers underflow.
_SMALLEST = 1e-150


def _log_sum(a: float, b: float) -> float:
    """Log of e^a + e^b; either may be -inf."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def _joins(left: Segment, right: Segment) -> bool:
    """Whether the right segment is no steeper than the left one, so that both become one."""
    # S/(W·c) >= S'/W' in the right frame, cross-multiplied: no 0 is a divisor, 0 >= 0 joins.
    return left[0] + right[1] >= right[0] + left[1] + right[2]


def _join(left: Segment, right: Segment) -> Segment:
    """One segment from two neighbours, in the frame of the right one."""
    shift = _log_sum(left[0] + right[2], right[0])
    return shift, _log_sum(left[1] + 2.0 * right[2], right[1]), left[2] + right[2]


def _mu_squared(segment: Segment) -> float:
    """(ΔS)²/ΔW: 0 without a shift, inf with a shift that no noise hides."""
    shift, variance, _ = segment
    if shift == -math.inf:
        return 0.0
    log_value = 2.0 * shift - variance
    return math.exp(log_value) if log_value < 709.0 else math.inf


@dataclass(frozen=True)
class Hull:
    """The lower hull after the last step with a shift.

    `segments` from first to last, `totals` the running Σ (ΔS)²/ΔW, `slack` a bound on the relative
    rounding error of μ.
    """

    segments: list[Segment]
    totals: list[float]
    slack: float

    def mu(
        self,
        steps: int,
        *,
        contraction: float,
        noise_std: float,
        first_noise_std: float | None = None,
    ) -> float:
        """μ after `steps` more steps without shifts, alike but for the first one's noise; up."""
        if steps == 0:
            squared = self.totals[-1]
        elif contraction == 0.0:
            return 0.0  # the first of them merges the two runs
        else:
            # Noise of the new steps, pulled back into the frame of the last segment: it lengthens
            # that segment, which then swallows every left neighbour that has become steeper.
            variance = pulled_back_variance(steps, contraction, noise_std)
            if first_noise_std is not None:
                first = pulled_back_variance(1, contraction, first_noise_std)
                rest = -math.inf
                if steps > 1:
                    rest = pulled_back_variance(steps - 1, contraction, noise_std)
                    rest -= 2.0 * math.log(contraction)
                variance = _log_sum(first, rest)
            last = len(self.segments) - 1
            shift, own, factor = self.segments[last]
            tail = (shift, _log_sum(own, variance), factor)
            while last > 0 and _joins(self.segments[last - 1], tail):
                last -= 1
                tail = _join(self.segments[last], tail)
            squared = _mu_squared(tail) + (self.totals[last - 1] if last > 0 else 0.0)
        if all(segment[0] == -math.inf for segment in self.segments):
            return 0.0
        return max(math.sqrt(squared) * (1.0 + self.slack), _SMALLEST)


def pulled_back_variance(steps: int, contraction: float, noise_std: float) -> float:
    """Log of ζ²·Σ_{j=1..steps} c^(−2j), for c > 0."""
    if noise_std == 0.0:
        return -math.inf
    rate = 2.0 * math.log(contraction)
    if rate == 0.0:
        log_sum = math.log(steps)
    else:
        growth = steps * abs(rate)
        log_sum = math.log(-math.expm1(-growth)) - math.log(-math.expm1(-abs(rate)))
        log_sum += growth if rate < 0.0 else -rate
    return 2.0 * math.log(noise_std) + log_sum


def lower_hull(
    contraction: FloatArray, noise_std: FloatArray, shifts: FloatArray, *, initial_distance: float
) -> Hull:
    """Lower hull of a chain from (steps,) factors, noise and shifts: pool adjacent violators."""
    with np.errstate(divide="ignore"):
        log_c, log_variance = np.log(contraction), 2.0 * np.log(noise_std)
        start, log_s = float(np.log(initial_distance)), np.log(shifts)
    # The initial distance is a vertical first segment: a shift before any noise.
    segments: list[Segment] = [(start, -math.inf, 0.0)]
    largest = 0.0 if start == -math.inf else abs(start)
    for c, s, v in zip(log_c.tolist(), log_s.tolist(), log_variance.tolist(), strict=True):
        top = (s, v, c)
        while segments and _joins(segments[-1], top):
            top = _join(segments.pop(), top)
        segments.append(top)
        if -math.inf < top[0]:
            largest = max(largest, abs(top[0]))
        if -math.inf < top[1]:
            largest = max(largest, abs(top[1]))
    # Each step rounds a logarithm a few times, by at most half an ulp of its size; a product of
    # c_t smaller than e^(−2·largest − 40) carries nothing that a double would show.
    slack = np.finfo(np.float64).eps * (len(log_s) + 16) * (3.0 * largest + 40.0)
    totals = np.cumsum([_mu_squared(segment) for segment in segments]).tolist()
    return Hull(segments, totals, float(slack))
