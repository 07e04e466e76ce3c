"""Claim (b), top sets: whose hardest instances, forgotten together, are hardest to forget.

Knows measured forget sets, one for the top of every score in each training, all of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..evaluation.bootstrap import Statistic, bootstrap_nested
from .claims import estimate
from .measures import SetMeasure
from .scores import word


def top_claim(
    trainings: Sequence[Sequence[SetMeasure]],
    *,
    reference: str,
    variants: Sequence[str],
    step: int,
    tolerances: Sequence[float],
    stay: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """(b) Gap and time to unlearn of the top of every score, beside those of the reference's top.

    The gap is the mean distance of the members' confidence from the oracles' after `step` steps.
    The time is when their mean confidence is within a tolerance of the oracles' and stays there;
    a set that does not get there counts with the last step, which makes differences smaller.
    Resampled are trainings and, within them, instances: one that is in two tops is drawn in both.

    Returns:
        Per score, `gap` and `time within …`, each with the reference's lead, larger is harder; for
        each of these measures the proxies whose top is easier or harder; the verdict by the gap.
    """
    names = [m.forget.name for m in trainings[0]]
    names = [n for n in names if all(n in [m.forget.name for m in ms] for ms in trainings)]
    labels = ["gap", *(f"time within {tolerance:g}" for tolerance in tolerances)]
    statistics, counts = [], []
    for measures in trainings:
        by_name = {m.forget.name: m for m in measures}
        sets = [by_name[name] for name in names]
        rows = np.unique(np.concatenate([m.forget.rows for m in sets]))
        counts.append(len(rows))
        statistics.append(
            _tops(sets, rows, names.index(reference), step=step, tolerances=tolerances, stay=stay)
        )
    found = iter(bootstrap_nested(statistics, counts=counts, resamples=resamples, seed=seed))
    values = {label: {name: next(found) for name in names} for label in labels}
    leads = {label: {name: next(found) for name in names} for label in labels}
    proxies = [name for name in names if name != reference and name not in variants]
    harder, easier = (
        {label: [n for n in proxies if leads[label][n].sign == sign] for label in labels}
        for sign in (1, -1)
    )
    return {
        "size": len(trainings[0][0].forget.rows),
        "scores": {
            name: {
                label: {
                    "value": estimate(values[label][name]),
                    "reference_minus_this": estimate(leads[label][name]),
                    "reference_is": word(leads[label][name], "harder", "easier"),
                }
                for label in labels
            }
            for name in names
        },
        "proxies": proxies,
        "harder_than": harder,
        "easier_than": easier,
        "reproduced": "no" if easier["gap"] else ("yes" if harder["gap"] else "undecided"),
    }


def _tops(
    sets: Sequence[SetMeasure],
    rows: IntArray,
    base: int,
    *,
    step: int,
    tolerances: Sequence[float],
    stay: int,
) -> Statistic:
    """Return every measure of every set, then the leads: shape (draws, 2 · measures · sets)."""
    places = [np.searchsorted(rows, one.forget.rows) for one in sets]

    def statistic(taken: IntArray) -> FloatArray:
        each = []
        for one, place in zip(sets, places, strict=True):
            weight = taken[:, place] / np.maximum(taken[:, place].sum(axis=1, keepdims=True), 1)
            gap = weight @ one.gaps["confidence"][one.record(step)]
            away = np.abs(weight @ one.curves.T - (weight @ one.targets)[:, None])
            each.append([gap, *(_first(away <= t, one.steps, stay=stay) for t in tolerances)])
        found = np.array(each).transpose(2, 1, 0)  # (draws, measures, sets)
        leads = found[:, :, [base]] - found
        return np.concatenate([found, leads], axis=1).reshape(len(taken), -1)

    return statistic


def _first(reached: np.ndarray, steps: FloatArray, *, stay: int) -> FloatArray:
    """Return the first step from which a curve stays, the last step where it never does."""
    starts = reached.shape[1] - stay + 1
    stays = np.logical_and.reduce([reached[:, k : k + starts] for k in range(stay)])
    first = steps[stays.argmax(axis=1)]
    return np.where(stays.any(axis=1), first, steps[-1]).astype(np.float64)
