"""The privacy filter: budgets that no instance can exceed, whatever the run does.

Knows budgets and the orders they are enforced at; not where charges come from. An instance takes
part in a step only if its total, that step included, stays within its budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..errors import LedgerError
from .balances import CHUNK, Balances
from .rdp import epsilon_offset

_EPS = float(np.finfo(np.float64).eps)


class PrivacyFilter:
    """Per-instance RDP budgets, each enforced at orders that were fixed before the run.

    Guarantee: if an instance takes part in a step only while `affords` says so, and its clipping
        bound in that step is a function of the released past and of its own record, the whole run
        is (order, limit)-RDP for adding or removing that instance, in both directions, however
        adaptively noise, sample rate, bounds and the number of steps were chosen.

    Attributes:
        columns: Shape (instances, k), positions of the enforced orders.
        limits: Shape (instances, k), budgets there in nats; inf: not enforced.
        dropped: Shape (instances,), True once a step was too much for the instance.
        target: (epsilon of shape (instances,), delta) if the budget came as (ε, δ).
        settled: Whether the orders are final. An (ε, δ) budget is enforced at one order, chosen
            when noise and sample rate of the first step are known.

    Source: Feldman, Zrnic (2021), arXiv:2008.11193, Sec. 4: a Rényi filter with individual
        parameters. Why it holds: with L the likelihood ratio of the released steps in either
        direction, L^order·exp(−(order − 1)·charges) is a supermartingale, since each charge is
        known before its step; and the charges never exceed the limit.
    """

    def __init__(
        self,
        columns: IntArray,
        limits: FloatArray,
        *,
        dropped: npt.NDArray[np.bool_] | None = None,
        target: tuple[FloatArray, float] | None = None,
        settled: bool = True,
    ) -> None:
        self.columns, self.limits = columns, limits
        self.dropped = np.zeros(len(limits), dtype=bool) if dropped is None else dropped
        self.target = target
        self.settled = settled

    @classmethod
    def from_budget(cls, budget: Any, *, size: int, orders: FloatArray) -> PrivacyFilter:
        """Return the filter of a budget given as (ε, δ) or as an RDP curve.

        Args:
            budget: The tuple (epsilon, delta), epsilon a number or of shape (instances,); or RDP in
                nats of shape (orders,) or (instances, orders), inf where it is not enforced.
            size: Number of instances.
            orders: Shape (orders,).

        Raises:
            TypeError, ValueError: A value outside its domain, another shape, or an (ε, δ) that no
                order can carry.
        """
        values, delta = checked_budget(budget)
        if delta is not None:
            epsilon = values
            if epsilon.ndim == 0:
                epsilon = np.full(size, float(epsilon))
            check.same_length("epsilon of the budget", epsilon, "instances", size)
            curve = _limits(epsilon.min(), delta, orders)
            if not (curve > 0).any():
                raise ValueError(
                    f"Expected a budget above 0 at some order, got epsilon={epsilon.min():g} at "
                    f"delta={delta:g} with orders up to {orders.max():g}. Raise epsilon or delta, "
                    "or pass larger orders."
                )
            # q = 1 charges in proportion to the order; the first step replaces this choice.
            made = cls(np.empty((size, 1), dtype=np.int64), np.empty((size, 1)),
                       target=(epsilon.copy(), delta), settled=False)  # fmt: skip
            made._choose(np.arange(size), np.broadcast_to(orders, (size, len(orders))), orders)
            return made
        curve = values
        if curve.shape not in ((len(orders),), (size, len(orders))):
            raise ValueError(
                f"Expected budget as the tuple (epsilon, delta) or as RDP at the {len(orders)} "
                f"orders, for all instances or for each of {size}, got shape {curve.shape}."
            )
        used = np.flatnonzero(np.isfinite(np.atleast_2d(curve)).any(axis=0))
        if not len(used):
            raise ValueError("Expected a budget that is finite at some order, got inf everywhere.")
        limits = np.broadcast_to(curve[..., used], (size, len(used))).copy()
        return cls(np.broadcast_to(used, limits.shape).copy(), limits)

    def settled_for(
        self, table: FloatArray, level: npt.NDArray[Any], orders: FloatArray
    ) -> PrivacyFilter:
        """Return the filter with final orders, given the first step's RDP (levels, orders).

        Each instance gets the order at which its budget bears the most steps like this one. A step
        without noise or without sampling tells nothing and leaves the choice to a later one.
        """
        if self.settled or not (table[-1] > 0).all() or not np.isfinite(table[-1]).any():
            return self
        made = PrivacyFilter(
            self.columns.copy(), self.limits.copy(), dropped=self.dropped, target=self.target
        )
        costs = table.copy()
        costs[table.max(axis=1) == 0] = table[-1]  # whoever pays nothing yet: as the worst case
        costs = np.vstack([costs, costs[-1:]])  # forgotten instances
        for start in range(0, len(level), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(level)))
            made._choose(rows, costs[level[rows]], orders)
        return made

    def affords(self, balances: Balances, table: FloatArray) -> npt.NDArray[np.bool_]:
        """Return who can bear a step with RDP `table` (levels, orders) on top of all charges."""
        padded = np.vstack([table, np.zeros_like(table[:1])])
        within = ~self.dropped
        for start in range(0, len(within), CHUNK):
            part = slice(start, start + CHUNK)
            columns = self.columns[part]
            step = padded[balances.level[part, None], columns]
            total = balances.at(np.arange(start, start + len(columns)), columns) + step
            within[part] &= (total * (1.0 + 2.0 * _EPS) <= self.limits[part]).all(axis=1)
        return within

    def budgets(self, rows: IntArray, orders: FloatArray) -> FloatArray:
        """Return what the budgets say at every order, shape (rows, orders).

        The divergence is nondecreasing in the order: a limit holds at all lower orders too, and
        says nothing about higher ones.
        """
        curve = self._spread(rows, len(orders))
        falling = np.argsort(-orders)
        curve[:, falling] = np.minimum.accumulate(curve[:, falling], axis=1)
        return curve

    def clipped(self, rdp: FloatArray, rows: IntArray) -> FloatArray:
        """Return realised sums of `rows`, at most the limits that they were tested against."""
        return np.minimum(rdp, self._spread(rows, rdp.shape[1]))

    # --- saved form ---------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return copies of the arrays and plain values."""
        epsilon, delta = (None, None) if self.target is None else self.target
        return {
            "columns": self.columns.copy(),
            "limits": self.limits.copy(),
            "dropped": self.dropped.copy(),
            "epsilon": None if epsilon is None else epsilon.copy(),
            "delta": delta,
            "settled": self.settled,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], *, size: int, orders: int) -> PrivacyFilter:
        """Return a checked filter from arrays (not tensors) and plain values.

        Raises:
            LedgerError: A value that cannot be right.
        """
        try:
            made = cls(
                np.array(state["columns"], dtype=np.int64),
                np.array(state["limits"], dtype=np.float64),
                dropped=np.array(state["dropped"], dtype=bool),
                target=None
                if state["epsilon"] is None
                else (np.array(state["epsilon"], dtype=np.float64), float(state["delta"])),
                settled=bool(state["settled"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"Expected a readable filter, got one with {error!r}.") from error
        if not (made._has_shapes(size) and made._has_limits_at(orders)):
            raise LedgerError(
                f"Expected a filter with limits >= 0 for {size} instances at {orders} orders, got "
                "one without. Use an earlier copy."
            )
        return made

    def merged(self, other: PrivacyFilter, order: IntArray) -> PrivacyFilter:
        """Return the filter of both shards' instances, taken in `order`.

        Raises:
            LedgerError: Budgets of another kind.
        """
        deltas = [None if f.target is None else f.target[1] for f in (self, other)]
        same = self.limits.shape[1] == other.limits.shape[1] and self.settled == other.settled
        if not same or deltas[0] != deltas[1]:
            raise LedgerError("Expected shards with one kind of budget, got different ones.")

        def joined(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.concatenate([mine, theirs])[order]

        target = None
        if self.target is not None and other.target is not None:
            target = joined(self.target[0], other.target[0]), self.target[1]
        return PrivacyFilter(
            joined(self.columns, other.columns),
            joined(self.limits, other.limits),
            dropped=joined(self.dropped, other.dropped),
            target=target,
            settled=self.settled,
        )

    # --- inside -------------------------------------------------------------------------------

    def _has_shapes(self, size: int) -> bool:
        """Whether everything is there for each of `size` instances."""
        return (
            self.limits.ndim == 2
            and self.limits.shape == self.columns.shape
            and len(self.limits) == size
            and self.dropped.shape == (size,)
            and (self.target is None or self.target[0].shape == (size,))
        )

    def _has_limits_at(self, orders: int) -> bool:
        """Whether limits can be such, at some of so many orders, final or with a target."""
        return (
            bool((self.limits >= 0).all())
            and bool(((self.columns >= 0) & (self.columns < orders)).all())
            and (self.settled or self.target is not None)
        )

    def _choose(self, rows: IntArray, costs: FloatArray, orders: FloatArray) -> None:
        """Enforce the (ε, δ) of `rows` at the order that bears the most steps of `costs`."""
        assert self.target is not None
        limits = _limits(self.target[0][rows, None], self.target[1], orders)
        with np.errstate(over="ignore"):
            best = np.argmax(np.where(limits > 0, limits / costs, -1.0), axis=1)
        self.columns[rows, 0] = best
        self.limits[rows, 0] = limits[np.arange(len(rows)), best]

    def _spread(self, rows: IntArray, orders: int) -> FloatArray:
        curve = np.full((len(rows), orders), np.inf)
        np.put_along_axis(curve, self.columns[rows], self.limits[rows], axis=1)
        return curve


def checked_budget(budget: Any) -> tuple[FloatArray, float | None]:
    """Return (epsilon, δ) of a budget, or (RDP curve, None), as far as they need no data set.

    Raises:
        TypeError, ValueError: A value outside its domain; (δ, ε) in place of (ε, δ).
    """
    if not isinstance(budget, tuple):
        return check.real_array("budget", budget, low=0.0, allow_infinite=True), None
    if len(budget) != 2:
        raise ValueError(check.expected("budget", "to be (epsilon, delta) or an RDP curve", budget))
    delta = check.real(
        "delta of the budget", budget[1], low=0.0, high=1.0, open_low=True, open_high=True,
        cure="The order is (epsilon, delta).",
    )  # fmt: skip
    return check.real_array("epsilon of the budget", budget[0], low=0.0), delta


def _limits(epsilon: npt.ArrayLike, delta: float, orders: FloatArray) -> FloatArray:
    """Largest RDP at each order that still gives ε at δ, rounded down; negative: none does."""
    target, offset = np.asarray(epsilon), epsilon_offset(orders, delta=delta)
    return np.asarray(target - offset - 16.0 * _EPS * (target + np.abs(offset)))
