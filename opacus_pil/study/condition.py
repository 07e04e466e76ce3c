"""One condition from end to end: train, choose forget sets, retrain, unlearn, measure, judge."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import rank_correlation, run_trials
from ..evaluation.ensemble import trial_key
from ..files.fingerprint import dataset_fingerprint
from . import claims, trials
from .forget_sets import ForgetSet, quantile_sets, random_sets, top_sets
from .measures import SetMeasure, gaps_of_random_sets, measure_set
from .noisy_steps import noise_multiplier
from .privacy import privacy_losses
from .settings import Condition, Settings


@dataclass(frozen=True)
class Sweep:
    """A condition's outcome: its entry in study.json, and the curves that figures need."""

    condition: Condition
    entry: dict[str, Any]
    measures: tuple[SetMeasure, ...]


@dataclass(frozen=True)
class Bench:
    """Where and how trials run.

    Attributes:
        settings: Of the study.
        folder: Of the trials.
        seed: Of the study.
        jobs: Processes.
        progress: Bars.
        say: Prints a line.
    """

    settings: Settings
    folder: Path
    seed: int
    jobs: int
    progress: bool
    say: Callable[[str], None]

    def run(
        self, trial: Any, configs: list[dict[str, Any]], description: str
    ) -> list[dict[str, Any]]:
        """Run trials of this study."""
        return run_trials(
            trial, configs=configs, folder=self.folder, fingerprint=self.fingerprint,
            n_jobs=min(self.jobs, max(len(configs), 1)), progress=self.progress,
            description=description,
        )  # fmt: skip

    def key(self, config: dict[str, Any]) -> str:
        """Return the key of a trial of this study."""
        return trial_key(config, fingerprint=self.fingerprint)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data."""
        sizes = self.settings.sizes
        data = trials.parts(self.settings.dataset, sizes.train, sizes.test, self.seed)
        return {
            name: dict(dataset_fingerprint(_Rows(part.images, part.labels)))
            for name, part in data.items()
        }


class _Rows:
    """Images and labels as the fingerprint reads them."""

    def __init__(self, data: Any, labels: Any) -> None:
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.labels)


def run_condition(condition: Condition, *, bench: Bench) -> Sweep:
    """Run one condition, or read what of it is finished."""
    settings, sizes = bench.settings, bench.settings.sizes
    common = trials.common_config(settings, condition, seed=bench.seed)
    first = {
        **common, "kind": "original", "seed": _seed(bench.seed, 0),
        "early_epochs": min(settings.early_epochs, condition.epochs),
    }  # fmt: skip
    name = f"{condition.model}, {condition.name}"
    known = (bench.folder / bench.key(first)).exists()  # reads the data too, before the clock runs
    started = time.monotonic()
    (original,) = bench.run(trials.original, [first], f"{name}: training")
    seconds = time.monotonic() - started
    noise = noise_multiplier(condition, batch_size=sizes.batch_size)
    log_loss, at_other_order, at_more_noise = (
        np.log(
            privacy_losses(
                original["norms"].numpy(),
                steps_per_epoch=sizes.steps_per_epoch,
                noise_multiplier=factor * noise,
                sample_rate=sizes.batch_size / sizes.train,
                order=order,
            )
        )
        for order, factor in ((settings.order, 1), (settings.other_order, 1), (settings.order, 10))
    )
    variants = {
        f"privacy loss, order {settings.other_order:g}": at_other_order,
        "privacy loss, ten times the noise": at_more_noise,
    }
    scores = {claims.REFERENCE: log_loss}
    scores |= {key.replace("_", " "): value.numpy() for key, value in original["scores"].items()}
    scores = {key: value for key, value in scores.items() if not np.isnan(value).any()}
    sets = _sets(log_loss, scores, condition=condition, bench=bench)
    count = sizes.seeds if condition.complete else sizes.few_seeds
    pairs = [(s, k) for s in sets for k in range(count)]
    minutes = 2 * len(pairs) * seconds / bench.jobs / 60
    budget = f"one took {seconds:.1f} s, so about {minutes:.0f} min on {bench.jobs} processes"
    bench.say(
        f"{name}: {len(sets)} forget sets x {count} seeds = {len(pairs)} oracles and as many runs; "
        + ("going on" if known else budget)
    )
    retraining = [
        {**common, "kind": "oracle", "forget_set": s.rows, "seed": _seed(bench.seed, 1 + k)}
        for s, k in pairs
    ]
    oracles = bench.run(trials.oracle, retraining, f"{name}: oracles")
    tuning = [
        {
            **common, "kind": "unlearning", "forget_set": s.rows, "seed": _seed(bench.seed, 50 + k),
            "start": bench.key(first), "oracle": bench.key(config),
            "unlearning_epochs": sizes.unlearning_epochs,
            "record_every": max(sizes.steps_per_epoch // sizes.records_per_epoch, 1),
            "barrier_rows": sizes.barrier_rows,
        }
        for (s, k), config in zip(pairs, retraining, strict=True)
    ]  # fmt: skip
    runs = bench.run(
        partial(trials.unlearning, folder=str(bench.folder)), tuning, f"{name}: unlearning"
    )
    measures = tuple(
        measure_set(
            s, settings=settings, original=original, oracles=oracles[i * count :][:count],
            runs=runs[i * count :][:count], log_privacy_loss=log_loss, scores=scores,
        )
        for i, s in enumerate(sets)
    )  # fmt: skip
    entry = {
        "model": condition.model,
        "name": condition.name,
        "noise_std": condition.noise_std,
        "nominal_noise_std": condition.nominal_noise_std,
        "weight_decay": condition.weight_decay,
        "epochs": condition.epochs,
        "guarantee": "estimate",
        "train_accuracy": float(original["correct"].double().mean()),
        "test_accuracy": original["test_accuracy"],
        "log_privacy_loss_quantiles": np.quantile(log_loss, [0, 0.1, 0.5, 0.9, 1]).tolist(),
        "orders_agree": rank_correlation(
            log_loss, target=at_other_order, resamples=settings.resamples, seed=bench.seed
        ).value,
        "steps_per_epoch": sizes.steps_per_epoch,
        "seeds": count,
        "forget_sets": [measure.entry for measure in measures],
        **_judged(measures, sets, scores, variants, condition=condition, bench=bench),
    }
    return Sweep(condition, entry, measures)


def _judged(
    measures: tuple[SetMeasure, ...],
    sets: list[ForgetSet],
    scores: dict[str, Any],
    variants: dict[str, Any],
    *,
    condition: Condition,
    bench: Bench,
) -> dict[str, Any]:
    """Return the claims' entries."""
    settings = bench.settings
    how = {"resamples": settings.resamples, "seed": bench.seed}
    entries = [measure.entry for measure in measures]
    found: dict[str, Any] = {
        "time_against_log_privacy_loss": claims.time_claim(entries, **how),
        "gap_against_log_privacy_loss": claims.gap_claim(entries, **how),
        "barriers_against_log_privacy_loss": claims.barrier_claim(entries, **how),
        "scores": None,
    }
    if condition.complete:
        budget = settings.sizes.budgets[-1]
        rows, hard = gaps_of_random_sets(
            measures, sets, step=budget * settings.sizes.steps_per_epoch
        )
        found["scores"] = {
            statistic: {
                "after_epochs": budget,
                **claims.score_claim(
                    {name: values[rows] for name, values in scores.items()},
                    variants={name: values[rows] for name, values in variants.items()},
                    hardness=gaps,
                    **how,
                ),
            }
            for statistic, gaps in hard.items()
        }
    return found


def _sets(
    log_loss: Any, scores: dict[str, Any], *, condition: Condition, bench: Bench
) -> list[ForgetSet]:
    sizes = bench.settings.sizes
    found = quantile_sets(log_loss, ends=sizes.set_ends, size=sizes.set_size)
    if condition.complete:
        found += random_sets(
            len(log_loss), sets=sizes.random_sets, size=sizes.set_size, seed=bench.seed
        )
        if condition.top_sets:
            found += top_sets(scores)
    return found


def _seed(study: int, number: int) -> int:
    """Return a trial's seed; no two numbers of a study share one."""
    return 1000 * study + number
