"""Claim (a), predicted: K = ln(μ/μ*) / ln(1/c) steps to forget, fitted to pilots, tested on others.

If each step shrinks the distance μ that a set put between training with and without it by c, it is
below μ* after K steps: a line in ln μ with slope 1/ln(1/c). A set that is there at once needs K ≤ 0
and one that never gets there needs K beyond the run; both say so much and no more, so that the line
is a censored (Tobit) regression. Knows numbers only; nothing here is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from .._validate import FloatArray
from .claims import chosen

Entry = Mapping[str, Any]
PREDICTORS = {"contracted loss": "log_distance", "clipped privacy loss": "log_privacy_loss"}
WIDEST = 0.5  # share of the run: wider intervals exclude too little to be a prediction
_FEWEST = 3  # pilots that get there neither at once nor never: fewer show no rate


@dataclass(frozen=True)
class CensoredTimes:
    """Times to unlearn as far as runs show them.

    Attributes:
        x: Shape (sets,), ln μ.
        times: Shape (sets,), steps; 0 stands for "at once", inf for "not within the run".
        end: Shape (sets,), the last step from which staying could be seen.
        grain: Steps between two looks, > 0.
    """

    x: FloatArray
    times: FloatArray
    end: FloatArray
    grain: float

    @property
    def between(self) -> np.ndarray:
        """Where the time itself was seen."""
        return (self.times > 0) & np.isfinite(self.times)

    @classmethod
    def of(cls, entries: Sequence[Entry], *, predictor: str, definition: str) -> CensoredTimes:
        """Take sets' entries of study.json."""
        times = [entry["time_to_unlearn"][definition]["mean_curve"] for entry in entries]
        return cls(
            np.array([entry[predictor] for entry in entries]),
            np.array([math.inf if t is None else float(t) for t in times]),
            np.array([float(entry["last_start"]) for entry in entries]),
            float(entries[0]["record_every"]),
        )


@dataclass(frozen=True)
class Rate:
    """The fitted line K = intercept + slope · ln μ with its spread.

    Attributes:
        intercept, slope: In steps.
        spread: Standard deviation of a set's K around the line, in steps; for the two numbers that
            were fitted, the likelihood's is stretched by the root of between / (between − 2).
        covariance: Of (intercept, slope) at this spread, from the curvature of the likelihood.
        pilots: Sets it was fitted to.
        between: Those of them whose time itself was seen, at least 3.
    """

    intercept: float
    slope: float
    spread: float
    covariance: FloatArray
    pilots: int
    between: int

    @property
    def contraction(self) -> float | None:
        """c per step, or None where times do not grow with ln μ."""
        return math.exp(-1.0 / self.slope) if self.slope > 0 else None

    @property
    def log_threshold(self) -> float | None:
        """ln μ*, below which a set is forgotten at once, or None."""
        return -self.intercept / self.slope if self.slope > 0 else None

    def interval(self, x: FloatArray, *, level: float) -> tuple[FloatArray, FloatArray]:
        """Return ends of K's prediction interval for new sets, as if nothing censored it.

        Student's t with between − 2 degrees of freedom, for the spread and for the line's own
        uncertainty: censored sets say little about either.
        """
        design = np.stack([np.ones_like(x), x], axis=1)
        own = np.einsum("ni,ij,nj->n", design, self.covariance, design)
        width = stats.t.ppf((1.0 + level) / 2.0, self.between - 2)
        half = width * np.sqrt(self.spread**2 + own)
        middle = self.intercept + self.slope * x
        return middle - half, middle + half


def fit_rate(pilots: CensoredTimes) -> Rate | None:
    """Fit the line by maximum likelihood, or return None where the pilots show no rate.

    The spread is held at or above that of rounding to the looks, which keeps the likelihood
    bounded.

    Source: Tobin (1958), Econometrica 26; censored on both sides.
    """
    if int(pilots.between.sum()) < _FEWEST or np.ptp(pilots.x) == 0.0:
        return None
    unit, centre, scale = float(pilots.end.max()), float(pilots.x.mean()), float(pilots.x.std())
    z = (pilots.x - centre) / scale
    least = math.log(pilots.grain / math.sqrt(12.0) / unit)

    def loss(at: FloatArray) -> float:
        return -_log_likelihood(at, z, pilots.times / unit, pilots.end / unit)

    start = np.clip(pilots.times, 0.0, pilots.end) / unit
    slope, intercept = np.polyfit(z, start, 1)
    width = math.log(max(float((start - intercept - slope * z).std()), 0.05))
    best = min(
        (
            optimize.minimize(
                loss, [intercept, factor * slope, width], method="L-BFGS-B",
                bounds=[(-50.0, 50.0), (-50.0, 50.0), (least, 3.0)],
            )
            for factor in (1.0, 2.0)
        ),
        key=lambda one: float(one.fun),
    )  # fmt: skip
    a, b, log_spread = best.x
    covariance = _inverse_curvature(lambda ab: loss(np.append(ab, log_spread)), best.x[:2])
    between = int(pilots.between.sum())
    stretch = math.sqrt(between / (between - 2.0))
    back = unit * stretch * np.array([[1.0, -centre / scale], [0.0, 1.0 / scale]])
    return Rate(
        intercept=unit * (a - b * centre / scale),
        slope=unit * b / scale,
        spread=unit * stretch * math.exp(log_spread),
        covariance=back @ covariance @ back.T,
        pilots=len(z),
        between=between,
    )


def prediction_claim(trainings: Sequence[Sequence[Entry]], *, level: float) -> dict[str, Any]:
    """(a) Fit c and μ* on the sets of all trainings but one, predict those of that one; in turn.

    A set is covered if its interval and what its run showed have a time in common: 0 or below for
    one that is there at once, beyond the run for one that is not. Wide intervals cover everything:
    `width` is the mean share of the run that lies inside. Reproduced: as many sets are covered as
    the level says, down to two standard errors of that many sets, by intervals that are on average
    at most `WIDEST`, and times grow; "no" where fewer are covered.

    Returns:
        Predictor -> definition of reached -> what came out; None where no pilots show a rate, or
        there is one training.
    """
    names = trainings[0][0]["time_to_unlearn"]
    return {
        predictor: {
            name: _tested(trainings, predictor=column, definition=name, level=level)
            for name in names
        }
        for predictor, column in PREDICTORS.items()
    }


def _tested(
    trainings: Sequence[Sequence[Entry]], *, predictor: str, definition: str, level: float
) -> dict[str, Any] | None:
    rates, results, tops = [], [], []
    for out, entries in enumerate(trainings):
        pilots = [e for k, one in enumerate(trainings) if k != out for e in chosen(one)]
        if not pilots:
            return None
        how = {"predictor": predictor, "definition": definition}
        rate = fit_rate(CensoredTimes.of(pilots, **how))
        if rate is None:
            return None
        rates.append(rate)
        results.append(_covered(rate, CensoredTimes.of(chosen(entries), **how), level=level))
        rest = [entry for entry in entries if entry["kind"] == "top"]
        tops.append(_covered(rate, CensoredTimes.of(rest, **how), level=level))
    inside, share = (np.concatenate(part) for part in zip(*results, strict=True))
    top_inside, top_share = (np.concatenate(part) for part in zip(*tops, strict=True))
    least = level - 2.0 * math.sqrt(level * (1.0 - level) / len(inside))
    sharp = share.mean() <= WIDEST and all(rate.slope > 0 for rate in rates)
    return {
        "reproduced": "no" if inside.mean() < least else ("yes" if sharp else "undecided"),
        "level": level,
        "pilots": [rate.pilots for rate in rates],
        "pilots_between": [rate.between for rate in rates],
        "contraction_per_step": [rate.contraction for rate in rates],
        "log_threshold": [rate.log_threshold for rate in rates],
        "spread_in_steps": [rate.spread for rate in rates],
        "sets": len(inside),
        "covered": int(inside.sum()),
        "width": float(share.mean()),
        "top_sets": len(top_inside),
        "top_covered": int(top_inside.sum()),
        "top_width": float(top_share.mean()) if len(top_share) else None,
    }


def _covered(rate: Rate, seen: CensoredTimes, *, level: float) -> tuple[np.ndarray, FloatArray]:
    """Return which sets are covered, and the share of the run inside each interval."""
    low, high = rate.interval(seen.x, level=level)
    # A time was seen at a look: it lies after the look before.
    inside = (low <= seen.times) & (high > seen.times - seen.grain)
    inside = np.where(seen.times == 0, low <= 0, inside)
    inside = np.where(np.isinf(seen.times), high >= seen.end, inside)
    share = (np.clip(high, 0, seen.end) - np.clip(low, 0, seen.end)) / seen.end
    return inside, share


def _log_likelihood(at: FloatArray, z: FloatArray, times: FloatArray, end: FloatArray) -> float:
    middle, spread = at[0] + at[1] * z, math.exp(at[2])
    never = np.isinf(times)
    seen = np.where(never, 0.0, times)
    terms = np.where(
        never,
        stats.norm.logsf((end - middle) / spread),
        np.where(
            seen == 0.0,
            stats.norm.logcdf(-middle / spread),
            stats.norm.logpdf((seen - middle) / spread) - at[2],
        ),
    )
    return float(terms.sum())


def _inverse_curvature(loss: Callable[[FloatArray], float], at: FloatArray) -> FloatArray:
    """Return the inverse of the second derivatives of a convex function, by differences."""
    step = 1e-3 * np.maximum(np.abs(at), 0.1)
    moves = np.diag(step)
    second = np.array(
        [
            [
                (loss(at + a + b) + loss(at - a - b) - loss(at + a - b) - loss(at - a + b))
                / (4.0 * a.sum() * b.sum())
                for b in moves
            ]
            for a in moves
        ]
    )
    return np.asarray(np.linalg.inv(second))
