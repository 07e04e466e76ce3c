"""Moments of a chain whose batches are random: hiding the shift by a plan that looks at the past.

Every step is taken by itself, with the resolution of the releases that computed ε this way: files
of theirs rest on it. `block_plan` is faster and mostly sharper.

Two runs are z apart. A step multiplies z by a random factor c, adds a random shift s, and its noise
hides a part a of the result at the price κa², κ = α(α−1)/2 in units of the noise; at the end z must
be 0. `log_moment` bounds log E exp(Σ κa²) for the best plan in which a depends on the coins up to
its step. Such a plan is feasible whatever the coins are, so its cost is at least the lower hull's.

The value with t steps to go, L_t(z) = log E exp W(cz + s) with W(z') = min_a κa² + L_{t−1}(z' − a),
is convex and nondecreasing in z: infimal convolution, affine maps and log-sum-exp keep both. Hence,
without rounding z anywhere,
  - values at nodes, interpolated linearly, bound it from above, wherever the nodes lie;
  - any choice of a bounds W from above;
  - a random c or s may be replaced by any law that spreads it without changing its mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .._validate import FloatArray
from .batch_laws import RAREST, Law
from .data_processing import DataProcessingCertificate

# Neighbours (in α − 1) are a factor 1.5 apart: the best of them is within 2 % of the best order.
_ORDERS = 1.0 + np.geomspace(0.1, 1200.0, 24)
_COUNTED = 2_000  # unlearning steps with random factors; the rest is data processing
_NEAR, _FAR = 256, 64  # nodes where z usually is, and up to where it can get
_SMALLEST = 1e-200  # smaller coefficients are taken as this, so that no quotient is 0/0
# Relative and, above 1, absolute; covers the probabilities (1e-13) and a step's dozen roundings.
_STEP_ROUNDING = 4e-12


def step_by_step_curve(
    orders: Sequence[float],
    *,
    factors: Law,
    shifts: Law,
    training_steps: int,
    unlearning_steps: int,
) -> FloatArray:
    """Bound on the Rényi divergence in nats at `orders`, interpolated between two dozen orders."""
    if len(factors.values) > 1:
        unlearning_steps = min(unlearning_steps, _COUNTED)
    moment = log_moment(
        _ORDERS,
        factors=factors,
        shifts=shifts,
        training_steps=training_steps,
        unlearning_steps=unlearning_steps,
    )
    curve = DataProcessingCertificate((moment / (_ORDERS - 1.0)).tolist(), _ORDERS.tolist())
    return curve.rdp(orders, steps=0)


def log_moment(
    orders: FloatArray, *, factors: Law, shifts: Law, training_steps: int, unlearning_steps: int
) -> FloatArray:
    """Upper bound on log E exp(α(α−1)μ²/2) from distance 0, shape (orders,).

    `shifts` in units of the noise, drawn at each training step; none at an unlearning step.
    """
    kappa = orders * (orders - 1.0) / 2.0
    if training_steps == 0 or shifts.values[-1] == 0.0:
        return np.zeros_like(kappa)
    nodes = _nodes(factors, shifts, training_steps)
    top = max(1.0, factors.values[-1]) * nodes[-1] + shifts.values[-1]
    if not float(kappa.max()) * top * top < 1e290:
        return np.full_like(kappa, math.inf)
    value = _unlearning(kappa, nodes, factors, unlearning_steps)
    step = _Step(nodes, factors, shifts)
    for _ in range(training_steps):
        value = step.back(value, kappa)
    assert value is not None
    return value[:, 0]  # nodes[0] = 0


def _nodes(factors: Law, shifts: Law, steps: int) -> FloatArray:
    """Nodes in z: dense where it usually is without hiding, sparse up to where it can get."""
    mean, largest = factors.mean, factors.values[-1]
    usual = shifts.mean * _powers(mean, steps)
    usual += 8.0 * math.sqrt(shifts.variance * _powers(mean * mean, steps)) + shifts.values[-1]
    far = shifts.values[-1] * _powers(largest, steps) if largest < 1.0 else 30.0 * usual
    near = np.linspace(0.0, usual, _NEAR)
    return np.append(near, np.geomspace(usual, max(far, 1.01 * usual), _FAR)[1:])


def _powers(factor: float, steps: int) -> float:
    """Σ_{j<steps} factor^j, at most steps: growing chains are cut off."""
    if factor >= 1.0:
        return float(steps)
    return -math.expm1(steps * math.log(factor)) / (1.0 - factor) if factor > 0.0 else 1.0


def _unlearning(
    kappa: FloatArray, nodes: FloatArray, factors: Law, steps: int
) -> FloatArray | None:
    """Value (orders, nodes) with `steps` unlearning steps to go; None: z must be 0 already."""
    if steps == 0:
        return None
    if len(factors.values) == 1:
        c = float(factors.values[0])
        # κ/Σ_{j=1..K} c^(−2j): the lower hull of a distance
        log_power = 2.0 * steps * math.log(c) if c > 0.0 else -math.inf
        if log_power < 0.0:
            share = (1.0 - c) * (1.0 + c) * math.exp(log_power) / -math.expm1(log_power)
        else:
            share = (c - 1.0) * (c + 1.0) / -math.expm1(-log_power) if c > 1.0 else 1.0 / steps
        return kappa[:, None] * max(share * (1.0 + 1e-12), _SMALLEST) * nodes**2
    # z shrinks from step to step: the nodes shrink along, by the mean factor.
    shrink = min(1.0, max(factors.mean, 0.05))
    step = _Step(nodes, Law(factors.values / shrink, factors.weights), Law(np.zeros(1), np.ones(1)))
    value: FloatArray | None = None
    for number in range(steps, 0, -1):
        value = step.back(value, kappa * max(shrink ** (2 * number), _SMALLEST))
    return value


class _Step:
    """A step's law on fixed nodes, ready to be taken back from one value function to the next."""

    def __init__(self, nodes: FloatArray, factors: Law, shifts: Law) -> None:
        self.nodes, self.widths = nodes, np.diff(nodes)
        reached = factors.values[:, None, None] * nodes + shifts.values[:, None]
        self.reached = reached.reshape(-1, len(nodes))  # (coins, nodes)
        pairs = factors.weights[:, None] * shifts.weights
        self.weights = np.maximum(pairs, RAREST).reshape(-1)
        # W is computed on the nodes and a few points beyond, and interpolated: it is convex, too.
        end = max(float(self.reached.max()), nodes[-1]) * 1.01
        self.points = np.append(nodes, np.geomspace(nodes[-1], end, 5)[1:])
        self.left = np.searchsorted(self.points, self.reached, side="right") - 1
        self.share = (self.reached - self.points[self.left]) / np.diff(self.points)[self.left]

    def back(self, value: FloatArray | None, kappa: FloatArray) -> FloatArray:
        """Value (orders, nodes) before this step from the value after it."""
        if value is None:  # the last step: everything is hidden now
            cost = kappa[:, None, None] * self.reached**2
        else:
            hidden = self._hidden(value, kappa)
            low = hidden[:, self.left]
            cost = low + self.share * (hidden[:, self.left + 1] - low)
        return _log_mean_exp(cost, self.weights)

    def _hidden(self, value: FloatArray, kappa: FloatArray) -> FloatArray:
        """W (orders, points): what remains after the best a, and a's price."""
        # W's best rest y = z' − a has 2κa equal to a slope of L there: y stays on a node while z'
        # crosses a jump of the slope, and moves along between nodes. In units of node numbers:
        slopes = np.diff(value) / self.widths / (2.0 * kappa[:, None])
        knots = np.zeros((len(kappa), 2 * len(self.nodes)))
        knots[:, 1:-1:2], knots[:, 2:-1:2] = self.nodes[:-1] + slopes, self.nodes[1:] + slopes
        numbers = np.repeat(np.arange(len(self.nodes), dtype=np.float64), 2)
        # All orders in one call, side by side; inaccurate knots only make the choice of a worse.
        knots[:, -1] = max(float(knots.max()), float(self.points[-1]))
        beside = np.arange(len(kappa))[:, None] * (1.5 * knots[0, -1])
        place = np.interp(
            (self.points + beside).reshape(-1),
            np.maximum.accumulate((knots + beside).reshape(-1)),
            np.tile(numbers, len(kappa)),
        ).reshape(len(kappa), len(self.points))
        left = np.minimum(place.astype(np.int64), len(self.nodes) - 2)
        share = place - left
        rest = self.nodes[left] + share * self.widths[left]
        row = np.arange(len(kappa))[:, None]
        low = value[row, left]
        kept = low + share * (value[row, left + 1] - low)
        return kept + kappa[:, None] * (self.points - rest) ** 2


def _log_mean_exp(cost: FloatArray, weights: FloatArray) -> FloatArray:
    """Log Σ_k weights[k]·e^cost[:, k], rounded up."""
    largest = cost.max(axis=1)
    small = largest < 1.0
    result = np.empty_like(largest)
    if small.any():
        result = np.log1p(weights @ np.expm1(np.minimum(cost, 1.0))) * (1.0 + _STEP_ROUNDING)
    if not small.all():
        weighted = cost + np.log(weights)[:, None]
        shift = weighted.max(axis=1)
        far = shift + np.log(np.exp(weighted - shift[:, None]).sum(axis=1))
        far = far * (1.0 + _STEP_ROUNDING) + largest * _STEP_ROUNDING
        result = np.where(small, result, far)
    return result
