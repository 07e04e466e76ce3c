"""Claims (a) and (c) as statistics of measured forget sets, each with a verdict in words.

Knows numbers only, those of several trainings: every statistic is computed within a training and
averaged, and its interval is over trainings and, within them, sets. "yes" and "no" are said where
such an interval decides, else "undecided". Claim (b) is `scores` and `top`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..evaluation.bootstrap import Estimate, Statistic, bootstrap_nested
from ..evaluation.rank_correlation import spearman_statistics
from .measures import HEIGHTS

BARRIER = 0.01  # nats; a smaller one is called none

Entry = Mapping[str, Any]
Points = list[tuple[FloatArray, FloatArray]]  # x and y of the sets of each training


def time_claim(
    trainings: Sequence[Sequence[Entry]], *, resamples: int, seed: int
) -> dict[str, Any]:
    """(a) Time to unlearn against the mean log privacy loss, for every definition of reached.

    Two lines: through the quantile and random sets that get there, and through all of them with
    those that do not put at the end of the run, which makes the slope too small. Ranks count these
    as later than all others. Reproduced: the second slope and the rank correlation are both
    positive beyond their intervals, and three sets of each training on average get there neither at
    once nor never, for between two groups any curve fits. R² says how straight the line is.
    """
    sets = [chosen(entries) for entries in trainings]
    how: dict[str, Any] = {"resamples": resamples, "seed": seed}
    found = {}
    for name in sets[0][0]["time_to_unlearn"]:
        times = [
            [entry["time_to_unlearn"][name]["mean_curve"] for entry in entries] for entries in sets
        ]
        y = [np.array([np.inf if t is None else float(t) for t in one]) for one in times]
        x = [_column(entries, "log_privacy_loss") for entries in sets]
        at_least = [
            np.minimum(one, _column(entries, "steps")) for one, entries in zip(y, sets, strict=True)
        ]
        got = [np.isfinite(one) for one in y]
        whole = line_through(list(zip(x, at_least, strict=True)), **how)
        ranks = ranked(list(zip(x, y, strict=True)), **how)
        low, high = whole["interval"] or (None, None)
        all_times = np.concatenate(y)
        between = int((np.isfinite(all_times) & (all_times > 0)).sum())
        enough = between >= 3 * len(sets)
        rises = low is not None and low > 0 and ranks.sign > 0 and enough
        falls = high is not None and high < 0 and ranks.sign < 0 and enough
        found[name] = {
            "reached": int(np.isfinite(all_times).sum()),
            "sets": len(all_times),
            "at_once": int((all_times == 0).sum()),
            "later": between,
            "line": line_through(
                [(a[g], b[g]) for a, b, g in zip(x, y, got, strict=True)], **how
            ),
            "line_with_unreached_at_the_end": whole,
            "spearman": estimate(ranks, limit=1.0),
            "reproduced": "yes" if rises else ("no" if falls else "undecided"),
        }  # fmt: skip
    return found


def gap_claim(trainings: Sequence[Sequence[Entry]], *, resamples: int, seed: int) -> dict[str, Any]:
    """(a), the steadier measure: the gap to the oracles after a fixed budget against log P."""
    found = {}
    for name in trainings[0][0]["gap"]:
        points = _points(trainings, "gap", name)
        ranks = ranked(points, resamples=resamples, seed=seed)
        found[name] = {
            "line": line_through(points, resamples=resamples, seed=seed),
            "spearman": estimate(ranks, limit=1.0),
            "reproduced": verdict(ranks),
        }
    return found


def barrier_claim(
    trainings: Sequence[Sequence[Entry]], *, resamples: int, seed: int
) -> dict[str, Any]:
    """(c) Loss barriers to the oracles against the mean log privacy loss.

    Two heights: above the chord between the end losses, and above the larger of them. Undecided
    where fewer than three sets of a training, on average, have one above `BARRIER` nats: ranks of
    nothing.
    """
    found: dict[str, Any] = {}
    for pair in ("original", "unlearned"):
        for split in ("forget", "test"):
            found[f"{pair} to oracle, {split}"] = {}
            for height in HEIGHTS:
                points = _points(trainings, "barriers", pair, split, height)
                ranks = ranked(points, resamples=resamples, seed=seed)
                y = np.concatenate([one for _, one in points])
                many = int((y > BARRIER).sum())
                found[f"{pair} to oracle, {split}"][height] = {
                    "spearman": estimate(ranks, limit=1.0),
                    "least": float(y.min()),
                    "largest": float(y.max()),
                    "sets": len(y),
                    "barriers": many,
                    "reproduced": verdict(ranks) if many >= 3 * len(points) else "undecided",
                }
    return found


def ranked(points: Points, *, resamples: int, seed: int) -> Estimate:
    """Return the rank correlation of x and y within a training, averaged over trainings."""
    (found,) = bootstrap_nested(
        [spearman_statistics([x], y) for x, y in points], counts=[len(x) for x, _ in points],
        resamples=resamples, seed=seed,
    )  # fmt: skip
    return found


def line_through(points: Points, *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the least-squares line y = intercept + slope·x within a training, averaged.

    Trainings with fewer than three points, or with one x, have no line and are left out; `count`
    is the number of points that are in.
    """
    usable = [(x, y) for x, y in points if len(x) >= 3 and np.ptp(x) > 0]
    if not usable:
        return {"count": 0, "slope": None, "interval": None, "r2": None, "intercept": None}
    slope, intercept, r2 = bootstrap_nested(
        [_line(x, y) for x, y in usable], counts=[len(x) for x, _ in usable],
        resamples=resamples, seed=seed,
    )  # fmt: skip
    return {
        "count": slope.count,
        "slope": slope.value,
        "interval": [finite(slope.low), finite(slope.high)],
        "intercept": intercept.value,
        "r2": finite(r2.value),
    }


def _line(x: FloatArray, y: FloatArray) -> Statistic:
    """Return slope, intercept and R² as a statistic to resample: shape (draws, 3)."""

    def statistic(taken: IntArray) -> FloatArray:
        weight = taken / taken.sum(axis=1, keepdims=True)
        mean_x, mean_y = (weight * x).sum(axis=1), (weight * y).sum(axis=1)
        dx, dy = x - mean_x[:, None], y - mean_y[:, None]
        both, square = (weight * dx * dy).sum(axis=1), (weight * dx * dx).sum(axis=1)
        with np.errstate(invalid="ignore"):  # one set drawn every time: no line; y constant: no R²
            slope = both / square
            r2 = both * slope / (weight * dy * dy).sum(axis=1)
        return np.stack([slope, mean_y - slope * mean_x, r2], axis=1)

    return statistic


def chosen(entries: Sequence[Entry]) -> list[Entry]:
    """Return the quantile and random sets: tops of scores take no part in fits."""
    return [entry for entry in entries if entry["kind"] != "top"]


def verdict(ranks: Estimate) -> str:
    """Return what the sign of an interval says."""
    return {1: "yes", 0: "undecided", -1: "no"}[ranks.sign]


def estimate(found: Estimate, *, limit: float = np.inf) -> dict[str, Any]:
    """Return an estimate as JSON has it, its interval inside [-limit, limit]."""
    low, high = np.clip([found.low, found.high], -limit, limit)
    return {"value": finite(found.value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """Return a number, or None where it is infinite or undefined: JSON has neither."""
    return float(value) if np.isfinite(value) else None


def _points(trainings: Sequence[Sequence[Entry]], *path: str) -> Points:
    """Return log privacy losses and what an entry says under these names, of each training."""
    points = []
    for entries in trainings:
        found: list[Any] = chosen(entries)
        x = _column(found, "log_privacy_loss")
        for name in path:
            found = [entry[name] for entry in found]
        points.append((x, np.array(found, dtype=np.float64)))
    return points


def _column(entries: Sequence[Entry], name: str) -> FloatArray:
    return np.array([float(entry[name]) for entry in entries])
