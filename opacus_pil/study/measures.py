"""From trials to numbers: distance from the oracles, time to unlearn, loss barriers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._validate import FloatArray
from ..evaluation import time_to_unlearn
from .forget_sets import ForgetSet
from .settings import Settings

STATISTICS = ("confidence", "accuracy")


@dataclass(frozen=True)
class SetMeasure:
    """One forget set, measured.

    Attributes:
        entry: What study.json says about it.
        steps: Steps of the records, shape (records,).
        curves: Statistic -> mean over the runs, shape (records,).
        gaps: "confidence" and "loss" -> distance of each member's mean over the runs from its mean
            over the oracles, shape (records, members).
    """

    entry: dict[str, Any]
    steps: FloatArray
    curves: Mapping[str, FloatArray]
    gaps: Mapping[str, FloatArray]


def measure_set(
    forget: ForgetSet,
    *,
    settings: Settings,
    original: Mapping[str, Any],
    oracles: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    log_privacy_loss: FloatArray,
    scores: Mapping[str, FloatArray],
) -> SetMeasure:
    """Put one forget set's trials together.

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
    gaps = np.abs(curves["confidence"].mean(axis=0) - retrained["confidence"].mean(axis=0))
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
        "log_privacy_loss": float(log_privacy_loss[rows].mean()),
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
                split: float(np.mean([run["barriers"][pair][split] for run in runs]))
                for split in ("forget", "test")
            }
            for pair in ("original", "unlearned")
        },
    }
    return SetMeasure(entry, steps, means, {"confidence": gaps, "loss": np.abs(in_loss)})


def gaps_of_random_sets(
    measures: Sequence[SetMeasure], sets: Sequence[ForgetSet], *, step: int
) -> tuple[np.ndarray, dict[str, FloatArray]]:
    """Return rows of all random sets and their distances from the oracles after so many steps."""
    chosen = [(s, m) for s, m in zip(sets, measures, strict=True) if s.kind == "random"]
    rows = np.concatenate([s.rows for s, _ in chosen])
    return rows, {
        name: np.concatenate([m.gaps[name][_record(m.steps, step)] for _, m in chosen])
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
