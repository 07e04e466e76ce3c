"""Membership of one model's rows: scores, bounds and p-values of the claim, by either design.

Members against rows that a random split held out, or canaries whose coins were thrown before
training. Knows a model, its task and a claim; no checkpoints and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from .. import _validate as check
from ..capture.sweep import sweep
from ..training.task import Task
from .audit_record import Design
from .claim import Claim
from .losses import REPLACE
from .lower_bound import LowerBound
from .natural_canaries import CanarySplit, Shadow
from .one_run import steinke_p_value
from .pairs import paired_bounds
from .power import could_have_seen


@dataclass(frozen=True)
class Tested:
    """What the scores say."""

    design: Design
    lower: tuple[LowerBound, ...] = ()
    shown: tuple[LowerBound, ...] = ()
    p_values: tuple[float, ...] = ()
    scores: tuple[tuple[Hashable, bool, float], ...] = ()  # id, member, score


def tested(
    module: nn.Module,
    dataset: Any,
    *,
    task: Task,
    held_out: Any,
    split: str | None,
    strata: tuple[npt.ArrayLike, npt.ArrayLike] | None,
    canaries: CanarySplit | None,
    shadows: Sequence[Shadow],
    trained_at: float | None,
    claim: Claim,
    seed: int,
    confidence: float,
    level: float,
    chunk_size: int,
    ids: tuple[Any, Any],
    configuration: Mapping[str, Any],
) -> Tested:
    """Score everybody by the audited model and hold what the scores show against the claim.

    Args:
        module: With the audited weights.
        dataset: The training set.
        task: What was minimised.
        held_out: Rows left out by the same coins; None: none.
        split: How.
        strata: Stratum of each row of both; None: the split was not stratified.
        canaries: Thrown before training, in place of held-out rows; None: none.
        shadows: For likelihood-ratio scores of canaries.
        trained_at: When training began, in another process.
        claim: What was accounted.
        seed: Of the pairs.
        confidence: Of each bound.
        level: Of the verdict, over all bounds.
        chunk_size: Rows at a time.
        ids: Of the training set, and of held-out rows (None: numbers).
        configuration: That shadow models must share.
    """
    if not claim.bounded:
        return Tested(Design("none", why_none="the claim itself is ε = inf: steps without noise"))
    if canaries is not None:
        return _by_canaries(
            module, canaries, task=task, shadows=shadows, trained_at=trained_at, claim=claim,
            confidence=confidence, level=level, chunk_size=chunk_size,
            configuration=configuration,
        )  # fmt: skip
    if held_out is None or split is None:
        why = "neither held-out rows of a random split nor canaries were given"
        return Tested(Design("none", why_none=why))
    inside = dict(zip(ids[0].tolist(), _scores(module, dataset, task, chunk_size), strict=True))
    names: list[Any] = [("held out", i) for i in range(len(held_out))]
    if ids[1] is not None:
        names = np.asarray(ids[1]).tolist()
        check.same_length("held_out_ids", np.asarray(names), "held-out rows", len(held_out))
    outside = dict(zip(names, _scores(module, held_out, task, chunk_size), strict=True))
    found = paired_bounds(
        inside, held_out=outside, delta=claim.delta, split=split, seed=seed, claim=claim,
        strata=_strata(strata, list(inside), names), confidence=confidence,
    )  # fmt: skip
    exchanged = Claim(claim.runs, delta=claim.delta, neighbours=REPLACE)
    scores = [(i, True, s) for i, s in inside.items()] + [(i, False, s) for i, s in outside.items()]
    return _against(exchanged, "pairs", found.pairs, found.lower, (), tuple(scores), level)


def _by_canaries(
    module: nn.Module,
    canaries: CanarySplit,
    *,
    task: Task,
    shadows: Sequence[Shadow],
    trained_at: float | None,
    claim: Claim,
    confidence: float,
    level: float,
    chunk_size: int,
    configuration: Mapping[str, Any],
) -> Tested:
    module.eval()
    scores = canaries.loss_scores(
        module, loss_of=task.loss_of, batch_size=chunk_size,
        **({} if task.collate_fn is None else {"collate_fn": task.collate_fn}),
    )  # fmt: skip
    if shadows:
        margins = {i: margin_of(-score) for i, score in scores.items()}
        scores = canaries.likelihood_ratio_scores(
            margins, shadows=shadows, configuration=configuration
        )
    found = canaries.bounds(
        scores, delta=claim.delta, claim=claim, confidence=confidence, trained_at=trained_at
    )
    rows = tuple((i, canaries.included[i], score) for i, score in scores.items())
    return _against(claim, "canaries", len(scores), found.lower, found.shown, rows, level)


def margin_of(loss: float) -> float:
    """Return log(p / (1 − p)) of the label's probability p = e^−loss; of shadows too."""
    p = -math.expm1(-max(loss, 1e-12))
    return -loss - math.log(p)


def _against(
    claim: Claim,
    kind: str,
    units: int,
    lower: tuple[LowerBound, ...],
    shown: tuple[LowerBound, ...],
    scores: tuple[tuple[Hashable, bool, float], ...],
    level: float,
) -> Tested:
    """Hold bounds against the claim for their neighbouring relation."""
    shares = shares_of(level, lower)
    p_values = tuple(_p_value(bound, claim) for bound in lower)
    powerful = any(
        could_have_seen(bound, claim=claim, times=2.0, level=share)
        for bound, share in zip(lower, shares, strict=True)
        if bound.p_value is not None
    )
    design = Design(
        kind, units=units, claimed_epsilon=claim.epsilon, level=level, powerful=powerful
    )  # fmt: skip
    return Tested(design, lower, shown, p_values, scores)


def shares_of(level: float, lower: Sequence[LowerBound]) -> tuple[float, ...]:
    """Return each bound's part of the verdict's level, fixed before anything is seen.

    Nine tenths go to the test against the claim's own curve: Steinke's knows one (ε, δ) of it and
    refutes little at small levels.
    """
    weights = [9.0 if bound.p_value is not None else 1.0 for bound in lower]
    return tuple(level * weight / sum(weights) for weight in weights)


def _p_value(bound: LowerBound, claim: Claim) -> float:
    """p-value of the claim by the bound's own test."""
    if bound.p_value is not None:
        return bound.p_value
    return float(
        steinke_p_value(
            bound.right, guesses=bound.guesses, canaries=bound.canaries, epsilon=claim.epsilon,
            delta=claim.delta,
        )
    )  # fmt: skip


def _scores(module: nn.Module, dataset: Any, task: Task, chunk_size: int) -> list[float]:
    """Return minus each row's loss: higher means member."""
    found = sweep(
        module, dataset, loss_of=task.loss_of, collate_fn=task.collate_fn, chunk_size=chunk_size
    )
    return (-found.losses).tolist()


def _strata(
    strata: tuple[npt.ArrayLike, npt.ArrayLike] | None, inside: list[Any], outside: list[Any]
) -> dict[Any, Any] | None:
    if strata is None:
        return None
    own, other = (np.asarray(values).reshape(-1).tolist() for values in strata)
    if len(own) != len(inside) or len(other) != len(outside):
        raise ValueError(
            f"Expected strata of {len(inside)} and {len(outside)} rows, got {len(own)} and "
            f"{len(other)}. Pass one per row of dataset and of held_out."
        )
    return {**dict(zip(inside, own, strict=True)), **dict(zip(outside, other, strict=True))}
