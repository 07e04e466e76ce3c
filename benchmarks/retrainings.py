"""Trainings, oracles and unlearning runs that three benchmarks read: no question of its own.

Three trainings of each condition (own split, initialisation, batches, noise) on 2,000 images of
MNIST-5k; of each, quantile sets by privacy loss and random sets, 100 images each; for each set,
models retrained without it and runs of fine-tuning without it (`AMOUNTS`). Trials are those of
`opacus_pil.study` and are kept in a folder: a second script finds what the first computed.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from opacus_pil.datasets import ImageData
from opacus_pil.study import trials
from opacus_pil.study.condition import Bench
from opacus_pil.study.forget_sets import ForgetSet, quantile_sets, random_sets
from opacus_pil.study.noisy_steps import make_model, noise_multiplier, run_steps
from opacus_pil.study.privacy import privacy_losses
from opacus_pil.study.settings import Condition, Settings, study_settings

NOISE = 0.01
CONDITIONS = (
    Condition("sgd", "mlp", 0.0, NOISE),
    Condition("sgld", "mlp", NOISE, NOISE),
    Condition("sgd", "cnn", 0.0, NOISE),
    Condition("sgld", "cnn", NOISE, NOISE),
)
TRAININGS = 3
UNLEARNING_EPOCHS = 5


@dataclass(frozen=True)
class Amount:
    """How much is trained beside one training.

    Attributes:
        oracles: Of each set; the first half measures distances, the other half the rest.
        runs: Of unlearning; run k has its barrier to the oracle k of the other half.
        random_sets: Sets of 100 that no score had a say in.
        ends: Of the quantile sets, as in `Sizes.set_ends`.
    """

    oracles: int
    runs: int
    random_sets: int
    ends: tuple[float, ...]


AMOUNTS = {
    "mlp": Amount(6, 3, 6, (0.05, 0.25, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0)),
    "cnn": Amount(4, 2, 4, (0.05, 0.5, 0.75, 0.9, 1.0)),  # takes several times as long
}


@dataclass(frozen=True)
class Retraining:
    """One training and everything that was trained beside it.

    Attributes:
        condition, number: Which.
        data: "train" and "test" images.
        original: What `trials.original` returned.
        sets: Forget sets, quantile sets first.
        oracles: Of each set, what `trials.oracle` returned.
        runs: Of each set, what `trials.unlearning` returned.
        settings: Of the study.
    """

    condition: Condition
    number: int
    data: Mapping[str, ImageData]
    original: Mapping[str, Any]
    sets: list[ForgetSet]
    oracles: list[list[dict[str, Any]]]
    runs: list[list[dict[str, Any]]]
    settings: Settings

    @property
    def norms(self) -> np.ndarray:
        """Unclipped gradient norms before each epoch, shape (epochs, instances)."""
        return self.original["norms"].numpy()

    def module(self, weights: Mapping[str, torch.Tensor]) -> nn.Sequential:
        """Return the network with these weights."""
        side = self.data["train"].images.shape[-1]
        module = make_model(self.condition.model, side=side, seed=self.number)
        module.load_state_dict(weights)
        return module

    def losses(self, norms: np.ndarray, *, factor: float = 1.0, order: float = 2.0) -> np.ndarray:
        """Return the privacy losses at a multiple of the nominal noise."""
        return losses_at(norms, self.settings, self.condition, factor=factor, order=order)

    def clipped(self) -> np.ndarray:
        """Return the privacy losses of norms clipped at the median over instances and epochs."""
        return self.losses(np.minimum(self.norms, np.median(self.norms)))

    def checkpoints(self) -> list[dict[str, torch.Tensor]]:
        """Train again, to the same bits; return the weights before each epoch and at the end."""
        train, sizes = self.data["train"], self.settings.sizes
        module = make_model(self.condition.model, side=train.images.shape[-1], seed=self.number)

        def copy() -> dict[str, torch.Tensor]:
            return {name: value.clone() for name, value in module.state_dict().items()}

        kept = [copy()]

        def after_step(step: int, _rows: torch.Tensor, _outputs: torch.Tensor) -> None:
            if step % sizes.steps_per_epoch == 0:
                kept.append(copy())

        run_steps(
            module, images=train.images, labels=train.labels, rows=torch.arange(len(train)),
            condition=self.condition, sample_rate=sizes.batch_size / len(train),
            batch_size=sizes.batch_size, steps=self.condition.epochs * sizes.steps_per_epoch,
            seed=_seed(self.number, 0), after_step=after_step,
        )  # fmt: skip
        same = all(torch.equal(kept[-1][k], v) for k, v in self.original["weights"].items())
        assert same, "the training did not repeat itself"
        return kept


def losses_at(
    norms: np.ndarray, settings: Settings, condition: Condition, *, factor: float, order: float
) -> np.ndarray:
    """Return privacy losses from norms that are held through each epoch; label `estimate`."""
    sizes = settings.sizes
    return privacy_losses(
        norms, steps_per_epoch=sizes.steps_per_epoch, order=order,
        noise_multiplier=factor * noise_multiplier(condition, batch_size=sizes.batch_size),
        sample_rate=sizes.batch_size / sizes.train,
    )  # fmt: skip


def confidence(results: list[Mapping[str, Any]], rows: np.ndarray) -> np.ndarray:
    """Return the mean over models of the probability of the true class, shape (rows,)."""
    return np.mean([np.exp(-r["loss"].numpy().astype(float)[rows]) for r in results], axis=0)


def retrain(
    condition: Condition, number: int, *, folder: Path, jobs: int, say: Callable[[str], None]
) -> Retraining:
    """Run one training with its sets, or read what of it is there."""
    settings = study_settings("mnist5k")
    sizes, amount = settings.sizes, AMOUNTS[condition.model]
    half = amount.oracles // 2
    assert amount.runs <= half
    bench = Bench(settings, folder, number, jobs, False, say)
    common = trials.common_config(settings, condition, seed=number)
    first = {**common, "kind": "original", "seed": _seed(number, 0), "early_epochs": 2 * 31}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus's notices, in every trial
        (original,) = bench.run(trials.original, [first], "training")
        norms = original["norms"].numpy()
        score = losses_at(
            np.minimum(norms, np.median(norms)), settings, condition, factor=1.0, order=2.0
        )
        sets = quantile_sets(score, ends=amount.ends, size=sizes.set_size)
        sets += random_sets(len(score), sets=amount.random_sets, size=sizes.set_size, seed=number)
        without = [
            {**common, "kind": "oracle", "forget_set": s.rows, "seed": _seed(number, 1 + k)}
            for s in sets
            for k in range(amount.oracles)
        ]
        say(f"{condition.model}, {condition.name}, {number}: {len(without)} oracles")
        oracles = bench.run(trials.oracle, without, "oracles")
        tuning = [
            {**common, "kind": "unlearning", "forget_set": s.rows, "seed": _seed(number, 50 + k),
             "start": bench.key(first),
             "oracle": bench.key(without[i * amount.oracles + half + k]),
             "unlearning_epochs": UNLEARNING_EPOCHS,
             "record_every": UNLEARNING_EPOCHS * sizes.steps_per_epoch,
             "barrier_rows": sizes.barrier_rows}
            for i, s in enumerate(sets)
            for k in range(amount.runs)
        ]  # fmt: skip
        runs = bench.run(partial(trials.unlearning, folder=str(folder)), tuning, "unlearning")
    return Retraining(
        condition, number, trials.parts("mnist5k", sizes.train, sizes.test, number), original, sets,
        [oracles[i * amount.oracles :][: amount.oracles] for i in range(len(sets))],
        [runs[i * amount.runs :][: amount.runs] for i in range(len(sets))],
        settings,
    )  # fmt: skip


def arguments(description: str, *, out: str) -> argparse.Namespace:
    """Return the options that the scripts share."""
    parser = argparse.ArgumentParser(description=description)
    default = Path(__file__).parent / "results" / out
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("study_retrainings"), help="trials")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--trainings", type=int, default=TRAININGS)
    parser.add_argument("--conditions", default="", help="only those whose name contains this")
    options = parser.parse_args()
    # Some conditions only: what the file says about the others stays.
    options.before = {}
    if options.conditions and options.out.exists():
        options.before = json.loads(options.out.read_text())
    options.chosen = [c for c in CONDITIONS if options.conditions in f"{c.model}, {c.name}"]
    torch.set_num_threads(1)
    return options


def _seed(number: int, trial: int) -> int:
    return 1000 * number + trial
