"""How long forgetting took for pilot sets, against what privacy they lost; prediction for others.

A straight line through measurements: nothing here is proved, and no certificate follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

from .. import _validate as check
from .._validate import FloatArray


@dataclass(frozen=True)
class PredictedSteps:
    """Steps to forget a set, as far as the pilots tell.

    Attributes:
        estimate: Value of the line, in steps; not below 0.
        low, high: Ends of the prediction interval; high is inf if a pilot set was not forgotten
            within the steps that were run: leaving it out of the fit pulls the line down.
        level: Share of new sets that such an interval is meant to contain.
        extrapolated: Whether the set's privacy loss lies outside the pilots'.
    """

    estimate: float
    low: float
    high: float
    level: float
    extrapolated: bool


@dataclass(frozen=True)
class Calibration:
    """Time to unlearn = intercept + slope · (mean log privacy loss), fitted to pilot sets.

    Guarantee: none; every number is predicted.

    Attributes:
        method: Method of the pilot runs.
        order: Rényi order of the privacy losses.
        log_losses: (pilots,) mean over the members of the log of the RDP at `order`.
        times: (pilots,) measured steps; None where the set was not forgotten in `max_steps`.
        max_steps: Steps that each pilot ran at most.
        level: Of intervals.
        intercept, slope: Least squares over the pilots that were forgotten.
        slope_interval: Of the slope at `level`, Student's t.
        r_squared: Of that fit.
    """

    method: str
    order: float
    log_losses: tuple[float, ...]
    times: tuple[int | None, ...]
    max_steps: int
    level: float
    intercept: float
    slope: float
    slope_interval: tuple[float, float]
    r_squared: float

    def predict(self, log_loss: float) -> PredictedSteps:
        """Return the steps for a set with this mean log privacy loss, with a prediction interval.

        Assumes independent normal residuals of one size. Pilots that were not forgotten are not in
        the fit, which is too low then: the interval has no upper end.
        """
        x = check.real("log_loss", log_loss)
        seen, times = self._fitted()
        count, spread = len(seen), float(((seen - seen.mean()) ** 2).sum())
        residuals = times - (self.intercept + self.slope * seen)
        scale = math.sqrt(float((residuals**2).sum()) / (count - 2))
        width = float(stats.t.ppf((1.0 + self.level) / 2.0, count - 2)) * scale
        width *= math.sqrt(1.0 + 1.0 / count + (x - float(seen.mean())) ** 2 / spread)
        middle = self.intercept + self.slope * x
        missed = None in self.times
        return PredictedSteps(
            estimate=max(middle, 0.0),
            low=max(middle - width, 0.0),
            high=math.inf if missed else max(middle + width, 0.0),
            level=self.level,
            extrapolated=not min(self.log_losses) <= x <= max(self.log_losses),
        )

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Return the fit of `dataclasses.asdict`, also after a way through JSON."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**plain)

    def _fitted(self) -> tuple[FloatArray, FloatArray]:
        pairs = [(a, b) for a, b in zip(self.log_losses, self.times, strict=True) if b is not None]
        return np.array([a for a, _ in pairs]), np.array([float(b) for _, b in pairs])


def fit_calibration(
    log_losses: npt.ArrayLike,
    *,
    times: Sequence[int | None],
    max_steps: int,
    method: str,
    order: float,
    level: float = 0.9,
) -> Calibration:
    """Fit measured times to unlearn against the log privacy losses of the pilot sets.

    Args:
        log_losses: Shape (pilots,), finite.
        times: (pilots,) steps in [0, max_steps]; None: not forgotten within `max_steps`.
        max_steps: Steps that each pilot ran at most.
        method: Of the pilot runs.
        order: Rényi order that the privacy losses were read at.
        level: Of the intervals, in (0, 1).

    Raises:
        ValueError: Fewer than three pilots that were forgotten, or all of them with one privacy
            loss: there is no line.

    Source: Sepahvand et al. (2025), arXiv:2505.18786, time to unlearn grows with the log of the
        privacy loss; the interval is the textbook one of simple regression.
    """
    x = check.real_array("log_losses", log_losses)
    check.same_length("log_losses", x, "times", len(times))
    budget = check.integer("max_steps", max_steps, low=1)
    width = check.probability("level", level)
    measured = [t if t is None else check.integer("times", t, low=0) for t in times]
    reached = np.array([t is not None for t in measured])
    if reached.sum() < 3 or len(np.unique(x[reached])) < 2:
        raise ValueError(
            f"Expected three pilot sets that were forgotten within {budget} steps, with privacy "
            f"losses that differ, got {int(reached.sum())} of {len(x)}. Add pilot sets or steps."
        )
    y = np.array([float(t) for t in measured if t is not None])
    line = stats.linregress(x[reached], y)
    half = float(stats.t.ppf((1.0 + width) / 2.0, len(y) - 2)) * float(line.stderr)
    slope = float(line.slope)
    return Calibration(
        method=method,
        order=float(order),
        log_losses=tuple(x.tolist()),
        times=tuple(measured),
        max_steps=budget,
        level=width,
        intercept=float(line.intercept),
        slope=slope,
        slope_interval=(slope - half, slope + half),
        r_squared=float(line.rvalue) ** 2,
    )


def mean_log_loss(rdp: FloatArray, *, orders: FloatArray, order: float) -> float:
    """Return the mean over a set's members of the log of their RDP at one order.

    Args:
        rdp: Shape (members, orders), nats.
        orders: Shape (orders,).
        order: One of them.

    Raises:
        ValueError: An order that is not there; a loss of 0 or inf, whose log says nothing.
    """
    at = np.flatnonzero(orders == order)
    if not len(at):
        raise ValueError(check.expected("order", "to be one of the ledger's orders", order))
    losses = rdp[:, at[0]]
    if not (np.isfinite(losses) & (losses > 0.0)).all():
        raise ValueError(
            f"Expected privacy losses that are positive and finite at order {order:g}, got "
            f"{losses.min():g} to {losses.max():g}. Leave out instances whose gradient was always "
            "zero; after noise-free steps there is nothing to rank by."
        )
    return float(np.log(losses).mean())
