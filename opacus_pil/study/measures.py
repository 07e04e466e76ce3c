"""From trials to numbers: distance from the oracles, time to unlearn, loss barriers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..evaluation import time_to_unlearn
from .forget_sets import ForgetSet
from .settings import Settings

STATISTICS = ("confidence", "accuracy")
HEIGHTS = ("chord", "above_ends")  # of a loss barrier


@dataclass(frozen=True)
class SetMeasure:
    """One forget set, measured.

    Attributes:
        forget: The set.
        entry: What study.json says about it.
        steps: Steps of the records, shape (records,).
        curves: Confidence of each member, the mean over the runs, shape (records, members).
        targets: The same of the oracles, shape (members,).
        gaps: "confidence" and "loss" -> distance of each member's mean over the runs from its mean
            over the oracles, shape (records, members).
    """

    forget: ForgetSet
    entry: dict[str, Any]
    steps: FloatArray
    curves: FloatArray
    targets: FloatArray
    gaps: Mapping[str, FloatArray]

    def record(self, step: int) -> int:
        """Return the last record that is not after a step."""
        return int(np.searchsorted(self.steps, step, side="right")) - 1


def measure_set(
    forget: ForgetSet,
    *,
    settings: Settings,
    original: Mapping[str, Any],
    oracles: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    log_privacy_loss: FloatArray,
    distance: FloatArray,
    scores: Mapping[str, FloatArray],
) -> SetMeasure:
    """Put one forget set's trials together.

    A set's distance is the mean of its members', which bounds the shift of their sum as well as
    norms alone can.

    *Confidence* is the mean probability of the true class, a smooth relative of accuracy. Time to
    unlearn is read off the mean curve of the runs, and from each run by itself.
    """
    rows = forget.rows
    kept = np.setdiff1d(np.arange(len(log_privacy_loss)), rows)
    steps = np.asarray(runs[0]["steps"])
    curves = {
        "confidence": np.exp(-_stack(runs, "curve_loss")),  # (runs, records, members)
        "accuracy": _stack(runs, "curve_correct"),
    }
    retrained = {
        "confidence": np.exp(-_stack(oracles, "loss")[:, rows]),  # (oracles, members)
        "accuracy": _stack(oracles, "correct")[:, rows],
    }
    means = {name: curve.mean(axis=(0, 2)) for name, curve in curves.items()}
    targets = {name: values.mean(axis=1) for name, values in retrained.items()}
    member_curves = curves["confidence"].mean(axis=0)
    member_targets = retrained["confidence"].mean(axis=0)
    gaps = np.abs(member_curves - member_targets)
    in_loss = _stack(runs, "curve_loss").mean(axis=0) - _stack(oracles, "loss")[:, rows].mean(
        axis=0
    )
    times = {}
    for name in STATISTICS:
        for tolerance in settings.tolerances:
            how: dict[str, Any] = {
                "oracle_values": targets[name].tolist(), "tolerance": tolerance,
                "steps": steps.tolist(), "stay": settings.stay,
            }  # fmt: skip
            times[f"{name} within {tolerance:g}"] = {
                "mean_curve": time_to_unlearn(means[name], **how),
                "runs": [time_to_unlearn(one.mean(axis=1), **how) for one in curves[name]],
            }
    at = {f"{e} epochs": e * settings.sizes.steps_per_epoch for e in settings.sizes.budgets}
    at = {"0 epochs": 0, **at, f"{settings.sizes.unlearning_epochs} epochs": int(steps[-1])}
    entry = {
        "name": forget.name,
        "kind": forget.kind,
        "size": len(rows),
        "steps": int(steps[-1]),
        "record_every": int(steps[1] - steps[0]) if len(steps) > 1 else 1,
        "last_start": int(steps[max(len(steps) - settings.stay, 0)]),
        "log_privacy_loss": float(log_privacy_loss[rows].mean()),
        "log_distance": float(np.log(distance[rows].mean())),
        "scores": {name: _finite(values[rows].mean()) for name, values in scores.items()},
        "original": _levels(original, rows, kept),
        "unlearned": _mean([_levels(run, rows, kept) for run in runs]),
        "oracle": _mean([_levels(one, rows, kept) for one in oracles]),
        "oracle_confidence_std": _std(targets["confidence"]),
        "gap": {
            name: float(abs(means["confidence"][_record(steps, step)] - _grand(targets)))
            for name, step in at.items()
        },
        "instance_gap": {
            name: float(gaps[_record(steps, step)].mean()) for name, step in at.items()
        },
        "time_to_unlearn": times,
        "barriers": {
            pair: {
                split: {
                    height: float(np.mean([run["barriers"][pair][split][height] for run in runs]))
                    for height in HEIGHTS
                }
                for split in ("forget", "test")
            }
            for pair in ("original", "unlearned")
        },
    }
    return SetMeasure(
        forget, entry, steps, member_curves, member_targets,
        {"confidence": gaps, "loss": np.abs(in_loss)},
    )  # fmt: skip


def gaps_at(measures: Sequence[SetMeasure], *, step: int) -> tuple[IntArray, dict[str, FloatArray]]:
    """Return rows of these sets and their distances from the oracles after so many steps."""
    return np.concatenate([one.forget.rows for one in measures]), {
        name: np.concatenate([one.gaps[name][one.record(step)] for one in measures])
        for name in ("confidence", "loss")
    }


def _stack(trials: Sequence[Mapping[str, Any]], name: str) -> FloatArray:
    return np.stack([np.asarray(trial[name], dtype=np.float64) for trial in trials])


def _record(steps: FloatArray, step: int) -> int:
    """Return the last record that is not after a step."""
    return int(np.searchsorted(steps, step, side="right")) - 1


def _grand(targets: Mapping[str, FloatArray]) -> float:
    return float(targets["confidence"].mean())


def _std(values: FloatArray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _levels(trial: Mapping[str, Any], rows: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    loss = np.asarray(trial["loss"], dtype=np.float64)
    correct = np.asarray(trial["correct"], dtype=np.float64)
    return {
        "forget_loss": float(loss[rows].mean()),
        "forget_confidence": float(np.exp(-loss[rows]).mean()),
        "forget_accuracy": float(correct[rows].mean()),
        "retain_accuracy": float(correct[kept].mean()),
        "test_accuracy": float(trial["test_accuracy"]),
    }


def _mean(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([r[name] for r in records])) for name in records[0]}


def _finite(value: float) -> float | None:
    """Return a number, or None where it is infinite: JSON has none."""
    return float(value) if np.isfinite(value) else None
