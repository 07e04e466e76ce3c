"""Unlearn pilot sets, time them against retrained oracles, fit the line that predicts others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from torch import nn
from torch.utils.data import Dataset, default_collate

from .. import _validate as check
from .._validate import IntArray
from ..unlearning import UnlearningEngine
from ..unlearning.pilots import Calibration, fit_calibration
from .gap import Criterion, evaluate, time_to_unlearn
from .task_metrics import evaluate_task

STATISTICS = ("loss", "accuracy")


@check.known_keywords
def calibrate(
    unlearning: UnlearningEngine,
    *,
    pilot_sets: Sequence[npt.ArrayLike],
    oracles: Callable[[Any], Sequence[nn.Module]],
    max_steps: int,
    tolerance: float,
    dataset: Dataset | None = None,
    criterion: Criterion | None = None,
    method: str = "dp_sgd",
    statistic: str = "loss",
    record_every: int = 1,
    stay: int = 3,
    order: float = 2.0,
    level: float = 0.9,
    seed: int = 0,
) -> Calibration:
    """Measure how long each pilot set takes to be forgotten, and fit it to its privacy loss.

    Guarantee: none; what the fit says about other sets is predicted.

    Args:
        unlearning: Engine of the trained model. Every pilot runs on a branch of it, so that neither
            it nor its ledgers change.
        pilot_sets: Three or more sets of instances, best spread over the range of privacy losses:
            by their ids if there are instance_ids, else by row.
        oracles: oracles(set) -> models retrained without these instances, at least one; the set
            as rows, or as ids if there are instance_ids.
        max_steps: Steps that each pilot runs.
        tolerance: As in `time_to_unlearn`, in the unit of the statistic.
        dataset: The training set, in row order. Default: that of `unlearning`.
        criterion: As in `evaluate`, of batches that are pairs. Default: losses are those of
            `unlearning.task`.
        method: Uncertified use of a method that takes steps alone.
        statistic: "loss" or "accuracy" of the model on the pilot set.
        record_every: Steps between two looks at it; times are multiples of this.
        stay: As in `time_to_unlearn`, in looks.
        order: Rényi order of the privacy losses, one of the ledger's.
        level: Of the intervals.
        seed: Pilot k runs with seed + k.

    Returns:
        The fit; `unlearning.plan(rows, calibration=...)` plans with it.

    Raises:
        ValueError: As `fit_calibration`, or an argument outside its range.

    Source: Sepahvand et al. (2025), arXiv:2505.18786.
    Privacy: computed from private data, forget sets included; not private to release.
    """
    check.choice("statistic", statistic, STATISTICS)
    budget = check.integer("max_steps", max_steps, low=1)
    losses = [unlearning.mean_log_loss(members, order=order) for members in pilot_sets]
    data: Any = unlearning.dataset if dataset is None else dataset
    times = []
    for number, members in enumerate(pilot_sets):
        branch = unlearning.branch()
        plan = branch.plan(members, steps=budget, method=method)
        batch = (
            None
            if criterion is None
            else default_collate([data[int(row)] for row in plan.forget_set])
        )

        def look(module: nn.Module, rows: IntArray = plan.forget_set, batch: Any = batch) -> float:
            if criterion is None:
                found = evaluate_task(module, data, task=unlearning.task, rows=rows)
            else:
                found = evaluate(module, *batch, criterion=criterion)
            value = float(getattr(found, statistic))
            if math.isnan(value) and statistic == "accuracy":
                raise ValueError(
                    "Expected classes for statistic='accuracy', got batches that name none. Use "
                    "statistic='loss'."
                )
            return value

        def watch(step: int, module: nn.Module, look: Any = look) -> list[float]:
            return [step, look(module)]

        instances = list(plan.ids) if unlearning.instance_ids.given else plan.forget_set
        result = branch.unlearn(plan, seed=seed + number, on_step=watch, record_every=record_every)
        times.append(
            time_to_unlearn(
                [value for _, value in result.history],
                oracle_values=[look(oracle) for oracle in oracles(instances)],
                tolerance=tolerance,
                steps=[int(step) for step, _ in result.history],
                stay=stay,
            )
        )
    return fit_calibration(
        losses, times=times, max_steps=budget, method=method, order=order, level=level
    )
