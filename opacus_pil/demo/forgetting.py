"""Forget one set, retrain its oracles, and put the two side by side; the same for every task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..evaluation import (
    LossBarrier,
    Metrics,
    evaluate_splits,
    loss_barrier,
    retrained_oracles,
    time_to_unlearn,
)
from ..privacy_engine import PerInstancePrivacyEngine
from ..unlearning import CertifiedPlan, UnlearningEngine, UnlearningPlan, UnlearningResult

TOLERANCE = 0.1  # of accuracy, around the mean of the oracles
STAY = 3  # recorded points in a row within the tolerance

Splits = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Trained:
    """A trained model with everything that training it took.

    Attributes:
        module, optimizer: As Opacus made them private.
        engine: The privacy engine, with the ledgers.
        dataset: Training set, in row order.
        tensors: Its inputs and targets.
        test: Held-out (x, y).
        criterion: The plain loss.
        make: make(seed) -> (plain module, plain optimizer), freshly initialised.
        feature_norm: Public bound on the features, where a certificate needs one.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    engine: PerInstancePrivacyEngine
    dataset: Dataset
    tensors: tuple[torch.Tensor, ...]
    test: tuple[torch.Tensor, torch.Tensor]
    criterion: nn.Module
    make: Callable[[int], tuple[nn.Module, torch.optim.Optimizer]]
    feature_norm: float | None = None

    def splits(self, rows: np.ndarray) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return forget, retain and test split for a forget set."""
        x, y = self.tensors
        kept = np.setdiff1d(np.arange(len(y)), rows)
        return {"forget": (x[rows], y[rows]), "retain": (x[kept], y[kept]), "test": self.test}


@dataclass(frozen=True)
class Forgotten:
    """What came of forgetting one set.

    Attributes:
        plan, result: Of the unlearning run.
        metrics: Split -> metrics of the unlearned model.
        oracles: The same of each retrained model.
        curve: (step, forget accuracy) over the run, the first before any step.
        time_to_unlearn: First recorded step from which the forget accuracy stays near the oracles'.
        barriers: Pair of models -> split -> loss barrier.
    """

    plan: UnlearningPlan
    result: UnlearningResult
    metrics: Mapping[str, Metrics]
    oracles: list[dict[str, Metrics]]
    curve: list[tuple[int, float]]
    time_to_unlearn: int | None
    barriers: dict[str, dict[str, LossBarrier]]

    @property
    def band(self) -> tuple[float, float]:
        """Smallest and largest forget accuracy of the oracles."""
        values = [oracle["forget"].accuracy for oracle in self.oracles]
        return min(values), max(values)

    def entry(self, *, name: str, privacy_loss: float) -> dict[str, Any]:
        """Return the forget set's entry in summary.json."""
        plan, result = self.plan, self.result
        certified = isinstance(plan, CertifiedPlan)
        keys = [f"{split}_accuracy" for split in ("forget", "retain", "test")]
        return {
            "name": name,
            "size": len(plan.forget_set),
            "privacy_loss": privacy_loss,
            "certificate": None
            if result.certificate is None
            else type(result.certificate).__name__,
            "certified": certified,
            "steps": plan.steps,
            "steps_worst_case": plan.steps_worst_case if isinstance(plan, CertifiedPlan) else None,
            "steps_retrain": plan.steps_retrain,
            "epsilon": result.epsilon,
            "time_to_unlearn": self.time_to_unlearn,
            "forget_accuracy_before": self.curve[0][1],
            "assumptions": []
            if result.certificate is None
            else list(result.certificate.assumptions),
            **{key: self.metrics[key.split("_")[0]].accuracy for key in keys},
            "oracle": {
                key: float(np.mean([o[key.split("_")[0]].accuracy for o in self.oracles]))
                for key in keys
            },
        }


def forget_and_compare(
    trained: Trained,
    rows: np.ndarray,
    *,
    plan: Mapping[str, Any],
    record_every: int,
    oracles: int,
    seed: int,
    progress: bool,
) -> Forgotten:
    """Plan, unlearn on a branch of the ledgers, retrain oracles, measure.

    A certified run is compared with retraining for training and unlearning steps together, which is
    what its certificate refers to; an uncertified one with retraining for the training steps.
    """
    unlearning = UnlearningEngine(
        trained.module,
        optimizer=trained.optimizer,
        dataset=copy.deepcopy(trained.dataset),  # a run erases what it forgot of kept features
        criterion=trained.criterion,
        privacy_engine=trained.engine.fork(),  # each forget set starts from the same model
        feature_norm=trained.feature_norm,
        progress=progress,
    )
    agreed = unlearning.plan(rows, **plan)
    splits = trained.splits(agreed.forget_set)
    forget_only = {"forget": splits["forget"]}
    criterion = trained.criterion

    def watch(step: int, module: nn.Module) -> list[float]:
        found = evaluate_splits(module, splits=forget_only, criterion=criterion)
        return [step, found["forget"].accuracy]

    original = unlearning.module
    result = unlearning.unlearn(agreed, seed=seed, record_every=record_every, on_step=watch)
    certified = isinstance(agreed, CertifiedPlan)
    retrained = retrained_oracles(
        trained.make,
        privacy_engine=trained.engine,
        dataset=trained.dataset,
        criterion=criterion,
        forget_set=agreed.forget_set,
        steps=agreed.steps_retrain + (agreed.steps if certified else 0),
        seeds=[seed + k for k in range(1, oracles + 1)],
        progress=progress,
    )
    measured = [evaluate_splits(oracle, splits=splits, criterion=criterion) for oracle in retrained]
    curve = [(int(step), accuracy) for step, accuracy in result.history]
    reached = time_to_unlearn(
        [accuracy for _, accuracy in curve],
        oracle_values=[oracle["forget"].accuracy for oracle in measured],
        tolerance=TOLERANCE,
        steps=[step for step, _ in curve],
        stay=min(STAY, len(curve)),
    )
    line = {name: splits[name] for name in ("forget", "test")}
    return Forgotten(
        plan=agreed,
        result=result,
        metrics=evaluate_splits(result.module, splits=splits, criterion=criterion),
        oracles=measured,
        curve=curve,
        time_to_unlearn=reached,
        barriers={
            f"{name} to retrained": loss_barrier(
                module, retrained[0], splits=line, criterion=criterion
            )
            for name, module in (("original", original), ("unlearned", result.module))
        },
    )


def forget_each(
    trained: Trained, sets: Mapping[str, np.ndarray], *, seed: int, **options: Any
) -> dict[str, Forgotten]:
    """Forget every set from the same model, each with seeds of its own; options as above."""
    return {
        name: forget_and_compare(trained, rows, seed=seed + 1000 * number, **options)
        for number, (name, rows) in enumerate(sets.items(), start=1)
    }
