"""Divergence between Σ_k p_k·N(m_k, 1) and N(0, 1), m_k >= 0, both ways, rounded up.

Knows shifts and their probabilities; what they mean for a forget set is `groups`.

*Moving probability to larger shifts never lowers either divergence.* With t ~ N(0, 1) and
Z = Σ_k p_k·exp(m_k·t − m_k²/2) the divergences are log E[F(Z)] / (α−1) for the convex functions
F(z) = z^α (forward) and z^(1−α) (reverse). Raising one m_k to m'_k raises every covariance
m_k·m_l of the exponents, so E[F(Z)] does not fall (Kahane 1986, C. R. Acad. Sci. 303, convexity
inequality). Hence every rounding here is a move of probability to the right.

What lies beyond a cut c is bounded by Minkowski, ‖e^X‖_α = exp((α−1)m²/2), forward, and by
convexity of D(N(0,1) ‖ ·), at most α·m²/2 each, reverse. What is left is integrated by the
trapezoid rule (see `quadrature`); its error is governed by Z in |Im t| < d. Forward, with d times
the largest shift below π, all terms of Z lie in one half-plane: no zero, and |Z(t+id)| <= Z(t), so
the growth is 1. Reverse, |Z(t+id)| >= Z(t)·(1 − d²V/2), where V bounds the variance of the shift
given t: its second moment at the last node is the largest. With d²V <= 1 and −log(1−y) <= 1.4·y
up to y = 1/2 the growth is 1 + 1.4·(α−1)·V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .._validate import FloatArray
from .quadrature import DECAY, MARGIN, SMALLEST, forward_excess, reverse_excess

_EPS = float(np.finfo(np.float64).eps)
_CHUNK = 1 << 17  # exponentials held at a time
_BUDGET = 6e6  # exponentials spent on one group of orders; beyond, the closed bounds answer
_TAIL = 1e-13  # share of the result that may come from beyond the cut


@dataclass(frozen=True)
class ShiftLaw:
    """Law of a shift m >= 0 in standard deviations of the noise.

    Args:
        shifts: Shape (atoms,), ascending from exactly 0.
        masses: Shape (atoms,), their probabilities, >= 0.
        far_shifts: Shape (far,), shifts beyond the last atom.
        far_log_masses: Shape (far,), log of an upper bound of the probability of each.
        spacing: Distance of the atoms if they form a lattice, else 0.
    """

    shifts: FloatArray
    masses: FloatArray
    far_shifts: FloatArray = field(default_factory=lambda: np.empty(0))
    far_log_masses: FloatArray = field(default_factory=lambda: np.empty(0))
    spacing: float = 0.0

    @property
    def largest(self) -> float:
        """The largest shift of all."""
        return float(max(self.shifts[-1], self.far_shifts[-1] if self.far_shifts.size else 0.0))

    @property
    def mean(self) -> float:
        """Mean shift without the far ones."""
        return max(float(self.masses @ self.shifts), 1e-300)


def mass_moved_right(masses: FloatArray, error: float) -> FloatArray:
    """Probabilities, each known up to a relative `error`, with that much mass moved to the right.

    Masses below the median shrink, those above grow, the median's own takes the remainder; so no
    distribution function value exceeds the exact one.
    """
    median = int(np.searchsorted(np.cumsum(masses), 0.5 * masses.sum()))
    moved = masses * (1.0 - error)
    moved[median + 1 :] = masses[median + 1 :] * (1.0 + error)
    moved[median] = 0.0
    moved[median] = max(0.0, 1.0 - moved.sum())
    return moved


def forward_divergence(law: ShiftLaw, orders: FloatArray) -> FloatArray:
    """Upper bound of D(mixture ‖ N(0,1)) at each order, shape (orders,).

    Within 1e-9 (relative) of the divergence wherever the quadrature is affordable; elsewhere
    Minkowski's bound, which is exact at q = 1 and where one shift dominates.
    """
    bound, settled, tails = _minkowski(law, orders)
    tolerance = np.log(_TAIL * (orders - 1.0) / 2.0) + 2.0 * math.log(law.mean)
    tails_fit = tails <= tolerance[:, None]
    tails_fit[:, -1] = True
    cuts = np.maximum(tails_fit.argmax(axis=1), 1)
    tilt = np.maximum(orders, 2.0)  # where Z − 1 is small, its square counts
    reach = np.floor(np.log2(2.0 * MARGIN + tilt * law.shifts[cuts]))
    for size in np.unique(reach):  # orders of like reach share their nodes
        rows = np.flatnonzero((reach == size) & ~settled)
        if not rows.size:
            continue
        cut = int(cuts[rows].max())
        span = float(law.shifts[cut])
        width = min(2.5 / span, math.sqrt(2.0 * DECAY))
        step = 2.0 * math.pi * width / (DECAY + width * width / 2.0)
        high = float(tilt[rows].max()) * span + MARGIN
        body = _Body(law, cut, high, renormalise=False)
        count = math.ceil((high + MARGIN) / step) + 1
        if count * body.cost > _BUDGET:
            continue
        nodes = np.asarray(step * np.arange(count) - MARGIN, dtype=np.float64)
        log_density = body.log_density(nodes)
        for row in rows:
            order = float(orders[row])
            log_moment = _log_moment(nodes, log_density, step, order, law.mean, forward=True)
            log_norm = log_moment / order
            # log(e^y + τ) = y + log1p(τ·e^−y) keeps a y far below 1
            log_norm += float(np.logaddexp(0.0, tails[row, cut] - log_norm))
            value = order / (order - 1.0) * log_norm * (1.0 + 8.0 * _EPS)
            bound[row] = min(bound[row], value)
    return np.maximum(bound, SMALLEST)


def reverse_divergence(law: ShiftLaw, orders: FloatArray, *, ignored: FloatArray) -> FloatArray:
    """Upper bound of D(N(0,1) ‖ mixture) at each order, shape (orders,).

    Where a closed bound is already at most `ignored` (orders,), that bound is returned.
    """
    second = float(law.masses @ law.shifts**2 + np.exp(law.far_log_masses) @ law.far_shifts**2)
    bound = orders * second / 2.0  # convexity
    if law.masses[0] > 0.5:  # Z >= p_0, which may be 1 in double precision
        shifted = float(law.masses[1:].sum() + np.exp(law.far_log_masses).sum())
        bound = np.minimum(bound, -math.log1p(-shifted))
    elif law.masses[0] > 0:
        bound = np.minimum(bound, -math.log(law.masses[0]))
    bound *= 1.0 + 64.0 * _EPS
    wanted = np.flatnonzero(bound > ignored)
    if not wanted.size:
        return np.maximum(bound, SMALLEST)

    tail = np.append(np.cumsum(law.masses[::-1])[::-1][1:], 0.0) + np.exp(law.far_log_masses).sum()
    enough = tail <= _TAIL * (law.mean / law.largest) ** 2
    cut = int(np.argmax(enough)) if enough.any() else len(tail) - 1
    beyond = float(tail[cut])
    span = float(law.shifts[cut])
    body = _Body(law, cut, span + MARGIN, renormalise=True)
    start, end = body.tilted_peaks(orders[wanted] - 1.0)
    for row, left, right in zip(wanted, start, end, strict=True):
        order = float(orders[row])
        peak = (1.0 - order) * body.log_density(np.array([right]))[0] - right * right / 2.0
        low = left - MARGIN
        # Log-concave with curvature >= 1: the peak region is all of the integrand. A small
        # divergence has a second part, of (Z − 1)², which lies below twice the shifts.
        high = (right if peak > 4.0 else 2.0 * span) + MARGIN
        spread = min(span * span / 4.0, body.second_moment(high))
        growth = 1.0 + 1.4 * (order - 1.0) * spread
        width = min(1.0 / math.sqrt(spread), math.sqrt(2.0 * DECAY / growth))
        step = 2.0 * math.pi * width / (DECAY + growth * width * width / 2.0)
        count = math.ceil((high - low) / step) + 1
        if count * body.cost > _BUDGET:
            continue
        nodes = low + step * np.arange(count)
        log_density = body.log_density(nodes)
        log_moment = _log_moment(nodes, log_density, step, order, law.mean, forward=False)
        value = log_moment / (order - 1.0) + beyond * order * law.largest**2 / 2.0
        bound[row] = min(bound[row], value * (1.0 + 8.0 * _EPS))
    return np.maximum(bound, SMALLEST)


def _minkowski(law: ShiftLaw, orders: FloatArray) -> tuple[FloatArray, np.ndarray, FloatArray]:
    """Closed forward bounds, where they are exact, and log of what lies beyond each possible cut.

    The last is log Σ_{k beyond} p_k·(‖e^X_k‖ + 1), shape (orders, atoms).
    """
    bound = np.empty(len(orders))
    settled = np.zeros(len(orders), dtype=bool)
    tails = np.empty((len(orders), len(law.shifts)))
    near = len(law.shifts)
    squares = np.append(law.shifts, law.far_shifts) ** 2 / 2.0
    with np.errstate(divide="ignore"):
        log_masses = np.append(np.log(law.masses), law.far_log_masses)
        far_mass = np.exp(law.far_log_masses).sum()
        flat = np.log(np.append(np.cumsum(law.masses[:0:-1])[::-1], 0.0) + far_mass)
        for row, order in enumerate(orders):
            exponent = log_masses + (order - 1.0) * squares
            peak = float(exponent[1:].max())
            scale = max(peak - 600.0, 0.0)
            terms = np.exp(exponent - scale)
            far = float(terms[near:].sum()) + 1e-300 * (scale > 0)  # more than what underflowed
            if scale == 0.0:
                grown = (order - 1.0) * squares[:near]
                small = grown < 600.0
                excess = law.masses[small] @ np.expm1(grown[small]) + terms[:near][~small].sum()
                log_norm = math.log1p(float(excess) + far)
            else:
                log_norm = scale + math.log(float(terms[:near].sum()) + far)
            bound[row] = order / (order - 1.0) * log_norm
            settled[row] = peak > 0 and log_norm - peak <= 1e-10 * peak
            beyond = np.append(np.cumsum(terms[near - 1 : 0 : -1])[::-1], 0.0) + far
            tails[row] = np.logaddexp(np.log(beyond) + scale, flat)
    return bound * (1.0 + 64.0 * _EPS), settled, tails


class _Body:
    """The atoms up to a cut, laid out as outer + inner shifts so that exp(m·t) factorises.

    The mass beyond the cut is put on shift 0, or the rest is scaled up to 1 (`renormalise`).
    """

    def __init__(self, law: ShiftLaw, cut: int, high: float, *, renormalise: bool) -> None:
        masses = law.masses[: cut + 1].copy()
        if renormalise:
            masses /= masses.sum()
        else:
            masses[0] = max(0.0, 1.0 - masses[1:].sum())
        self.shifts = law.shifts[: cut + 1]
        self.masses = masses
        block = 1
        if law.spacing > 0:  # exp(inner·t) stays below exp(200)
            block = min(math.isqrt(cut) + 1, max(1, int(200.0 / (law.spacing * high))))
        rows = -(-(cut + 1) // block)
        self.outer = self.shifts[::block]
        self.inner = law.spacing * np.arange(block)
        padded = np.zeros(rows * block)
        padded[: cut + 1] = masses
        shifts = self.outer[:, None] + self.inner
        with np.errstate(divide="ignore"):
            logs = np.log(padded.reshape(rows, block)) - shifts * shifts / 2.0
        self.peaks = logs.max(axis=1)
        held = self.peaks > -np.inf
        self.outer, self.peaks, logs = self.outer[held], self.peaks[held], logs[held]
        self.scaled = np.exp(logs - self.peaks[:, None])
        self.plain = np.exp(logs)
        self.constant = float(masses @ np.expm1(-(self.shifts**2) / 2.0))
        self.cost = self.outer.size * (1.0 + block / 16.0) + block

    def log_density(self, t: FloatArray) -> FloatArray:
        """L(t) = log of mixture over N(0,1)."""
        size = max(1, _CHUNK // (self.outer.size + self.inner.size))
        parts = [self._log_density(t[i : i + size]) for i in range(0, len(t), size)]
        return np.concatenate(parts)

    def second_moment(self, t: float) -> float:
        """E[shift² | t]: bounds the variance of the shift at every point up to t."""
        exponent = self.shifts * (t - self.shifts / 2.0)
        weights = self.masses * np.exp(exponent - exponent.max())
        return float(weights @ self.shifts**2 / weights.sum()) * (1.0 + 1e-9)

    def tilted_peaks(self, gaps: FloatArray) -> tuple[FloatArray, FloatArray]:
        """An interval around the peak of the log-concave Z^(−gap)·φ, for each gap."""
        weights = self.masses * np.exp(-(self.shifts**2) / 2.0)
        slope = float(weights @ self.shifts / weights.sum()) if weights.sum() > 0 else 0.0
        far = float(gaps.max()) * (slope if slope > 0 else float(self.shifts[-1]))
        grid = np.append(-np.geomspace(max(far, 1.0), 0.01, 200), 0.0)
        curve = -gaps[:, None] * self.log_density(grid) - grid * grid / 2.0
        best = curve.argmax(axis=1)
        return grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]

    def _log_density(self, t: FloatArray) -> FloatArray:
        with np.errstate(under="ignore", over="ignore", divide="ignore"):
            result = np.empty(len(t))
            grows = np.outer(self.outer, t)
            # Z − 1 as a sum of expm1, all of one sign up to a constant of second order.
            plain = np.abs(t) * self.shifts[-1] < 600.0 if self.shifts[-1] < 36.0 else t != t
            if plain.any():
                inner = np.expm1(np.outer(self.inner, t[plain]))
                u = np.exp(grows[:, plain]) * (self.plain @ inner)
                u += np.expm1(grows[:, plain]) * self.plain.sum(axis=1)[:, None]
                total = u.sum(axis=0) + self.constant
                result[plain] = np.log1p(np.maximum(total, -0.75))
                plain[plain] = total >= -0.5
            rest = ~plain
            if rest.any():
                inner = np.log(self.scaled @ np.exp(np.outer(self.inner, t[rest])))
                exponent = grows[:, rest] + self.peaks[:, None] + inner
                peak = exponent.max(axis=0)
                result[rest] = peak + np.log(np.exp(exponent - peak).sum(axis=0))
        return result


def _log_moment(
    t: FloatArray,
    log_density: FloatArray,
    step: float,
    order: float,
    mean: float,
    *,
    forward: bool,
) -> float:
    """(α−1)·D by the trapezoid rule on the nodes t, raised by what rounding may have taken."""
    half_square = 0.5 * t * t
    exponent = (order if forward else 1.0 - order) * log_density - half_square
    best = int(exponent.argmax())
    peak = float(exponent[best])
    scale = step / math.sqrt(2.0 * math.pi)
    with np.errstate(under="ignore", over="ignore"):
        if peak > 3.0:
            result = peak + math.log(scale * float(np.exp(exponent - peak).sum()))
            size = order * abs(float(log_density[best])) + float(half_square[best])
            return result * (1.0 + 1e-12) + 32.0 * _EPS * size
        excess = forward_excess if forward else reverse_excess
        total = float(excess(log_density, half_square, np.asarray(order - 1.0)).sum())
    result = math.log1p(scale * total)
    size = order * order / (order - 1.0) * (45.0 - min(0.0, math.log(mean)))
    return result * (1.0 + 2e-12 + 4.0 * _EPS * size)
