"""Balances: what has been charged to every instance, as offsets against shared prefix sums.

An instance's RDP is `offset + S[level]`. S grows for a whole level at once, so a step costs the
same for a thousand instances and for ten million. While noise and sample rate stay the same, S is
`base + repeats * table` and is formed only for the rows that are needed.

Knows arrays and levels; checks nothing and labels nothing. Every reading is an upper bound of the
exact sum of the charges: rounding errors of the prefix sums are added, never left out.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray, IntArray
from ..errors import LedgerError
from . import offsets

CHUNK = 1 << 13  # instances whose RDP is formed at once: a full pass stays in the cache
_HUGE = 1e290  # a charge above this is taken as infinite, so that no sum of charges can overflow

Kernel = tuple[float, float]  # noise_multiplier, sample_rate


class Balances:
    """Charges of `size` instances on `levels` levels; everyone starts on the highest level.

    Attributes:
        level: Shape (instances,); the value `levels` is where forgotten instances stand: they pay
            nothing more.
        infinite: Shape (instances,), True once an instance was charged +inf at some order. A flag,
            because inf - inf would be NaN.
        worst_infinite: The same for an instance that stood on the highest level all along.
        folder: Where `offset` is held in a file mapped into memory; None: in memory.
    """

    def __init__(
        self,
        size: int,
        *,
        levels: int,
        orders: int,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.levels = levels
        self.folder = folder
        self.base = np.zeros((levels + 1, orders))
        self.flushes = 0
        self.pending: Pending | None = None
        self.level = np.full(size, levels - 1, dtype=np.uint16)
        self.offset = offsets.zeros((size, orders), folder=folder)
        self.infinite = np.zeros(size, dtype=bool)
        self.worst_infinite = False

    @property
    def offset(self) -> FloatArray:
        """Charges beyond the shared sums of the level, shape (instances, orders)."""
        if self.folder is not None and os.getpid() != self._process:
            raise LedgerError(
                "Expected the process that made this accountant, got a fork of it, which shares "
                "the file of its offsets. Hand over a copy or state_dict(), or set no memory_map."
            )
        return self._offset

    @offset.setter
    def offset(self, values: FloatArray) -> None:
        self._offset, self._process = values, os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy is made of; refused where the offsets are somebody else's."""
        return {**vars(self), "_offset": self.offset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied or unpickled state; a file is never shared between two of them."""
        vars(self).update(state)
        self.offset = offsets.placed(state["_offset"], folder=self.folder)

    def charge(self, table: FloatArray, kernel: Kernel) -> None:
        """Charge each level its row of `table` (levels, orders), the step's RDP at `kernel`."""
        if self.pending is None or self.pending.kernel != kernel:
            self._flush()
            self.pending = Pending(table, kernel)
        self.pending.repeats += 1
        infinite = self.pending.infinite
        self.worst_infinite |= bool(infinite[self.levels - 1])
        if infinite.any():  # rare (no noise), hence allowed to touch every instance
            self.infinite |= infinite[self.level]

    def charge_everyone(self, row: FloatArray) -> None:
        """Charge every instance that is not forgotten the same `row` (orders,)."""
        self._flush()
        if (row <= _HUGE).all():
            self.base[:-1] += row
        else:
            self.infinite |= self.level != self.levels
            self.worst_infinite = True
        self.flushes += 1

    def move(self, rows: IntArray, levels: npt.NDArray[Any]) -> None:
        """Put `rows` on other levels and keep what they were charged, rounded up."""
        changed = self.level[rows] != levels
        rows, levels = rows[changed], levels[changed]
        for start in range(0, len(rows), CHUNK):
            part, new = rows[start : start + CHUNK], levels[start : start + CHUNK]
            before, after = self._sums(self.level[part]), self._sums(new)
            offset = self.offset.take(part, axis=0)
            error = self._slack * (before + after + np.abs(offset))
            self.offset[part] = offset + (before - after) + error
            self.level[part] = new

    def rdp(self, rows: IntArray) -> FloatArray:
        """Return an upper bound of the sum of all charges, shape (rows, orders)."""
        shared, own = self._sums(self.level[rows]), self.offset.take(rows, axis=0)
        value = own + shared + self._slack * (shared + np.abs(own))
        # Charges are nondecreasing in the level, so the top level bounds everyone; and a sum of
        # charges is >= 0 whatever rounding did to a difference of prefix sums.
        value = np.clip(value, 0.0, self._top())
        value[self.infinite[rows]] = np.inf
        return value

    def at(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """Return `rdp` of `rows` at each one's own orders only; columns and result (rows, k)."""
        level = self.level[rows, None]
        shared, own = self.base[level, columns], self.offset[rows[:, None], columns]
        if self.pending is not None:
            shared = shared + self.pending.repeats * self.pending.table[level, columns]
        value = own + shared + self._slack * (shared + np.abs(own))
        value = np.clip(value, 0.0, self._top()[columns])
        value[self.infinite[rows]] = np.inf
        return value

    def worst(self) -> FloatArray:
        """Return the same for an instance on the highest level in every step, shape (orders,)."""
        top = self._top()
        return np.full(len(top), np.inf) if self.worst_infinite else top

    @property
    def _slack(self) -> float:
        return relative_error(self.flushes)

    def _sums(self, level: npt.NDArray[Any]) -> FloatArray:
        # take: on rows of a matrix twice as fast as indexing, and half of a step's time is here
        sums = self.base.take(level, axis=0)
        if self.pending is not None:
            sums += self.pending.repeats * self.pending.table.take(level, axis=0)
        return sums

    def _top(self) -> FloatArray:
        return self._sums(np.array(self.levels - 1)) * (1.0 + self._slack)

    def _flush(self) -> None:
        if self.pending is not None:
            self.base += self.pending.repeats * self.pending.table
            self.flushes += 1
            self.pending = None


class Pending:
    """Steps with one and the same table that are not in the prefix sums yet."""

    def __init__(self, table: FloatArray, kernel: Kernel, repeats: int = 0) -> None:
        self.kernel = kernel
        self.repeats = repeats
        finite = np.where(table <= _HUGE, table, 0.0)
        self.table = np.vstack([finite, np.zeros((1, table.shape[1]))])
        self.infinite = np.append((table > _HUGE).any(axis=1), False)


def relative_error(flushes: int) -> float:
    """Relative error of a prefix sum: one rounding per flush, a few for forming a row."""
    return (flushes + 8) * float(np.finfo(np.float64).eps)
