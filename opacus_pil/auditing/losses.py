"""Privacy losses of noisy steps on a lattice, composed: from above, or from below.

One step's losses are exact up to their places on the lattice: from above, each cell's probability
under both neighbours is kept (connect the dots); from below, each loss is rounded down. Knows one
step's noise and rate; no claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import fftconvolve
from scipy.special import ndtr

from .._validate import FloatArray

ADD_REMOVE, REPLACE = "add_remove", "replace"
_REACH = 9.3  # standard deviations: beyond is a mass of 1e-20
_FARTHEST = 690.0  # nats; e to more than this is too large a number
_TAIL = 1e-15  # mass that a composition may cut off on each side


@dataclass(frozen=True)
class LossLaw:
    """Law of the privacy loss of one direction, under the first of both neighbours.

    Attributes:
        masses: Shape (points,), at losses (lower + i) · spacing.
        lower: Place of the first loss.
        spacing: In nats, > 0.
        infinite: Mass of an infinite loss; 0 only in laws from below.
    """

    masses: FloatArray
    lower: int
    spacing: float
    infinite: float

    @property
    def losses(self) -> FloatArray:
        """Shape (points,), in nats."""
        places = np.arange(len(self.masses), dtype=np.float64) + self.lower
        return np.asarray(places * self.spacing, dtype=np.float64)

    def repeated(self, count: int) -> LossLaw:
        """Return the law of the sum of `count` such losses."""
        if count == 1:
            return self
        low, high = _window(self.masses, count)
        size = next_fast_len(max(high - low + 1, len(self.masses)), real=True)
        whole = irfft(rfft(self.masses, size) ** count, size)  # wraps around beyond the window
        masses = np.roll(whole, -low)[: high - low + 1]
        infinite = 0.0  # from below a tail that is cut off counts for nothing
        if self.infinite > 0:
            infinite = _TAIL - math.expm1(count * math.log1p(-self.infinite))
        return LossLaw(np.maximum(masses, 0.0), self.lower * count + low, self.spacing, infinite)

    def plus(self, other: LossLaw) -> LossLaw:
        """Return the law of the sum with another loss on the same lattice."""
        masses = np.maximum(fftconvolve(self.masses, other.masses), 0.0)
        infinite = self.infinite + other.infinite - self.infinite * other.infinite
        return LossLaw(masses, self.lower + other.lower, self.spacing, infinite)

    def deltas(self, epsilons: FloatArray) -> FloatArray:
        """Return E[(1 − e^{ε−L})⁺] at each ε."""
        upper, lower = self._tails()
        first = np.searchsorted(self.losses, epsilons, side="right")
        gain = upper[first] - np.exp(epsilons) * lower[first]
        return np.maximum(gain, 0.0) + self.infinite

    def epsilon(self, delta: float) -> float:
        """Return the least ε >= 0 with δ(ε) <= δ. May be inf."""
        if delta <= self.infinite:
            return math.inf
        upper, lower = self._tails()
        losses = self.losses
        gain = upper[:-1] + self.infinite  # δ at each loss
        seen = (lower[:-1] > 0) & (losses < _FARTHEST)
        gain[seen] -= np.exp(losses[seen]) * lower[:-1][seen]
        place = int(np.argmax(gain <= delta)) if (gain <= delta).any() else len(gain) - 1
        # δ(ε) = upper − e^ε·lower with the tails from that place on.
        above, weight = float(upper[place]) + self.infinite - delta, float(lower[place])
        if above <= 0 or weight <= 1e-300:  # between two places; rounded as the law is
            place = place if self.infinite > 0 else max(place - 1, 0)
            return max(float(losses[place]), 0.0)
        return max(math.log(above) - math.log(weight), 0.0)

    def _tails(self) -> tuple[FloatArray, FloatArray]:
        """Masses from each place on, under both neighbours."""
        other = self.masses * np.exp(np.minimum(-self.losses, _FARTHEST))
        return _from_the_end(self.masses), _from_the_end(other)


def _from_the_end(values: FloatArray) -> FloatArray:
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])


def step_laws(
    noise: float, rate: float, *, spacing: float, above: bool, neighbours: str = ADD_REMOVE
) -> tuple[LossLaw, ...]:
    """Return the laws of one Poisson-sampled Gaussian step of sensitivity 1, one a direction.

    Args:
        noise: Noise multiplier, > 0.
        rate: Sampling rate, in (0, 1].
        spacing: Of the lattice, in nats.
        above: δ from above at every ε; otherwise from below.
        neighbours: "add_remove" gives two laws, with against without first; "replace" one.

    Source: (1−q)N(0, z²) + qN(1, z²) against N(0, z²), against (1−q)N(0, z²) + qN(−1, z²) for an
        exchanged instance; Doroshenko et al. (2022), arXiv:2207.04380, for the dots.
    """
    lossy = _replace_loss if neighbours == REPLACE else _remove_loss
    low, high = -_REACH * noise, 1.0 + _REACH * noise
    if neighbours == REPLACE:
        low = -1.0 - _REACH * noise
    first = math.floor(lossy.loss(low, noise, rate) / spacing)
    last = math.ceil(lossy.loss(high, noise, rate) / spacing)
    points = np.arange(first, last + 1)
    edges = lossy.inverse(np.asarray(points * spacing, dtype=np.float64), noise, rate)
    with_it, without = lossy.cells(edges, noise, rate)
    laws = [_on_lattice(with_it, without, points, spacing, above=above)]
    if neighbours == ADD_REMOVE:
        # The other direction's loss is the negative: the same cells, in reverse order.
        laws.append(_on_lattice(without[::-1], with_it[::-1], -points[::-1], spacing, above=above))
    return tuple(laws)


def _on_lattice(
    first: FloatArray, second: FloatArray, points: Any, spacing: float, *, above: bool
) -> LossLaw:
    """Put the cells' masses on the lattice.

    Args:
        first: Shape (points + 1,), mass of the first neighbour below, between and above the edges.
        second: The same of the second neighbour.
        points: Losses at the edges / spacing, ascending.
        spacing: Of the lattice.
        above: Keep both masses of each cell, or round losses down.
    """
    a, b = first[1:-1], second[1:-1]
    masses = np.zeros(len(points))
    if not above:
        masses[:-1] = a  # of the part below the first edge nothing is counted
        masses[-1] = first[-1]
        return LossLaw(masses, int(points[0]), spacing, 0.0)
    # u at the left and v at the right edge with u + v = a, u·e^{−l} + v·e^{−r} = b.
    left = np.minimum(points[:-1] * spacing, _FARTHEST)  # beyond, b is nothing
    right = (a - b * np.exp(left)) / -math.expm1(-spacing)
    right = np.clip(right, 0.0, a)
    masses[1:] += right
    masses[:-1] += a - right
    masses[0] += first[0]
    return LossLaw(masses, int(points[0]), spacing, max(float(first[-1]), 1e-300))


class _Remove:
    """Loss log(1 − q + q·e^{(x − ½)/z²}), ascending in x."""

    @staticmethod
    def loss(x: float, noise: float, rate: float) -> float:
        power = (x - 0.5) / noise**2 + math.log(rate)
        return float(np.logaddexp(math.log1p(-rate), power)) if rate < 1 else power

    @staticmethod
    def inverse(losses: FloatArray, noise: float, rate: float) -> FloatArray:
        """Where the loss is so large; −inf below its least value log(1 − q)."""
        if rate == 1:
            return np.asarray(0.5 + noise**2 * losses)
        with np.errstate(over="ignore"):
            ratio = np.expm1(losses) + rate
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            far = losses + np.log1p(-(1.0 - rate) * np.exp(-losses)) - math.log(rate)
            near = np.log(ratio / rate)
            found = np.where(losses > 1.0, far, near)
        return np.where(ratio > 0, 0.5 + noise**2 * found, -np.inf)

    @staticmethod
    def cells(edges: FloatArray, noise: float, rate: float) -> tuple[FloatArray, FloatArray]:
        out = _cells(edges / noise)
        return (1.0 - rate) * out + rate * _cells((edges - 1.0) / noise), out


class _Replace:
    """Loss log of (1−q)N(0)+qN(1) over (1−q)N(0)+qN(−1): odd and ascending in x."""

    @staticmethod
    def loss(x: float, noise: float, rate: float) -> float:
        return _Remove.loss(x, noise, rate) - _Remove.loss(-x, noise, rate)

    @staticmethod
    def inverse(losses: FloatArray, noise: float, rate: float) -> FloatArray:
        # With u = e^{x/z²}, c = q·e^{−1/2z²}: c·u² − (1−q)(e^l − 1)·u − c·e^l = 0; for l >= 0.
        size = np.abs(losses)
        log_c = math.log(rate) - 0.5 / noise**2
        with np.errstate(over="ignore"):
            half = 0.5 * (1.0 - rate) * -np.expm1(-size)  # divided by e^l
        # u = (half + sqrt(half² + c²·e^{−l}))·e^l / c
        root = half + np.sqrt(half**2 + np.exp(2.0 * log_c - size))
        return np.sign(losses) * noise**2 * (np.log(root) + size - log_c)

    @staticmethod
    def cells(edges: FloatArray, noise: float, rate: float) -> tuple[FloatArray, FloatArray]:
        out = (1.0 - rate) * _cells(edges / noise)
        return (
            out + rate * _cells((edges - 1.0) / noise),
            out + rate * _cells((edges + 1.0) / noise),
        )


_remove_loss, _replace_loss = _Remove, _Replace


def _cells(edges: FloatArray) -> FloatArray:
    """Masses of a standard normal below, between and above edges, without cancellation."""
    positive = edges > 0
    left, right = ndtr(edges), ndtr(-edges)
    between = np.where(
        positive[:-1], right[:-1] - right[1:], left[1:] - left[:-1]
    )  # from the nearer tail
    return np.concatenate([left[:1], np.maximum(between, 0.0), right[-1:]])


def _window(masses: FloatArray, count: int) -> tuple[int, int]:
    """Return places of the sum of `count` draws outside of which lies less than _TAIL, by Chernoff.

    The sum's law is a transform that wraps around: what lies outside falls on places inside.
    """
    places = np.arange(len(masses), dtype=np.float64)
    low, high = 0, (len(masses) - 1) * count
    for order in 2.0 ** np.arange(-2.0, 7.0) / len(masses):
        for sign in (1.0, -1.0):
            peak = order * places[-1] if sign > 0 else 0.0
            total = float(masses @ np.exp(sign * order * places - peak))
            bound = (count * (math.log(total) + peak) + math.log(2.0 / _TAIL)) / order
            if sign > 0:
                high = min(high, math.ceil(bound))
            else:
                low = max(low, math.floor(-bound))
    return low, high
