"""Rényi divergences of a run with random batches, and the order that gives the least ε.

Knows the laws of a step's factor and shift, and the numbers of steps; no data and no loss.
"""

from __future__ import annotations

import math

import numpy as np

from .._validate import FloatArray
from ..accounting.rdp import rdp_to_epsilon
from .batch_laws import Law
from .block_plan import STEADY, BlockLaws, BlockPlan, Chord, Resolution
from .hidden_distance import LARGEST, HiddenDistance

FINE, COARSE = Resolution(32, 40, 160, 32), Resolution(8, 20, 64, 16)
# Neighbours (in α − 1) are a factor 1.11 apart: the best of them is within .2 % of the best order.
_ORDERS = 1.0 + np.geomspace(0.1, 1200.0, 93)
CURVE_ORDERS = _ORDERS[::4]  # for curves that are interpolated; within 2 %
_STRIDE = 8  # of the first look for the best order
_RECENT = 256  # steps that a first look considers where each is taken by itself
_LEAST = 1e-150  # smaller shifts are taken as this: their squares would vanish
_COUNTED = 2_000  # unlearning steps with random factors; the rest is data processing


class BatchMoments:
    """What a run with these laws gives away, for any number of unlearning steps.

    Args:
        factors: Law of a step's factor.
        shifts: Law of a training step's shift, in units of the noise; not all 0.
        training_steps: T >= 1.
    """

    def __init__(self, factors: Law, shifts: Law, *, training_steps: int) -> None:
        raised = np.where(shifts.values > 0.0, np.maximum(shifts.values, _LEAST), 0.0)
        shifts = Law(raised, shifts.weights)
        self._laws = laws = BlockLaws(factors, shifts, training_steps=training_steps)
        if len(factors.values) > 1 and training_steps > _RECENT:
            laws = BlockLaws(factors, shifts, training_steps=_RECENT)
        self._sketch = BlockPlan(laws, COARSE)  # no bound: asked only which order may be best
        self._largest = float(factors.values[-1])
        self._shift = float(shifts.values[-1])
        self._hidden = HiddenDistance(factors) if len(factors.values) > 1 else None
        self._plans: dict[Resolution, BlockPlan] = {}

    def rdp(self, orders: FloatArray, *, steps: int, resolution: Resolution = FINE) -> FloatArray:
        """Bound on the Rényi divergence in nats after `steps` unlearning steps, shape (orders,)."""
        return self._curve(self._plan(resolution), orders, steps)

    def _plan(self, resolution: Resolution) -> BlockPlan:
        if resolution not in self._plans:
            self._plans[resolution] = BlockPlan(self._laws, resolution)
        return self._plans[resolution]

    def _curve(self, plan: BlockPlan, orders: FloatArray, steps: int) -> FloatArray:
        if self._hidden is not None:
            steps = min(steps, _COUNTED)
        kappa = orders * (orders - 1.0) / 2.0
        squares = kappa[:, None] * plan.points**2
        if not float(squares.max()) < LARGEST:
            return np.full_like(orders, math.inf)
        moment = plan.log_moment(
            kappa,
            left=self._left(squares, steps) if steps else None,
            chord=self._worst(steps),
        )
        return moment / (orders - 1.0)

    def epsilon(self, *, delta: float, steps: int) -> float:
        """Least ε at `delta` of the orders that a search looks at, the same for all callers."""
        found: dict[int, float] = {}

        def look(places: list[int], plan: BlockPlan) -> int:
            asked = [p for p in places if 0 <= p < len(_ORDERS) and p not in found]
            if asked:
                orders = _ORDERS[asked]
                curve = self._curve(plan, orders, steps)
                for place, order, rdp in zip(asked, orders, curve, strict=True):
                    found[place] = float(rdp_to_epsilon([rdp], orders=[order], delta=delta)[0])
            return min(found, key=found.__getitem__)

        best = look(list(range(0, len(_ORDERS), _STRIDE)), self._sketch)
        found.clear()  # only values of the fine plan are compared, and the least of them is told
        for around in ((-6, -3, 0, 3, 6), (-1, 0, 1)):
            while (better := look([best + k for k in around], self._plan(FINE))) != best:
                best = better
        return found[best]

    def _left(self, squares: FloatArray, steps: int) -> FloatArray:
        """Value (orders, points) of a distance when training ends, from κ·distance²."""
        if self._hidden is not None:
            return self._hidden.at(squares, steps=steps)
        c = self._largest  # κ/Σ_{j=1..K} c^(−2j): the lower hull of a distance
        log_power = 2.0 * steps * math.log(c) if c > 0.0 else -math.inf
        if log_power < 0.0:
            share = (1.0 - c) * (1.0 + c) * math.exp(log_power) / -math.expm1(log_power)
        else:
            share = (c - 1.0) * (c + 1.0) / -math.expm1(-log_power) if c > 1.0 else 1.0 / steps
        return squares * max(share * (1.0 + 1e-12), 1e-200)

    def _worst(self, steps: int) -> Chord | None:
        """Return the chord of the chain whose every step has the largest factor and shift."""
        c = self._largest
        if c == 0.0 or c > STEADY:
            return None
        rate = min(math.log(c), 0.0)

        def chord(training: int) -> tuple[float, float, float]:
            total = training + steps
            if rate == 0.0:  # a factor a little above 1 has to hide (c − 1)·z more at each step
                more = 1.0 + (c - 1.0) * total
                return 1.0, training * self._shift, total / (more * more)
            gathered = -math.expm1(training * rate) / (1.0 - c) * self._shift
            variance = -math.expm1(2.0 * total * rate) / ((1.0 - c) * (1.0 + c))
            return math.exp(total * rate), math.exp(steps * rate) * gathered, variance

        return chord
