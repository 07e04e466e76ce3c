"""What it costs to hide a known distance in the noise of steps whose factors are random.

Knows no shifts: after training the distance x is what is left, each step multiplies it by a random
c, its noise hides a part a at the price a², and at the end it must be 0. For K steps,
U_K(x) = log E exp Σa² under the best plan that knows past factors. A price κ instead of 1 is the
same as a distance √κ·x: one table answers every order, every horizon and every training.

In v = x² the table is exact wherever the cost is that of a fixed plan, because U is convex in v:
U_K = log E exp W(c²v), W(v) = min_y (√v − y)² + U_{K−1}(y²). With the convex conjugate U* of
U_{K−1}, a convex nondecreasing function of v, exchanging min and max gives
W(v) = max_m m/(1 + m)·v − U*(m): convex. Log-sum-exp keeps it so. Values at nodes, interpolated
linearly in v, hence bound U from above.
"""

from __future__ import annotations

import numpy as np

from .._validate import FloatArray
from .batch_laws import Law

LARGEST = 1e40  # squared distance
_NODES = np.append(0.0, np.geomspace(1e-10, LARGEST, 500))
_ROOTS = np.sqrt(_NODES)
_NUMBERS = np.repeat(np.arange(len(_NODES), dtype=np.float64), 2)
_ROUNDING = 4e-12  # relative and, above 1, absolute; a step's dozen roundings


class HiddenDistance:
    """U_1, U_2, … for one law of the factor, computed as they are asked for."""

    def __init__(self, factors: Law) -> None:
        squares = factors.values**2 * (1.0 + 1e-15)
        self._weights = factors.weights
        end = _NODES[-1] * max(1.0, float(squares[-1])) * 1.01
        # W is known beyond the nodes, too: whatever is beyond is hidden now.
        self._points = np.append(_NODES, np.geomspace(_NODES[-1], end, 4)[1:])
        reached = squares[:, None] * _NODES
        self._left = np.searchsorted(self._points, reached, side="right") - 1
        widths = np.diff(self._points)
        self._share = (reached - self._points[self._left]) / widths[self._left]
        self._tables = [self._back(self._points)]  # the last step hides everything

    def at(self, squares: FloatArray, *, steps: int) -> FloatArray:
        """U_steps at these squared distances, which are at most LARGEST; rounded up. steps >= 1."""
        while len(self._tables) < steps:
            self._tables.append(self._back(self._hidden(self._tables[-1])))
        return np.interp(squares, _NODES, self._tables[steps - 1]) * (1.0 + 1e-14)

    def _back(self, hidden: FloatArray) -> FloatArray:
        """U on the nodes before a step from W on the points."""
        low = hidden[self._left]
        cost = low + self._share * (hidden[self._left + 1] - low)  # (factors, nodes)
        largest = cost.max(axis=0)
        small = np.log1p(self._weights @ np.expm1(np.minimum(cost, 1.0))) * (1.0 + _ROUNDING)
        weighted = cost + np.log(self._weights)[:, None]
        shift = weighted.max(axis=0)
        far = shift + np.log(np.exp(weighted - shift).sum(axis=0))
        return np.where(largest < 1.0, small, far * (1.0 + _ROUNDING) + largest * _ROUNDING)

    def _hidden(self, table: FloatArray) -> FloatArray:
        """W on the points: what remains after the best a, and a's price."""
        # The best y has x = y(1 + m), m a slope of U there: y stays on a node while x crosses a
        # jump of the slope, and moves along between nodes. Another y is only a worse plan.
        slopes = np.diff(table) / np.diff(_NODES)
        knots = np.zeros(2 * len(_NODES))
        knots[1:-1:2], knots[2:-1:2] = _ROOTS[:-1] * (1.0 + slopes), _ROOTS[1:] * (1.0 + slopes)
        x = np.sqrt(self._points)
        knots[-1] = max(float(knots.max()), float(x[-1]))
        place = np.interp(x, np.maximum.accumulate(knots), _NUMBERS)
        left = np.minimum(place.astype(np.int64), len(_NODES) - 2)
        rest = _ROOTS[left] + (place - left) * (_ROOTS[left + 1] - _ROOTS[left])
        kept = table[left] + slopes[left] * np.maximum(rest * rest - _NODES[left], 0.0)
        return kept + (x - rest) ** 2
