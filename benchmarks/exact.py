"""Slow exact values that `soundness.py` holds the bounds against; nothing here calls opacus_pil.

Integrals: adaptive Gauss–Legendre panels in 80-bit floats (64-bit mantissa), good to about 1e-16
relatively; sums and closed forms: mpmath. A file of truths knows no bound and no tolerance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np

Long = np.longdouble
_LOG_ROOT_2PI = Long(0.5) * np.log(2 * np.arccos(Long(-1)))


def require_extended_precision() -> None:
    if np.finfo(Long).eps > 2e-19:
        raise SystemExit(
            "Expected 80-bit long doubles (x86), got 64-bit ones. Use another machine."
        )


# --- integrals -----------------------------------------------------------------------------------


@functools.cache
def _legendre(count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights to 64 bits, by Newton's method from double-precision starts."""
    x = np.polynomial.legendre.leggauss(count)[0].astype(Long)
    for _ in range(3):
        before, value = np.ones_like(x), x
        for k in range(2, count + 1):
            before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
        slope = count * (x * value - before) / (x * x - 1)
        x = x - value / slope
    return x, 2 / ((1 - x * x) * slope * slope)


def integrate(function: Callable[[Any], Any], edges: Any, *, noise: float = 0.0) -> Any:
    """Integral over [edges[0], edges[-1]]; panels are halved until halving changes nothing.

    `noise`: relative rounding error of the function's values, below which nothing is resolved.
    """
    nodes, weights = _legendre()

    def panels(low: Any, high: Any) -> Any:
        half, middle = (high - low) / 2, (high + low) / 2
        values = function((middle[:, None] + half[:, None] * nodes).ravel())
        return half * (values.reshape(len(low), -1) @ weights)

    points = np.unique(np.asarray(edges, dtype=Long))
    low, high = points[:-1], points[1:]
    whole, total = panels(low, high), Long(0)
    for _ in range(60):
        middle = (low + high) / 2
        left, right = panels(low, middle), panels(middle, high)
        size = np.abs(total) + np.abs(whole).sum()
        change = np.abs(left + right - whole)
        rough = change > np.maximum(1e-17 / math.sqrt(len(low)) * size, noise * np.abs(whole))
        total += (left + right)[~rough].sum()
        if not rough.any():
            return total
        low, high = (
            np.concatenate([low[rough], middle[rough]]),
            np.concatenate([middle[rough], high[rough]]),
        )
        whole = np.concatenate([left[rough], right[rough]])
    raise ArithmeticError("the integral did not settle")


# --- one step ------------------------------------------------------------------------------------


class Mixture:
    """Σ p_k·N(m_k, 1) against N(0, 1): m_0 = 0 < m_1 < …, all p_k > 0."""

    def __init__(self, shifts: Sequence[float], masses: Sequence[Any]) -> None:
        self.shifts = np.asarray(shifts, dtype=Long)
        self.masses = np.asarray(masses, dtype=Long)

    @classmethod
    def of_step(cls, shift: float, rate: float) -> Mixture:
        return cls([0.0, shift], [1 - Long(rate), Long(rate)])

    @classmethod
    def of_members(cls, shifts: Sequence[float], rate: float) -> Mixture:
        """Law of the sum of the drawn members' shifts, by listing the subsets."""
        law = {Long(0): Long(1)}
        for shift in shifts:
            drawn: dict[Any, Any] = {}
            for total, mass in law.items():
                for moved, part in ((total, 1 - Long(rate)), (total + Long(shift), Long(rate))):
                    drawn[moved] = drawn.get(moved, Long(0)) + mass * part
            law = drawn
        atoms = sorted(law)
        return cls(atoms, [law[atom] for atom in atoms])

    def log_density(self, t: Any) -> Any:
        """L = log of mixture over N(0, 1), with an absolute error of a few ulps."""
        exponent = np.log(self.masses) + self.shifts * (t[:, None] - self.shifts / 2)
        peak = exponent.max(axis=1)
        return peak + np.log(np.exp(exponent - peak[:, None]).sum(axis=1))

    def excess(self, t: Any, power: Any) -> Any:
        """((1+u)^power − 1 − power·u)·exp(−t²/2), u = e^L − 1, every digit right for small u."""
        x = self.shifts * (t[:, None] - self.shifts / 2)
        u = np.expm1(np.minimum(x, 1000)) @ self.masses
        half_square = t * t / 2
        near = np.abs(u) * (np.abs(power) + 2) < 0.05
        small = np.where(near, u, 0)
        series = np.zeros_like(u)
        for k in range(14, 2, -1):
            series = (power - k + 1) * small / k * (1 + series)
        result = power * (power - 1) / 2 * small * small * (1 + series) * np.exp(-half_square)
        logs = self.log_density(t[~near])
        u, half_square = u[~near], half_square[~near]
        logs = np.where(np.abs(u) < 0.5, np.log1p(np.clip(u, -0.5, 0.5)), logs)
        weight = np.exp(-half_square)
        grown = np.exp(logs - half_square)  # (1+u)·exp(−t²/2)
        drift = np.where(logs > 500, grown - weight, np.where(logs > 500, 0, u) * weight)
        if power > 1:  # (1+u)·((1+u)^gap − 1) − gap·u
            tilted = (power - 1) * logs
            far = np.exp(np.where(tilted > 1, power * logs, 0) - half_square) - grown
            far = np.where(tilted > 1, far, grown * np.expm1(np.minimum(tilted, 1)))
            result[~near] = far - (power - 1) * drift
        else:
            tilted = np.exp(np.maximum(power * logs, 1) - half_square) - weight
            far = np.where(power * logs > 1, tilted, weight * np.expm1(np.minimum(power * logs, 1)))
            result[~near] = far - power * drift
        return result

    def edges(self, order: float, *, forward: bool) -> Any:
        """Panels: fine near every mode and every change of the dominant component."""
        shifts = self.shifts.astype(float)
        power = order if forward else 1.0 - order
        top = float(shifts[-1])
        low = -16.0 if forward else -16.0 + self._reverse_peak(order)
        high = (max(order, 2.0) * top if forward else 2.0 * top) + 16.0  # u² tilts by 2·top
        grid = np.linspace(low, high, 8001)
        exponent = power * self.log_density(grid.astype(Long)).astype(float) - grid * grid / 2
        inner = np.flatnonzero((exponent[1:-1] >= exponent[:-2]) & (exponent[1:-1] >= exponent[2:]))
        keys = [0.0, *grid[inner + 1][:40], *(shifts / 2)[:40]]
        keys += [*order * shifts[-40:]] if forward else [self._reverse_peak(order)]
        keys += [*2.0 * shifts[-40:]]
        logs = np.log(self.masses).astype(float)
        for k in range(1, min(len(shifts), 40)):
            gap = shifts[k] - shifts[k - 1]
            keys.append((shifts[k] + shifts[k - 1]) / 2 + (logs[k - 1] - logs[k]) / gap)
        spread = np.geomspace(1e-4, 40.0, 16)
        near = np.add.outer(np.array(keys), np.concatenate([-spread, [0.0], spread])).ravel()
        near = near[(near > low) & (near < high)]
        return np.concatenate([[low, high], np.linspace(low, high, 65), near])

    def divergence(self, order: float, *, forward: bool) -> Any:
        """D of the mixture from N(0, 1) (forward) or back, as a long double."""
        power = Long(order) if forward else 1 - Long(order)
        edges = self.edges(order, forward=forward)
        points = edges.astype(Long)
        exponent = power * self.log_density(points) - points * points / 2
        best = exponent.argmax()
        peak, size = exponent[best], np.abs(exponent[best]) + points[best] ** 2 + 100
        moment = integrate(
            lambda t: np.exp(power * self.log_density(t) - t * t / 2 - peak),
            edges,
            noise=float(8 * np.finfo(Long).eps * size),
        )
        log_moment = np.log(moment) + peak - _LOG_ROOT_2PI
        if log_moment < 1:
            total = integrate(lambda t: self.excess(t, power), edges)
            log_moment = np.log1p(total / np.exp(_LOG_ROOT_2PI))
        return log_moment / (Long(order) - 1)

    def _reverse_peak(self, order: float) -> float:
        """Where the log-concave (1+u)^(1−order)·φ is largest."""
        shifts, logs = self.shifts.astype(float), np.log(self.masses).astype(float)

        def rises(t: float) -> bool:
            exponent = logs + shifts * (t - shifts / 2)
            weights = np.exp(exponent - exponent.max())
            return -t - (order - 1) * float(weights @ shifts / weights.sum()) > 0

        low, high = -(order - 1) * float(shifts[-1]) - 1.0, 0.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if rises(middle) else (low, middle)
        return low


def step_divergence(shift: float, order: float, rate: float, *, forward: bool) -> Any:
    """D of (1−q)·N(0,1) + q·N(shift,1) from N(0,1), or back."""
    if rate == 1.0:
        return Long(order) * Long(shift) ** 2 / 2
    return Mixture.of_step(shift, rate).divergence(order, forward=forward)


def binomial_divergence(shift: Any, order: int, rate: Any) -> Any:
    """D(mixture ‖ N(0,1)) at an integer order: a sum of positive terms, in 40 digits."""
    with mpmath.workdps(40):
        q, square = mpmath.mpf(rate), mpmath.mpf(shift) ** 2
        if q == 1:
            return order * square / 2
        weight, total = (1 - q) ** order, mpmath.mpf(0)
        for i in range(1, order + 1):
            weight *= q / (1 - q) * (order - i + 1) / i
            total += weight * mpmath.expm1(i * (i - 1) * square / 2)
        return mpmath.log1p(total) / (order - 1)
