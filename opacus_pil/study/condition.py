"""One condition: its trainings, and the claims judged over all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import claims, scores, top
from .measures import gaps_at
from .prediction import prediction_claim
from .settings import Condition, Settings
from .training import REFERENCE, VARIANTS, Bench, Training, run_training


def run_condition(condition: Condition, *, bench: Bench) -> dict[str, Any]:
    """Run one condition, or read what of it is finished; return its entry in study.json."""
    sizes = bench.settings.sizes
    trainings = [
        run_training(condition, bench=replace(bench, seed=number))
        for number in training_seeds(bench.seed, count=sizes.trainings)
    ]
    return {
        "model": condition.model,
        "name": condition.name,
        "noise_std": condition.noise_std,
        "nominal_noise_std": condition.nominal_noise_std,
        "weight_decay": condition.weight_decay,
        "epochs": condition.epochs,
        "guarantee": "estimate",
        "steps_per_epoch": sizes.steps_per_epoch,
        "seeds": sizes.seeds,
        "trainings": [training.entry for training in trainings],
        **judged(trainings, settings=bench.settings, seed=bench.seed),
    }


def training_seeds(study: int, *, count: int) -> list[int]:
    """Return the seeds of a study's trainings; no two studies share one, up to 100 trainings."""
    return [100 * study + number for number in range(count)]


def judged(trainings: list[Training], *, settings: Settings, seed: int) -> dict[str, Any]:
    """Return the claims' entries."""
    how: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    sizes = settings.sizes
    sets = [training.entry["forget_sets"] for training in trainings]
    step = sizes.budgets[-1] * sizes.steps_per_epoch
    hard: dict[str, list[Any]] = {"confidence": [], "loss": []}
    for training in trainings:
        rows, gaps = gaps_at(training.of_kind("random"), step=step)
        known = {name: values[rows] for name, values in training.scores.items()}
        for statistic, distances in gaps.items():
            hard[statistic].append((known, distances))
    tops = [training.of_kind("top") for training in trainings]
    return {
        "time_against_log_privacy_loss": claims.time_claim(sets, **how),
        "prediction": prediction_claim(sets, level=settings.level),
        "gap_against_log_privacy_loss": claims.gap_claim(sets, **how),
        "barriers_against_log_privacy_loss": claims.barrier_claim(sets, **how),
        "scores": {
            statistic: {
                "after_epochs": sizes.budgets[-1],
                **scores.score_claim(
                    cases, reference=REFERENCE, variants=VARIANTS, margin=settings.margin, **how
                ),
            }
            for statistic, cases in hard.items()
        },
        "top_sets": {
            "after_epochs": sizes.budgets[-1],
            **top.top_claim(
                tops, reference=REFERENCE, variants=VARIANTS, step=step,
                tolerances=settings.tolerances, stay=settings.stay, **how,
            ),
        },
    }  # fmt: skip
