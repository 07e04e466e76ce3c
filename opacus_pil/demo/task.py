"""What a demo task hands over: its part of summary.json, of the ledger, and of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..accounting import PerInstanceAccountant
from ..accounting.ledger_rows import Columns, ledger_chunks
from ..accounting.shown import quantiles_above, rounded_up
from ..evaluation import evaluate
from ..plots import (
    epsilon_against_steps,
    epsilon_histogram,
    forget_curves,
    image_grid,
    loss_barrier_curves,
)
from ..report import Illustration, Section
from .forgetting import TOLERANCE, Forgotten, Trained

_SHOWN = 10  # images of the most and of the least exposed instances


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome: its entry in summary.json, its report sections, ledger and weights."""

    summary: dict[str, Any]
    sections: tuple[Section, ...]
    ledger: tuple[Columns, ...]
    state: dict[str, torch.Tensor]


def exposure_order(accountant: PerInstanceAccountant, delta: float) -> np.ndarray:
    """Return the rows from the least to the most exposed; equal ε are told apart by their RDP."""
    epsilon = accountant.get_epsilon(delta).epsilon
    return np.lexsort((accountant.rdp().sum(axis=1), epsilon))


def forget_sets(
    order: np.ndarray, *, size: int, seed: int, labels: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return the easiest, random and the hardest `size` rows of an order by privacy loss.

    With `labels` the hardest ones are of one class, the one whose hardest stand highest, as when
    one person's images go: what a model knows of scattered images it knows from others like them.
    """
    random = np.random.default_rng(seed).choice(order, size=size, replace=False)
    hardest = order[-size:]
    if labels is not None:
        ranks = np.empty(len(order))
        ranks[order] = np.arange(len(order))
        by_class = [order[labels[order] == one][-size:] for one in np.unique(labels)]
        hardest = max(
            (rows for rows in by_class if len(rows) == size),
            key=lambda rows: float(ranks[rows].mean()),
            default=hardest,
        )
    chosen = {"easy": order[:size], "random": random, "hard": hardest}
    return {name: np.sort(rows) for name, rows in chosen.items()}


def task_result(
    *,
    name: str,
    dataset: str,
    trained: Trained,
    delta: float,
    worst_case_epsilon_prv: float | None,
    outcomes: Mapping[str, Forgotten],
    images: torch.Tensor,
    labels: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    words: Mapping[str, str],
) -> TaskResult:
    """Put a task's numbers, figures and rows together.

    Args:
        images, labels: Of the training instances, in row order.
        words: The task's own sentences: "task", "forgetting".
        (others): As their names say; see DESIGN of summary.json in the README.
    """
    accountant = trained.engine.per_instance
    spent = accountant.get_epsilon(delta)
    entries = [
        outcome.entry(name=key, privacy_loss=float(spent.epsilon[outcome.plan.forget_set].mean()))
        for key, outcome in outcomes.items()
    ]
    summary = {
        "name": name,
        "dataset": dataset,
        "num_instances": accountant.num_instances,
        "delta": delta,
        "worst_case_epsilon": accountant.worst_case_epsilon(delta),
        "worst_case_epsilon_prv": worst_case_epsilon_prv,
        "per_instance_epsilon": _distribution(spent.epsilon),
        "guarantee": spent.guarantee,
        "unattributed_steps": accountant.unattributed_steps,
        "test_accuracy": evaluate(
            trained.module, *trained.test, criterion=trained.criterion
        ).accuracy,
        "forget_sets": entries,
    }
    columns = {
        "task": np.full(accountant.num_instances, name),
        "label": labels.numpy().astype(np.int64),
    }
    return TaskResult(
        summary=summary,
        sections=(
            _exposure(summary, spent.epsilon, outcomes, images, labels, words["task"]),
            _forgetting(summary, outcomes, words["forgetting"]),
        ),
        ledger=tuple(ledger_chunks(accountant, delta=delta, columns=columns)),
        state={key: value.detach().clone() for key, value in state.items()},
    )


def _distribution(values: np.ndarray) -> dict[str, float]:
    least, q10, median, q90, most = quantiles_above(values, [0.0, 0.1, 0.5, 0.9, 1.0])
    return {
        "min": least,
        "q10": q10,
        "median": median,
        "mean": float(values.mean()),
        "q90": q90,
        "max": most,
    }


def _exposure(
    summary: Mapping[str, Any],
    epsilon: np.ndarray,
    outcomes: Mapping[str, Forgotten],
    images: torch.Tensor,
    labels: torch.Tensor,
    text: str,
) -> Section:
    order = np.argsort(epsilon, kind="stable")
    figures = [
        Illustration(
            epsilon_histogram(
                epsilon,
                worst_case=summary["worst_case_epsilon"],
                forget_sets={name: o.plan.forget_set for name, o in outcomes.items()},
                guarantee=summary["guarantee"],
                delta=summary["delta"],
            ),
            "Privacy loss of every training instance, beside the one number for all of them.",
            "Histogram of per-instance epsilon with the worst case marked by a line.",
        )
    ]
    for title, rows in (
        ("Least exposed instances", order[:_SHOWN]),
        ("Most exposed instances", order[-_SHOWN:][::-1].copy()),
    ):
        captions = [f"{int(labels[row])}, ε {rounded_up(epsilon[row])}" for row in rows]
        figures.append(
            Illustration(
                image_grid(images[rows], captions=captions, title=title),
                f"{title}: label and ε.",
                f"Grid of {len(rows)} images with their labels and epsilons.",
            )
        )
    return Section("Who is exposed", text, tuple(figures), task=summary["name"])


def _forgetting(
    summary: Mapping[str, Any], outcomes: Mapping[str, Forgotten], text: str
) -> Section:
    entries: Sequence[Mapping[str, Any]] = summary["forget_sets"]
    losses = [entry["privacy_loss"] for entry in entries]
    certified = all(entry["certified"] for entry in entries)
    series: dict[str, tuple[list[float], list[float | None]]] = {
        "measured: stays near the oracles": (losses, [e["time_to_unlearn"] for e in entries])
    }
    if certified:
        series["certified"] = (losses, [e["steps"] for e in entries])
        series["certified, worst case"] = (losses, [e["steps_worst_case"] for e in entries])
    budget = None if certified else float(max(entry["steps"] for entry in entries))
    figures = [
        Illustration(
            epsilon_against_steps(series, limit=budget),
            "Steps to forget against the mean privacy loss of the forget set.",
            "Scatter plot of steps against privacy loss for the forget sets.",
        ),
        Illustration(
            forget_curves(
                {name: [s for s, _ in o.curve] for name, o in outcomes.items()},
                accuracies={name: [a for _, a in o.curve] for name, o in outcomes.items()},
                oracle_bands={name: o.band for name, o in outcomes.items()},
                reached={name: o.time_to_unlearn for name, o in outcomes.items()},
            ),
            "Accuracy on the forget set while unlearning; the band spans the retrained oracles. "
            f"Reached means within {TOLERANCE:g} of their mean, and staying there.",
            "Line plots of forget accuracy over unlearning steps with the oracles' band.",
        ),
    ]
    for name, outcome in outcomes.items():
        figures.append(
            Illustration(
                loss_barrier_curves(outcome.barriers),
                f"Loss on the straight line to a retrained oracle, {name} forget set.",
                f"Loss along the line between models for the {name} forget set.",
            )
        )
    return Section("What forgetting takes", text, tuple(figures), task=summary["name"])
