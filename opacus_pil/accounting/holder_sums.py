"""The sum over steps in per-instance composition, for one Hölder exponent.

Sees divergences as arrays (instances..., runs, steps) at two neighbouring orders at a time, so that
a run's whole history is never held at every order. The theorem is told in `composition`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from .bounded_mean import mean_upper_bound

StepRdp = Callable[[float], npt.ArrayLike]

SHORT_RUN = 3  # steps, up to which every order is evaluated
_ORDERS_ONE_BY_ONE = 64  # and beyond, up to this many distinct ones
_ROUNDED_APART = 1e-9  # relative; worst case and runs may have been rounded up differently
_SAME_START = 1e-6  # relative difference of first steps that rounding in a gradient may explain


@dataclass(frozen=True)
class StepValues:
    """Divergences at one order: shape (instances..., runs, steps); worst (instances..., steps)."""

    rdp: FloatArray
    worst: FloatArray | None


class StepSource:
    """The caller's divergences, checked at every order they are asked for."""

    def __init__(
        self, step_rdp: StepRdp, worst_case_rdp: StepRdp | None, *, fixed_start: bool
    ) -> None:
        for name, value in (("step_rdp", step_rdp), ("worst_case_rdp", worst_case_rdp)):
            if value is not None and not callable(value):
                raise TypeError(_validate.expected(name, "to be a function of the order", value))
        self._step_rdp = step_rdp
        self._worst = worst_case_rdp
        self.fixed_start = fixed_start
        self._shape: tuple[int, ...] | None = None

    def at(self, order: float) -> StepValues:
        """Evaluate at one order."""
        rdp = _validate.real_array("step_rdp", self._step_rdp(order), low=0.0, allow_infinite=True)
        if rdp.ndim < 2 or 0 in rdp.shape[-2:]:
            raise ValueError(
                "Expected step_rdp to return shape (..., trajectories, steps) with at least one of "
                f"each, got shape {rdp.shape}. Give a single run an axis of length 1."
            )
        self._shape = self._shape or rdp.shape
        if rdp.shape != self._shape:
            raise ValueError(
                "Expected step_rdp to return the same shape at every order, got "
                f"{rdp.shape} at order {order:g} after {self._shape}."
            )
        if self.fixed_start:
            rdp = _with_one_start(rdp)
        return StepValues(rdp, None if self._worst is None else self._checked_worst(order, rdp))

    def _checked_worst(self, order: float, rdp: FloatArray) -> FloatArray:
        """Return the worst case, shape (instances..., steps), once no run is found above it."""
        assert self._worst is not None
        given = _validate.real_array(
            "worst_case_rdp", self._worst(order), low=0.0, allow_infinite=True
        )
        shape = rdp.shape[:-2] + rdp.shape[-1:]
        try:
            worst = np.broadcast_to(given, shape)
        except ValueError as error:
            raise ValueError(
                f"Expected worst_case_rdp to broadcast to (..., steps) = {shape}, "
                f"got shape {given.shape}."
            ) from error
        met = rdp.max(axis=-2)
        above = met > worst * (1.0 + _ROUNDED_APART)
        if above.any():
            row = int(np.flatnonzero(above.reshape(-1))[0])
            raise ValueError(
                f"Expected step_rdp at most worst_case_rdp, got {int(above.sum())} of {above.size} "
                f"above it at order {order:g} (first: row {row}, "
                f"{float(met.reshape(-1)[row])!r} > {float(worst.reshape(-1)[row])!r}). "
                "Pass the RDP at the largest sensitivity that clipping admits."
            )
        return worst


def _with_one_start(rdp: FloatArray) -> FloatArray:
    """Return rdp with every run's first step at the largest of them, which must be about equal."""
    first = rdp[..., 0]
    top = first.max(axis=-1, keepdims=True)
    differ = first < top * (1.0 - _SAME_START)
    if differ.any():
        raise ValueError(
            "Expected equal first steps in all runs with fixed_start=True, got "
            f"{int(differ.any(axis=-1).sum())} instances where they differ. "
            "Pass fixed_start=False unless every run began at the same parameters."
        )
    result = rdp.copy()
    result[..., 0] = top
    return result


class HolderSum:
    """Σ of weight · log mean exp(factor · (α_i−1)·D_i), and what bounds its expectation.

    Args:
        holder_exponent: h > 1.
        orders: Order of each step, in training order, shape (steps,).
        like: Any values of the source, for their shapes.
        fixed_start: The first step is known, not estimated.
    """

    def __init__(
        self, holder_exponent: float, orders: FloatArray, like: StepValues, *, fixed_start: bool
    ) -> None:
        steps = len(orders)
        log_rho = -math.log1p(-1.0 / holder_exponent)
        self.orders = orders
        self._fixed_start = fixed_start
        self._factor = np.full(steps, holder_exponent)
        self._factor[0] = 1.0  # nothing precedes the first step: no Hölder there
        self._weight = np.exp(-log_rho * np.arange(steps)[::-1]) / self._factor
        leading, runs = like.rdp.shape[:-2], like.rdp.shape[-2]
        self.total = np.zeros(leading)
        self.tangents: Tangents | None = None
        if like.worst is not None:
            self.tangents = Tangents.zeros(leading, runs)

    def add(
        self,
        order: float,
        next_order: float,
        low: StepValues,
        high: StepValues,
        *,
        tangents: bool = False,
    ) -> None:
        """Add the steps whose order is in [order, next_order), by the chord between the two."""
        columns = np.flatnonzero((self.orders >= order) & (self.orders < next_order))
        if not columns.size:
            return
        share = np.zeros(len(columns))
        if math.isfinite(next_order):
            share = (self.orders[columns] - order) / (next_order - order)

        def chord(at_low: FloatArray, at_high: FloatArray) -> FloatArray:
            """(α−1)·D at the columns' orders, times the factor."""
            value = (1.0 - share) * (order - 1.0) * at_low[..., columns]
            inside = share > 0.0  # 0 · inf is not a number
            if inside.any():
                value[..., inside] += (share * (next_order - 1.0))[inside] * (
                    at_high[..., columns[inside]]
                )
            return value * self._factor[columns]

        exponent = chord(low.rdp, high.rdp)
        weight = self._weight[columns]
        self.total += (weight * _log_mean_exp(exponent)).sum(axis=-1)
        if tangents and self.tangents is not None:
            assert low.worst is not None
            assert high.worst is not None
            if self._fixed_start and columns[0] == 0:
                self.tangents.add_known(weight[0] * exponent[..., 0, 0])
                exponent, weight, columns, share = (
                    exponent[..., 1:], weight[1:], columns[1:], share[1:],
                )  # fmt: skip
            # Fixed before the runs and not below them: the larger of the two would be neither.
            largest = chord(low.worst, high.worst) * (1.0 + _ROUNDED_APART)
            self.tangents.add(exponent, largest, weight)


def knots_of(sums: list[HolderSum]) -> list[float]:
    """Orders to evaluate: every one of them while they are few, else a geometric grid over them."""
    orders = np.unique(np.concatenate([each.orders for each in sums]))
    if len(orders) <= _ORDERS_ONE_BY_ONE or len(sums[0].orders) <= SHORT_RUN:
        return orders.tolist()
    gaps = np.geomspace(orders[0] - 1.0, orders[-1] - 1.0, _grid_size(orders))
    inner = 1.0 + gaps[(1.0 + gaps > orders[0]) & (1.0 + gaps < orders[-1])]
    return np.unique([orders[0], *inner, orders[-1]]).tolist()


def _grid_size(orders: FloatArray) -> int:
    """Number of knots: 16, or more where they would be above 10 % apart in (order − 1).

    For D = c·α a chord over a ratio r is too high by at most about (log r)²/4: 0.3 %.
    """
    span = math.log((orders[-1] - 1.0) / (orders[0] - 1.0))
    return max(16, 1 + math.ceil(span / 0.1))


def _log_mean_exp(exponent: FloatArray) -> FloatArray:
    """Log of the mean of exp over the runs, axis −2, exact for tiny and for huge exponents."""
    top = exponent.max(axis=-2)
    shift = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(invalid="ignore"):
        spread = np.expm1(np.minimum(exponent - shift[..., None, :], 0.0)).mean(axis=-2)
    return top + np.log1p(spread)


@dataclass
class Tangents:
    """One bounded number per run whose mean is not below the sum of logarithms.

    log m <= log a + m/a − 1 for any constant a > 0, here a = 1 + λ·(M − 1) with M the largest
    possible exp: `base` is Σ weight·(log a + 1/a − 1), `gain` Σ weight·(exp(x) − 1)/a per run and
    `span` the gain at the worst case.

    Shapes: base, span (instances..., anchors); gain (instances..., anchors, runs).
    """

    anchors: FloatArray
    base: FloatArray
    span: FloatArray
    gain: FloatArray

    @classmethod
    def zeros(cls, leading: tuple[int, ...], runs: int) -> Tangents:
        """Start with no step; λ = 1/2, 1/4, … to about 1.5/runs, what the runs can resolve."""
        count = max(1, int(math.log2(runs / 1.5)))
        anchors = np.asarray(0.5 ** np.arange(1, 1 + count), dtype=np.float64)
        shape = (*leading, len(anchors))
        return cls(anchors, np.zeros(shape), np.zeros(shape), np.zeros((*shape, runs)))

    def add_known(self, value: FloatArray) -> None:
        """Add a term that does not vary between runs."""
        self.base += value[..., None]

    def add(self, exponent: FloatArray, largest: FloatArray, weight: FloatArray) -> None:
        """Add steps: exponents (..., runs, steps), their largest value (..., steps)."""
        for k, anchor in enumerate(self.anchors.tolist()):
            log_a = np.logaddexp(math.log1p(-anchor), math.log(anchor) + largest)
            finite = np.where(np.isfinite(log_a), log_a, 0.0)
            self.base[..., k] += ((log_a + np.expm1(-log_a)) * weight).sum(axis=-1)
            self.span[..., k] += (_scaled_expm1(largest, finite) * weight).sum(axis=-1)
            scaled = _scaled_expm1(exponent, finite[..., None, :])
            self.gain[..., k, :] += (scaled * weight).sum(axis=-1)

    def upper(self, failure: FloatArray) -> FloatArray:
        """Upper confidence value of Σ weight · log E exp(x), shape (instances..., anchors)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share = self.gain / self.span[..., None]
        usable = np.isfinite(share) & np.isfinite(self.span)[..., None]
        mean = mean_upper_bound(
            np.where(usable, np.minimum(share, 1.0), 0.0), failure=failure[..., None]
        )
        with np.errstate(invalid="ignore"):
            value = self.base + np.where(self.span > 0.0, self.span * mean, 0.0)
        return np.where(np.isnan(value), np.inf, value)


@dataclass(frozen=True)
class Evidence:
    """What the runs say about the expectations; `allowed` is (candidates, instances...)."""

    tangents: list[Tangents]
    allowed: npt.NDArray[np.bool_]
    worst: FloatArray

    def upper(self, failure: float) -> FloatArray:
        """Upper confidence value of (order − 1) times the theorem's bound, shape (instances...)."""
        choices = self.allowed.sum(axis=0) * len(self.tangents[0].anchors)
        chance = failure / np.asarray(choices, dtype=np.float64)
        best = np.full(self.worst.shape, np.inf)
        for mask, tangents in zip(self.allowed, self.tangents, strict=True):
            value = tangents.upper(chance).min(axis=-1)
            best = np.where(mask, np.minimum(best, value), best)
        return best


def _scaled_expm1(exponent: FloatArray, log_a: FloatArray) -> FloatArray:
    """(exp(x) − 1)/a without overflow (infinite x only where a is) and without cancellation."""
    small = np.exp(-log_a) * np.expm1(np.minimum(exponent, 1.0))
    finite = np.minimum(exponent, log_a + 700.0)
    return np.where(exponent < 1.0, small, np.exp(finite - log_a) - np.exp(-log_a))
