"""The grid of sensitivities that instances are rounded up to, and what one step costs on it.

Does not know who stands on which level; the accountant does.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np

from .._validate import FloatArray, IntArray
from .rdp import sampled_gaussian_rdp

LOWEST = 1e-3  # a smaller positive sensitivity is charged as this one
_TABLES_KEPT = 8  # a noise schedule makes a table per step; only the newest ones are worth memory


class LevelGrid:
    """Sensitivities 0 = grid[0] < ... < grid[-1], geometric, with 0 and 1 exactly on the grid.

    Rounding up is sound because the divergence is nondecreasing in the sensitivity
    (Mironov, Talwar, Zhang 2019, arXiv:1908.10530v1: noise z/s only grows as s shrinks).
    """

    def __init__(self, levels: int, *, max_sensitivity: float, orders: FloatArray) -> None:
        self.orders = orders
        self.sensitivities = _grid(levels, max_sensitivity)
        self._tables: OrderedDict[tuple[float, float], FloatArray] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of levels."""
        return len(self.sensitivities)

    def round_up(self, sensitivities: FloatArray) -> IntArray:
        """Return the lowest level whose sensitivity is not below each given one."""
        return np.searchsorted(self.sensitivities, sensitivities, side="left")

    def rdp(self, *, noise_multiplier: float, sample_rate: float) -> FloatArray:
        """Return one step's RDP, shape (levels, orders), nondecreasing in the level; not a copy."""
        key = (noise_multiplier, sample_rate)
        if key not in self._tables:
            table = sampled_gaussian_rdp(
                self.sensitivities,
                noise_multiplier=noise_multiplier,
                sample_rate=sample_rate,
                orders=self.orders.tolist(),
            )
            # Monotone in truth; the running maximum removes what rounding may have disturbed.
            table = np.maximum.accumulate(table, axis=0)
            table.flags.writeable = False
            self._tables[key] = table
            while len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]


def _grid(levels: int, max_sensitivity: float) -> FloatArray:
    """Place `levels` sensitivities: 0, a geometric run up to exactly 1, and one above it if asked.

    The run above 1 has the share of levels that its logarithmic length has, at least one.
    """
    below = math.log(1.0 / LOWEST)
    above = math.log(max_sensitivity)
    positive = levels - 1
    high = (
        0 if above == 0.0 else min(max(round(positive * above / (below + above)), 1), positive - 1)
    )
    low = positive - high
    grid = np.concatenate(
        [
            [0.0],
            np.geomspace(LOWEST, 1.0, low) if low > 1 else [1.0],
            np.geomspace(1.0, max_sensitivity, high + 1)[1:],
        ]
    )
    grid[low] = 1.0  # geomspace ends within rounding of its end points; these must be exact
    grid[-1] = max_sensitivity
    return grid
