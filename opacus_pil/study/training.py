"""One training of a condition from end to end: train, choose forget sets, retrain, unlearn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .._validate import FloatArray, IntArray
from ..evaluation import held_out_losses, mean_held_out, run_trials
from ..evaluation.ensemble import trial_key
from ..files.fingerprint import dataset_fingerprint
from . import trials
from .forget_sets import ForgetSet, folds, quantile_sets, random_sets, top_sets
from .measures import SetMeasure, measure_set
from .noisy_steps import noise_multiplier
from .privacy import contracted_losses, privacy_losses, ties_broken
from .settings import Condition, Settings

REFERENCE = "clipped privacy loss"
VARIANTS = (
    "unclipped privacy loss",
    "contracted loss",
    "held-out privacy loss",
    "clipped, ties by unclipped",
)


@dataclass(frozen=True)
class Bench:
    """Where and how trials run.

    Attributes:
        settings: Of the study.
        folder: Of the trials.
        seed: Of one training's split, initialisation and trials.
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

    @cached_property
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


@dataclass(frozen=True)
class Training:
    """What one training and its forget sets came to.

    Attributes:
        entry: Its part of study.json.
        scores: Name -> shape (instances,), higher is harder; `REFERENCE` and `VARIANTS` first.
        measures: One per forget set.
    """

    entry: dict[str, Any]
    scores: Mapping[str, FloatArray]
    measures: tuple[SetMeasure, ...]

    def of_kind(self, kind: str) -> list[SetMeasure]:
        """Return the measures of the sets of one kind."""
        return [one for one in self.measures if one.forget.kind == kind]


def run_training(condition: Condition, *, bench: Bench) -> Training:
    """Run one training of a condition with all its trials, or read what of it is finished."""
    settings, sizes = bench.settings, bench.settings.sizes
    name = f"{condition.model}, {condition.name}, training {bench.seed}"
    common = trials.common_config(settings, condition, seed=bench.seed)
    first = {
        **common, "kind": "original", "seed": _seed(bench.seed, 0),
        "early_epochs": min(settings.early_epochs, condition.epochs),
    }  # fmt: skip
    (original,) = bench.run(trials.original, [first], f"{name}: training")
    parts = folds(sizes.train, parts=sizes.folds, seed=bench.seed)
    without = bench.run(
        trials.held_out,
        [
            {**common, "kind": "held out", "forget_set": part, "seed": _seed(bench.seed, 100 + k)}
            for k, part in enumerate(parts)
        ],
        f"{name}: folds",
    )
    scores, entry = _scores(original, without, parts, condition=condition, settings=settings)
    sets = quantile_sets(scores[REFERENCE], ends=sizes.set_ends, size=sizes.set_size)
    sets += random_sets(sizes.train, sets=sizes.random_sets, size=sizes.set_size, seed=bench.seed)
    sets += top_sets(scores, size=sizes.set_size)
    pairs = [(s, k) for s in sets for k in range(sizes.seeds)]
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
    bench.say(f"{name}: {len(sets)} forget sets x {sizes.seeds} oracles and runs")
    measures = tuple(
        _measured(
            s, original, oracles[i * sizes.seeds :][: sizes.seeds],
            runs[i * sizes.seeds :][: sizes.seeds], scores, settings,
        )
        for i, s in enumerate(sets)
    )  # fmt: skip
    return Training(
        {**entry, "forget_sets": [measure.entry for measure in measures]}, scores, measures
    )


def _measured(
    forget: ForgetSet,
    original: Mapping[str, Any],
    oracles: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    scores: Mapping[str, FloatArray],
    settings: Settings,
) -> SetMeasure:
    return measure_set(
        forget, settings=settings, original=original, oracles=oracles, runs=runs,
        log_privacy_loss=np.log(scores[REFERENCE]), distance=scores["contracted loss"],
        scores=scores,
    )  # fmt: skip


def _scores(
    original: Mapping[str, Any],
    without: list[dict[str, Any]],
    parts: list[IntArray],
    *,
    condition: Condition,
    settings: Settings,
) -> tuple[dict[str, FloatArray], dict[str, Any]]:
    """Return every score of this training, and what study.json says about their making."""
    sizes = settings.sizes
    noise = noise_multiplier(condition, batch_size=sizes.batch_size)
    rate = sizes.batch_size / sizes.train
    norms = original["norms"].numpy()
    how: dict[str, Any] = {
        "steps_per_epoch": sizes.steps_per_epoch, "noise_multiplier": noise, "sample_rate": rate,
    }  # fmt: skip
    clipped = privacy_losses(norms, **how, order=settings.order, max_grad_norm=settings.clip)
    unclipped = privacy_losses(norms, **how, order=settings.order)
    bound = clipped.max_grad_norm
    assert bound is not None
    contracted = contracted_losses(
        norms, steps_per_epoch=sizes.steps_per_epoch, max_grad_norm=bound,
        decay_per_epoch=settings.decay_per_epoch,
    )  # fmt: skip
    apart = np.zeros((len(parts), sizes.train), dtype=bool)
    seen = np.full((len(parts), len(norms), sizes.train), np.nan)
    for k, (part, run) in enumerate(zip(parts, without, strict=True)):
        apart[k, part] = True
        seen[k][:, part] = run["norms"].numpy()
    held_out = held_out_losses(
        seen, held_out=apart, noise_multiplier=noise / bound, sample_rate=rate,
        max_grad_norm=bound, steps_per_checkpoint=sizes.steps_per_epoch,
    )  # fmt: skip
    losses = np.stack([run["loss"].numpy() for run in without])
    proxies = {name.replace("_", " "): values for name, values in original["scores"].items()}
    proxies = {name: np.asarray(values) for name, values in proxies.items()}
    scores = {
        REFERENCE: clipped.values,
        VARIANTS[0]: unclipped.values,
        VARIANTS[1]: contracted.values,
        VARIANTS[2]: held_out.values,
        VARIANTS[3]: ties_broken(clipped.values, unclipped.values),
        **proxies,
        "held out loss": mean_held_out(losses, held_out=apart),
    }
    other = privacy_losses(norms, **how, order=settings.other_order, max_grad_norm=bound)
    log_loss = np.log(clipped.values)
    entry = {
        "max_grad_norm": bound,
        "tied_at_the_bound": float((norms >= bound).all(axis=0).mean()),
        "guarantee": clipped.guarantee,
        "reasons": {
            REFERENCE: clipped.reasons, VARIANTS[0]: unclipped.reasons,
            VARIANTS[1]: contracted.reasons, VARIANTS[2]: held_out.reasons,
        },
        "train_accuracy": float(original["correct"].double().mean()),
        "test_accuracy": original["test_accuracy"],
        "log_privacy_loss_quantiles": np.quantile(log_loss, [0, 0.1, 0.5, 0.9, 1]).tolist(),
        "orders_agree": float(spearmanr(clipped.values, other.values).statistic),
    }  # fmt: skip
    return {name: v for name, v in scores.items() if not np.isnan(v).any()}, entry


def _seed(training: int, number: int) -> int:
    """Return a trial's seed; no two numbers of a training share one."""
    return 1000 * training + number
