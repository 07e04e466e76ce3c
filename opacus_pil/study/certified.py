"""Claim (d): steps and accuracy of per-instance budgets and of the worst case at equal ε.

The demo's logistic head for 3 against 8, whose caps were fixed before the run; the only model here
that a certificate covers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .. import datasets
from ..demo import head, logistic
from ..demo.forgetting import Trained
from ..demo.task import exposure_order, forget_sets
from ..evaluation import evaluate_splits
from ..evaluation.ensemble import Trial
from ..unlearning import CertifiedPlan, UnlearningEngine
from .settings import Settings
from .trials import without_notices

_TEN_CLASSES = {  # those of benchmarks/README.md; the demo has fewer images and steps
    **head.SETTINGS,
    "mnist5k": replace(
        head.SETTINGS["mnist5k"],
        sizes={"public": 1000, "train": 3000, "test": 1000},
        noise_std=0.05,
        steps=311,
        weight_decay=3e-3,
    ),
}
_SEARCH = 20_000  # steps; more than any sensible run, so that the worst case is found too
_LONGEST_RUN = 600  # beyond it accuracy is not looked at


@without_notices()
def certified_claim(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train once, then plan and run every forget set; a trial.

    One run serves all its targets: its steps are the same for each of them, and the accuracy is
    read off where each would stop. What is certified is read off the plans.

    Returns:
        `rows`, one per forget set and target: steps and worst-case steps, accuracies after either,
        `certified` and what training from scratch takes.
    """
    settings = logistic.SETTINGS[config["dataset"]]
    if config["steps"] is not None:
        settings = replace(settings, steps=config["steps"])
    data = datasets.binary(datasets.load(config["dataset"]), positive=3, negative=8)
    parts = datasets.split(
        data, sizes=settings.sizes, generator=torch.Generator().manual_seed(config["seed"])
    )
    trained = logistic.train_logistic(parts, settings=settings, seed=config["seed"], progress=False)
    return _claimed(trained, settings, config)


@without_notices()
def ten_class_claim(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for ten classes, one output each, on features of a network of public images."""
    settings = _TEN_CLASSES[config["dataset"]]
    if config["steps"] is not None:
        settings = replace(settings, steps=config["steps"])
    parts = datasets.split(
        datasets.load(config["dataset"]),
        sizes=settings.sizes,
        generator=torch.Generator().manual_seed(config["seed"]),
    )
    _, features = head.head_features(parts, settings=settings, seed=config["seed"])
    trained = head.train_head(features, settings=settings, seed=config["seed"], progress=False)
    return _claimed(trained, settings, config)


def _claimed(trained: Trained, settings: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    size = len(trained.tensors[0])
    delta = 1.0 / size
    order = exposure_order(trained.engine.per_instance, delta)
    rows = []
    for size in config["set_sizes"]:
        for name, members in forget_sets(order, size=size, seed=config["seed"]).items():
            rows += _forget(trained, members, name=name, delta=delta, config=config)
    return {
        "delta": delta,
        "instances": size,
        "noise_std": settings.noise_std,
        "weight_decay": settings.weight_decay,
        "steps_retrain": settings.steps,
        "rows": rows,
    }


def _forget(
    trained: Trained, members: np.ndarray, *, name: str, delta: float, config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Plan for every target, run once as long as the longest of them, read off accuracies."""
    engine = UnlearningEngine(
        trained.module,
        optimizer=trained.optimizer,
        dataset=copy.deepcopy(trained.dataset),  # a run erases what it forgot of kept features
        criterion=trained.criterion,
        privacy_engine=trained.engine.fork(),
        feature_norm=trained.feature_norm,
        progress=False,
    )
    plans = {
        epsilon: engine.plan(
            members, epsilon=epsilon, delta=delta, method="langevin", max_steps=_SEARCH
        )
        for epsilon in config["epsilons"]
    }
    stops = [
        stop
        for plan in plans.values()
        if isinstance(plan, CertifiedPlan)
        for stop in (plan.steps, plan.steps_worst_case)
        if stop is not None and stop <= _LONGEST_RUN
    ]
    splits = trained.splits(members)

    def watch(step: int, module: nn.Module) -> list[float]:
        found = evaluate_splits(module, splits=splits, criterion=trained.criterion)
        return [step, *(found[split].accuracy for split in ("forget", "retain", "test"))]

    longest = engine.plan(members, steps=max(stops, default=0), method="langevin")
    run = engine.unlearn(longest, seed=config["seed"], record_every=10, on_step=watch)
    reached = {int(step): values for step, *values in run.history}

    def after(stop: int | None) -> dict[str, float] | None:
        if stop not in reached:
            return None
        return dict(zip(("forget", "retain", "test"), reached[stop], strict=True))

    rows = []
    for epsilon, plan in plans.items():
        known = isinstance(plan, CertifiedPlan)
        worst = plan.steps_worst_case if isinstance(plan, CertifiedPlan) else None
        rows.append(
            {
                "set": name,
                "size": len(members),
                "epsilon": epsilon,
                "certified": known,
                "steps": plan.steps if known else None,
                "steps_worst_case": worst,
                "accuracy": after(plan.steps if known else None),
                "accuracy_worst_case": after(worst),
            }
        )
    return rows


def certified_config(
    dataset: str, *, settings: Settings, seed: int, kind: str = "certified"
) -> dict[str, Any]:
    """Return the configuration of `certified_claim`."""
    return {
        "kind": kind, "dataset": dataset, "seed": seed, "recipe": settings.recipe,
        "steps": settings.certified.steps, "epsilons": settings.certified.epsilons,
        "set_sizes": settings.certified.set_sizes,
    }  # fmt: skip


def ten_class_config(dataset: str, *, settings: Settings, seed: int) -> dict[str, Any]:
    """Return the configuration of `ten_class_claim`."""
    return certified_config(dataset, settings=settings, seed=seed, kind="certified, ten classes")


# Heads that claim (d) is tested on: name -> trial and its configuration. Another head is a line
# here: a trial whose result has `rows` as above.
HEADS: Mapping[str, tuple[Trial, Callable[..., dict[str, Any]]]] = {
    "logistic, 3 against 8": (certified_claim, certified_config),
    "ten classes, one output each": (ten_class_claim, ten_class_config),
}


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Add the verdict: never more steps than the worst case, and fewer somewhere."""
    pairs = [
        (row["steps"], row["steps_worst_case"])
        for row in found["rows"]
        if row["steps"] is not None and row["steps_worst_case"] is not None
    ]
    fewer = sum(steps < worst for steps, worst in pairs)
    more = sum(steps > worst for steps, worst in pairs)
    ratios = [steps / worst for steps, worst in pairs if worst > 0]
    return {
        **found,
        "compared": len(pairs),
        "fewer": fewer,
        "more": more,
        "median_ratio": float(np.median(ratios)) if ratios else None,
        "reproduced": "no" if more else ("yes" if fewer else "undecided"),
    }
