"""Claims (a), (b) and (c) as statistics of measured forget sets, each with a verdict in words.

Knows numbers only. "yes" and "no" are said where a bootstrap interval decides, else "undecided".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..evaluation import compare_groups, compare_scores, rank_correlation
from ..evaluation.bootstrap import Estimate, bootstrap

REFERENCE = "privacy loss"
BARRIER = 0.01  # nats; a smaller one is called none


def line_through(x: FloatArray, y: FloatArray, *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the least-squares line y = intercept + slope·x, R², and the slope's interval."""
    if len(x) < 3 or np.ptp(x) == 0:
        return {"count": len(x), "slope": None, "interval": None, "r2": None, "intercept": None}

    def slope(taken: IntArray) -> FloatArray:
        weight = taken / taken.sum(axis=1, keepdims=True)
        dx = x - (weight * x).sum(axis=1, keepdims=True)
        dy = y - (weight * y).sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):  # one set drawn every time: no line
            return np.asarray((weight * dx * dy).sum(axis=1) / (weight * dx * dx).sum(axis=1))

    found = bootstrap(slope, count=len(x), resamples=resamples, interval="percentile", seed=seed)
    spread = float(np.var(y))
    residual = y - y.mean() - found.value * (x - x.mean())
    return {
        "count": len(x),
        "slope": found.value,
        "interval": [_finite(found.low), _finite(found.high)],
        "intercept": float(y.mean() - found.value * x.mean()),
        "r2": None if spread == 0 else 1.0 - float(np.mean(residual**2)) / spread,
    }


def time_claim(
    entries: Sequence[Mapping[str, Any]], *, resamples: int, seed: int
) -> dict[str, Any]:
    """(a) Time to unlearn against the mean log privacy loss, for every definition of reached.

    Two lines: through the quantile and random sets that get there, and through all of them with
    those that do not put at the end of the run, which makes the slope too small. Ranks count these
    as later than all others. Reproduced: the second slope and the rank correlation are both
    positive beyond their intervals, and three sets at least get there neither at once nor never,
    for between two groups any curve fits. R² says how straight the line is.
    """
    sets = [entry for entry in entries if entry["kind"] != "top"]
    x = np.array([entry["log_privacy_loss"] for entry in sets])
    found = {}
    for name in sets[0]["time_to_unlearn"]:
        times = [entry["time_to_unlearn"][name]["mean_curve"] for entry in sets]
        got = np.array([time is not None for time in times])
        y = np.array([np.inf if time is None else float(time) for time in times])
        how: dict[str, Any] = {"resamples": resamples, "seed": seed}
        line = line_through(x[got], y[got], **how)
        at_least = np.minimum(y, [entry["steps"] for entry in sets])
        whole = line_through(x, at_least, **how)
        ranks = rank_correlation(x, target=y, **how)
        low, high = whole["interval"] or (None, None)
        between = int((got & (y > 0)).sum())
        rises = low is not None and low > 0 and ranks.sign > 0 and between >= 3
        falls = high is not None and high < 0 and ranks.sign < 0 and between >= 3
        found[name] = {
            "reached": int(got.sum()),
            "sets": len(sets),
            "at_once": int((y == 0).sum()),
            "later": between,
            "line": line,
            "line_with_unreached_at_the_end": whole,
            "spearman": _estimate(ranks),
            "reproduced": "yes" if rises else ("no" if falls else "undecided"),
        }
    return found


def gap_claim(entries: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """(a), the steadier measure: the gap to the oracles after a fixed budget against log P."""
    sets = [entry for entry in entries if entry["kind"] != "top"]
    x = np.array([entry["log_privacy_loss"] for entry in sets])
    found = {}
    for name in sets[0]["gap"]:
        y = np.array([entry["gap"][name] for entry in sets])
        ranks = rank_correlation(x, target=y, resamples=resamples, seed=seed)
        found[name] = {
            "line": line_through(x, y, resamples=resamples, seed=seed),
            "spearman": _estimate(ranks),
            "reproduced": _sign(ranks),
        }
    return found


def score_claim(
    scores: Mapping[str, FloatArray],
    *,
    hardness: FloatArray,
    variants: Mapping[str, FloatArray] | None = None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """(b) Which score ranks the instances of random forget sets best, and whose top decile is
    hardest.

    Args:
        scores: Name -> shape (instances,), higher is harder, `REFERENCE` among them.
        hardness: Shape (instances,): distance from the oracles after a fixed budget.
        variants: The privacy loss computed in other ways: listed with the scores, without a part in
            the verdict.
    """
    shown = {**scores, **(variants or {})}
    how: dict[str, Any] = {
        "reference": REFERENCE, "resamples": resamples, "seed": seed,
        "nan_policy": "raise",  # full passes look at everybody
    }  # fmt: skip
    ranked = compare_scores(shown, target=hardness, **how)
    groups = compare_groups(shown, hardness=hardness, **how)
    others = [name for name in scores if name != REFERENCE]
    worse = any(ranked[name].verdict == "worse" for name in others)
    foresees = ranked[REFERENCE].correlation.sign > 0  # else "not worse" says nothing
    return {
        "instances": len(hardness),
        "scores": {
            name: {
                "spearman": _estimate(ranked[name].correlation),
                "reference_minus_this": _estimate(ranked[name].difference),
                "reference_is": ranked[name].verdict,
                "top_decile": _estimate(groups[name].top),
                "reference_top_minus_this": _estimate(groups[name].difference),
                "reference_top_is": groups[name].verdict,
            }
            for name in shown
        },
        "variants": list(variants or {}),
        "better_than": [n for n in others if ranked[n].verdict == "better"],
        "worse_than": [n for n in others if ranked[n].verdict == "worse"],
        "harder_top_than": [n for n in others if groups[n].verdict == "harder"],
        "easier_top_than": [n for n in others if groups[n].verdict == "easier"],
        "reproduced": "no" if worse else ("yes" if foresees else "undecided"),
    }


def barrier_claim(
    entries: Sequence[Mapping[str, Any]], *, resamples: int, seed: int
) -> dict[str, Any]:
    """(c) Loss barriers to the oracles against the mean log privacy loss.

    Undecided where fewer than three sets have a barrier above `BARRIER` nats: ranks of nothing.
    """
    sets = [entry for entry in entries if entry["kind"] != "top"]
    x = np.array([entry["log_privacy_loss"] for entry in sets])
    found = {}
    for pair in ("original", "unlearned"):
        for split in ("forget", "test"):
            y = np.array([entry["barriers"][pair][split] for entry in sets])
            ranks = rank_correlation(x, target=y, resamples=resamples, seed=seed)
            found[f"{pair} to oracle, {split}"] = {
                "spearman": _estimate(ranks),
                "least": float(y.min()),
                "largest": float(y.max()),
                "barriers": int((y > BARRIER).sum()),
                "reproduced": _sign(ranks) if (y > BARRIER).sum() >= 3 else "undecided",
            }
    return found


def _sign(ranks: Estimate) -> str:
    return {1: "yes", 0: "undecided", -1: "no"}[ranks.sign]


def _estimate(found: Estimate) -> dict[str, Any]:
    return {
        "value": _finite(found.value), "low": _finite(found.low), "high": _finite(found.high)
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
