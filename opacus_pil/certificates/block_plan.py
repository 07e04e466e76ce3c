"""Moments of a chain whose batches are random, over blocks of steps instead of single ones.

Two runs are z apart, in units of the noise. A step multiplies z by a factor c, adds a random shift
s, and its noise hides a part a of the result at the price κa², κ = α(α−1)/2; in the end z must be
0. L(z) is log E exp Σ κa² of the best plan for the steps that remain which knows past coins only;
any other such plan bounds it. `BlockPlan` goes from the last step to the first:

A single step knows its own coins: L(z) <= log E exp W(cz + s), W(z') = min_a κa² + L'(z' − a). The
last steps of training are taken one by one, and all of them where the factor is random or expands.

A block of m steps with one factor c hides what was there when it starts, and leaves its own shifts
S = Σ c^(m−j) s_j for later: hiding h_j ~ c^(−2j) of the distance at its start in its step j hides A
at its end at the price κA²/Σ_{i<m} c^(2i), and never more than is there. So
L(z) <= min_A κA²/Σ + log E exp L'(c^m·z − A + S). Blocks double in length every so many, seen from
the end: a shift is hidden later than it could be by a small part of the steps that remain.

The least cost is convex and nondecreasing in z, c, s and S (a convex programme of which they are
the right-hand side), and log-sum-exp keeps it so. Hence, without rounding z anywhere,
  - values at nodes, interpolated linearly, bound L from above, wherever the nodes lie;
  - any choice of a or A bounds it from above, and so does the plan of a chain whose every step has
    the largest factor and shift, which has one chord if that factor is at most 1;
  - a random c, s or S may be replaced by any law that spreads it without changing its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .._validate import FloatArray
from .batch_laws import Law
from .log_laws import LogLaw, in_logs, mean_and_deviation, narrowed, summed

# Relative and, above 1, absolute: a dozen roundings a block; those of a step's probabilities, which
# a sum of steps adds up.
_ROUNDING, _OF_A_STEP = 1e-11, 1e-12
STEADY = 1.0 + 1e-9  # the largest factor of a chain that hardly expands
_KEPT = 300  # values of a block's shift
_SMALLEST = 1e-200  # smaller prices are taken as this, so that no quotient is 0/0
_LEAST = 1e-280  # smaller moments are taken as this: what underflows is not nothing

# From the steps of training that remain: factor, shift and variance of a chain with one chord.
Chord = Callable[[int], tuple[float, float, float]]


class Resolution(NamedTuple):
    """How fine: blocks of each length, values of a shift, nodes where z usually is and beyond."""

    blocks: int
    shifts: int
    near: int
    far: int


class BlockLaws:
    """Laws of the shift in blocks of 1, 2, 4, … steps, in units of the noise."""

    def __init__(self, factors: Law, shifts: Law, *, training_steps: int) -> None:
        self.steps, self.factors = training_steps, factors
        self.shifts = [narrowed(in_logs(shifts), count=_KEPT)]
        self.powers, self.noises = [float(factors.values[-1])], [1.0]

    def up_to(self, exponent: int) -> None:
        """Compute those of 2^exponent steps and all shorter ones."""
        while len(self.powers) <= exponent:
            power, shift = self.powers[-1], self.shifts[-1]
            self.shifts.append(summed(shift, shift, factor=power, count=_KEPT))
            # Powers are rounded up, each doubling of the length doubling the excess; Σ c^(2i) down.
            excess = 4e-15 * 2.0 ** len(self.powers)
            self.noises.append(self.noises[-1] * (1.0 + power * power * (1.0 - excess)))
            self.powers.append(power * power * (1.0 + 1e-15))


class BlockPlan:
    """The plan for one run of training, ready for any orders and any end."""

    def __init__(self, laws: BlockLaws, resolution: Resolution) -> None:
        self._laws, self._resolution = laws, resolution
        if len(laws.factors.values) > 1 or laws.factors.values[-1] > STEADY:  # carried too far
            self._lengths = [(0, laws.steps)]
        else:
            self._lengths = block_lengths(laws.steps, resolution.blocks)
        laws.up_to(max(exponent for exponent, _ in self._lengths))
        self._nodes = self._placed()
        self._widths = np.diff(self._nodes)
        reach = max(float(laws.shifts[exponent].values[-1]) for exponent, _ in self._lengths)
        # A value is known at points a little beyond the nodes: as far as a block's shift leads.
        self.points = _continued(self._nodes, self._nodes[-1] + reach)
        self._single = self._single_step()
        self._blocks = {e: self._block(e) for e, _ in self._lengths if e > 0}
        starts = [float(block.starts[-1]) for block in self._blocks.values()]
        self._top = max(*starts, float(self._single.ends[-1]), float(self.points[-1]))

    def log_moment(
        self, kappa: FloatArray, *, left: FloatArray | None, chord: Chord | None
    ) -> FloatArray:
        """Upper bound on log E exp(Σ κa²) from distance 0, shape (orders,).

        Args:
            kappa: (orders,) prices.
            left: (orders, points) value where training ends; None: z must be 0 there.
            chord: Of the chain whose every step has the largest factor and shift; None: it is not
                known to have one.
        """
        if not float(kappa.max()) * self._top * self._top < 1e290:
            return np.full_like(kappa, math.inf)
        value, done = left, 0
        for exponent, count in self._lengths:
            for _ in range(count):
                done += 2**exponent
                if exponent == 0:
                    value = self._before_step(value, kappa)
                else:
                    assert value is not None  # the last blocks are single steps
                    value = self._before_block(value, kappa, self._blocks[exponent])
                if chord is not None:
                    factor, shift, variance = chord(done)
                    worst = (factor * self.points + shift) ** 2 / variance * (1.0 + 1e-12)
                    value = np.minimum(value, kappa[:, None] * worst)
        assert value is not None
        return np.maximum(value[:, 0], _LEAST)  # nodes[0] = 0

    def _placed(self) -> FloatArray:
        """Nodes in z: dense where it usually is without hiding, sparse up to where it can get."""
        steps, factors = self._laws.steps, self._laws.factors
        expected, largest = factors.mean, float(factors.values[-1])
        mean, deviation = mean_and_deviation(self._laws.shifts[0])
        top = float(self._laws.shifts[0].values[-1])
        usual = mean * _powers(expected, steps) + top
        usual += 8.0 * deviation * math.sqrt(_powers(expected * expected, steps))
        far = 30.0 * usual if largest > 1.0 + 1e-9 else top * _powers(largest, steps)
        near = usual * np.linspace(0.0, 1.0, self._resolution.near) ** 2
        beyond = np.geomspace(usual, max(far, 1.01 * usual), self._resolution.far + 1)[1:]
        return np.append(near, beyond)

    def _single_step(self) -> _Single:
        factors, shifts = in_logs(self._laws.factors), self._shifts(0)
        moved = factors.values[:, None] * self.points
        middle = self.points
        if len(factors.values) > 1:  # the factor's coins, then the shift's
            middle = _continued(self._nodes, float(moved.max()))
            moved_to, before = middle, _Place(middle, moved)
        else:
            moved_to, before = moved[0], None
        reached = moved_to + shifts.values[:, None]
        ends = _continued(self._nodes, float(reached.max()))
        return _Single(factors, before, shifts, _Place(ends, reached), ends)

    def _block(self, exponent: int) -> _Block:
        laws, shift = self._laws, self._shifts(exponent)
        return _Block(
            shift,
            _Place(self.points, self._nodes + shift.values[:, None]),
            laws.powers[exponent] * self.points,
            max((1.0 + 1e-13) / laws.noises[exponent], _SMALLEST),
            _ROUNDING + _OF_A_STEP * 2.0**exponent,
        )

    def _shifts(self, exponent: int) -> LogLaw:
        law = self._laws.shifts[exponent]
        return narrowed(law, count=self._resolution.shifts, below=4.0, above=8.0)

    def _before_step(self, value: FloatArray | None, kappa: FloatArray) -> FloatArray:
        """Value (orders, points) before a single step from the value after it."""
        single = self._single
        if value is None:  # the last step: everything is hidden now
            hidden = kappa[:, None] * single.ends**2
        else:
            hidden = self._hidden(value[:, : len(self._nodes)], kappa, single.ends)
        drawn = _log_mean_exp(single.after_shift.at(hidden), single.shift, rounding=_ROUNDING)
        if single.after_factor is None:
            return drawn
        return _log_mean_exp(single.after_factor.at(drawn), single.factor, rounding=_ROUNDING)

    def _before_block(self, value: FloatArray, kappa: FloatArray, block: _Block) -> FloatArray:
        """Value (orders, points) before a block from the value after it."""
        later = _log_mean_exp(block.place.at(value), block.shift, rounding=block.rounding)
        return self._hidden(later, kappa * block.price, block.starts)

    def _hidden(self, value: FloatArray, price: FloatArray, distances: FloatArray) -> FloatArray:
        """W (orders, distances): least sum of price·a² and what value (orders, nodes) keeps."""
        # W's best rest y = z' − a has 2·price·a equal to a slope of the value there: y stays on a
        # node while z' crosses a jump of the slope, and moves along between nodes. In nodes:
        nodes, orders = self._nodes, len(value)
        slopes = np.diff(value) / self._widths / (2.0 * price[:, None])
        knots = np.zeros((orders, 2 * len(nodes)))
        knots[:, 1:-1:2], knots[:, 2:-1:2] = nodes[:-1] + slopes, nodes[1:] + slopes
        numbers = np.repeat(np.arange(len(nodes), dtype=np.float64), 2)
        knots[:, -1] = max(float(knots.max()), float(distances[-1]))
        # All orders in one call, side by side; inaccurate knots only make the choice of a worse.
        beside = np.arange(orders)[:, None] * (1.5 * knots[0, -1])
        place = np.interp(
            (distances + beside).reshape(-1),
            np.maximum.accumulate((knots + beside).reshape(-1)),
            np.tile(numbers, orders),
        ).reshape(orders, len(distances))
        left = np.minimum(place.astype(np.int64), len(nodes) - 2)
        share = place - left
        rest = nodes[left] + share * self._widths[left]
        row = np.arange(orders)[:, None]
        low = value[row, left]
        kept = low + share * (value[row, left + 1] - low)
        return kept + price[:, None] * (distances - rest) ** 2


def block_lengths(steps: int, blocks: int) -> list[tuple[int, int]]:
    """Cut `steps` into blocks of 2^exponent steps, (exponent, count) from the last to the first.

    `blocks` of each length, as long as there are enough steps; the rest in falling lengths.

    >>> block_lengths(23, 4)
    [(0, 4), (1, 4), (2, 2), (1, 1), (0, 1)]
    """
    found: list[tuple[int, int]] = []
    exponent = 0
    while steps >> exponent >= blocks:
        found.append((exponent, blocks))
        steps -= blocks << exponent
        exponent += 1
    for lower in range(exponent, -1, -1):
        if steps >> lower:
            found.append((lower, steps >> lower))
            steps -= (steps >> lower) << lower
    return found


class _Single(NamedTuple):
    """Coins of a step and where they lead; None: one factor, which is in `after_shift`."""

    factor: LogLaw
    after_factor: _Place | None
    shift: LogLaw
    after_shift: _Place
    ends: FloatArray  # points of W


class _Block(NamedTuple):
    """Coins of a block, where they lead, and the price of hiding."""

    shift: LogLaw
    place: _Place
    starts: FloatArray  # (points,) where z would be without hiding and shifts
    price: float
    rounding: float


class _Place:
    """Where values lie between points, for interpolation."""

    def __init__(self, points: FloatArray, values: FloatArray) -> None:
        self._left = np.clip(np.searchsorted(points, values, side="right") - 1, 0, len(points) - 2)
        self._share = (values - points[self._left]) / np.diff(points)[self._left]

    def at(self, known: FloatArray) -> FloatArray:
        """Interpolate (orders, points) to (orders, *values)."""
        low = np.take(known, self._left, axis=-1)
        found = np.take(known, self._left + 1, axis=-1)
        found -= low
        found *= self._share
        found += low
        return found


def _continued(nodes: FloatArray, end: float) -> FloatArray:
    """Nodes, and some points beyond up to `end`."""
    last = float(nodes[-1])
    return np.append(nodes, np.geomspace(last, max(end, last) * 1.01, 6)[1:])


def _powers(factor: float, steps: int) -> float:
    """Σ_{j<steps} factor^j, at most steps: growing chains are cut off."""
    if factor >= 1.0:
        return float(steps)
    return -math.expm1(steps * math.log(factor)) / (1.0 - factor) if factor > 0.0 else 1.0


def _log_mean_exp(cost: FloatArray, coins: LogLaw, *, rounding: float) -> FloatArray:
    """Log Σ_k p_k·e^cost[:, k], rounded up; cost (orders, coins, places)."""
    if len(coins.logs) == 1:
        return cost[:, 0]
    largest = cost.max(axis=1)
    small = largest < 1.0
    result = np.empty_like(largest)
    places = np.arange(small.shape[1])
    some = int(places[small.any(axis=0)].max(initial=-1)) + 1
    every = int(places[~small.all(axis=0)].min(initial=len(places)))
    if some:
        near = np.expm1(np.minimum(cost[:, :, :some], 1.0))
        result[:, :some] = np.log1p(coins.weights @ near) * (1.0 + rounding)
    if every < len(places):
        weighted = cost[:, :, every:] + coins.logs[:, None]
        shift = weighted.max(axis=1)
        weighted -= shift[:, None]
        far = shift + np.log(np.exp(weighted, out=weighted).sum(axis=1))
        far = far * (1.0 + rounding) + largest[:, every:] * rounding
        result[:, every:] = np.where(small[:, every:], result[:, every:], far)
    return result
