"""How well an attack's scores tell members from others: AUC, and true positives at few false ones.

Knows scores and labels. Every number carries the name of its attack and an interval; where the
sample is too small for a false-positive rate it says so in place of a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit
from scipy.stats import beta, norm, rankdata

from .. import _validate as check
from .._validate import FloatArray
from .membership import MembershipScores


@dataclass(frozen=True)
class Proportion:
    """A share of independent trials with its exact interval.

    Attributes:
        value: successes / trials.
        low, high: Clopper–Pearson interval: covers with probability at least `level`.
        successes, trials: What was counted.
        level: Confidence.
    """

    value: float
    low: float
    high: float
    successes: int
    trials: int
    level: float

    @classmethod
    def of(cls, successes: int, trials: int, *, level: float) -> Proportion:
        """Return successes / trials with its Clopper–Pearson interval.

        Args:
            successes: 0 to `trials`.
            trials: Independent ones, >= 1.
            level: Confidence, in (0, 1).

        Source: Clopper, Pearson (1934), by quantiles of the beta distribution.
        """
        total = check.integer("trials", trials, low=1)
        found = check.integer("successes", successes, low=0, high=total)
        confidence = check.real(
            "level", level, low=0.0, high=1.0, open_low=True, open_high=True, cure="Pass 0.95."
        )
        tail = (1 - confidence) / 2
        low = 0.0 if found == 0 else float(beta.ppf(tail, found, total - found + 1))
        high = 1.0 if found == total else float(beta.isf(tail, found + 1, total - found))
        return cls(found / total, low, high, found, total, confidence)


@dataclass(frozen=True)
class AreaUnderCurve:
    """Probability that a member scores above a non-member, ties counting half.

    Attributes:
        value: In [0, 1]; 0.5 is a coin.
        low, high: DeLong's interval on the logit scale; where the scores do not overlap, the exact
            one-sided bound from disjoint pairs.
        level: Nominal coverage.
    """

    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class TruePositives:
    """True positives at a false-positive rate.

    Attributes:
        target: The rate asked for, for example 0.001.
        tpr: Share of members above the threshold, None where the sample cannot resolve the rate.
        fpr: Share of non-members above it: the largest that does not exceed `target`.
        threshold: Scores at or above it are called members; None with `tpr`.
        note: Why there is no number; empty otherwise.

    The threshold is chosen on the non-members, so the interval of `tpr` holds given the threshold,
    while the true rate of false positives lies in the interval of `fpr`, which may exceed `target`.
    """

    target: float
    tpr: Proportion | None
    fpr: Proportion | None
    threshold: float | None
    note: str


@dataclass(frozen=True)
class AttackSummary:
    """What one attack achieved.

    Attributes:
        attack: Its name.
        members, nonmembers: Numbers of scored ones.
        unscored: Entries left out because the attack has no score for them (NaN).
        auc: Area under the ROC curve.
        true_positives: One entry per false-positive rate asked for.
        false_positive_rates, true_positive_rates: The ROC curve, ascending from 0 to 1.

    Privacy: computed from private data where scores are; not private to release.
    """

    attack: str
    members: int
    nonmembers: int
    unscored: int
    auc: AreaUnderCurve
    true_positives: tuple[TruePositives, ...]
    false_positive_rates: FloatArray
    true_positive_rates: FloatArray


def attack_summary(
    scores: MembershipScores | npt.ArrayLike,
    *,
    members: npt.ArrayLike,
    attack: str | None = None,
    false_positive_rates: Sequence[float] = (0.001, 0.01),
    level: float = 0.95,
) -> AttackSummary:
    """Summarise an attack: ROC curve, AUC, true positives at low false-positive rates.

    Args:
        scores: MembershipScores, or shape (n,), higher meaning member; NaN is left out and counted.
        members: Shape (n,), whether each entry is a member (for U-LiRA: unlearned).
        attack: Name of the attack; needed with plain scores, MembershipScores bring theirs.
        false_positive_rates: Each in (0, 1).
        level: Nominal coverage of the intervals, in (0, 1).

    Returns:
        AttackSummary. Intervals take entries as independent: scores of one example under several
        models, or of several examples forgotten together, are not quite.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: Lengths that differ, no name, no member or no non-member with a score.

    Edge cases (first match wins):
        fewer than 1 / rate non-members   tpr None with a note: the smallest rate that n of them can
                                          show is 1/n
        all scores equal, or one of a kind
        that overlaps the others          AUC interval [0, 1]: nothing to estimate a spread from
        no overlap of the scores          AUC 1 (or 0), interval from min(members, nonmembers)
                                          disjoint pairs: low = ((1 − level)/2)^(1/pairs)

    Source: ROC: scikit-learn. AUC interval: DeLong et al. (1988) with the mid-rank form of Sun, Xu
        (2014). Low false-positive rates as the measure: Carlini et al. (2022), arXiv:2112.03570.
    Privacy: computed from private data; not private to release.
    """
    roc_auc_score, roc_curve = _scikit_learn()
    plain: npt.ArrayLike = scores.scores if isinstance(scores, MembershipScores) else scores
    if isinstance(scores, MembershipScores):
        attack = attack or scores.attack
    if not attack:
        raise ValueError(
            "Expected attack to name the attack, got none. A rate without the attack says nothing."
        )
    values = np.asarray(plain, dtype=np.float64).reshape(-1)
    labels = np.asarray(members).reshape(-1)
    check.same_length("members", labels, "scores", len(values))
    if labels.dtype != np.bool_ and not np.isin(labels, (0, 1)).all():
        raise ValueError("Expected members to be true or false, got other values.")
    known = ~np.isnan(values)
    labels, ranks = labels.astype(bool)[known], _finite_order(values[known])
    inside, outside = ranks[labels], ranks[~labels]
    if not len(inside) or not len(outside):
        raise ValueError(
            f"Expected scored members and non-members, got {len(inside)} and {len(outside)}."
        )
    fpr, tpr, thresholds = roc_curve(labels, ranks, drop_intermediate=False)
    points = [
        _true_positives(
            rate, inside, outside, fpr=fpr, thresholds=thresholds, level=level,
            values=np.sort(np.unique(values[known])),
        )
        for rate in false_positive_rates
    ]  # fmt: skip
    return AttackSummary(
        attack=attack,
        members=len(inside),
        nonmembers=len(outside),
        unscored=int((~known).sum()),
        auc=_area(float(roc_auc_score(labels, ranks)), inside, outside, level=level),
        true_positives=tuple(points),
        false_positive_rates=fpr,
        true_positive_rates=tpr,
    )


def _finite_order(values: FloatArray) -> FloatArray:
    """Return the place of each value among the distinct ones: infinities become finite."""
    return np.unique(values, return_inverse=True)[1].astype(np.float64)


def _true_positives(
    rate: float,
    inside: FloatArray,
    outside: FloatArray,
    *,
    fpr: FloatArray,
    thresholds: FloatArray,
    level: float,
    values: FloatArray,
) -> TruePositives:
    target = check.real(
        "false_positive_rates", rate, low=0.0, high=1.0, open_low=True, open_high=True,
        cure="Pass rates such as 0.01.",
    )  # fmt: skip
    if len(outside) * target < 1.0 - 1e-9:  # 0.001 · 1000 may round to less than 1
        return TruePositives(
            target, None, None, None,
            f"{len(outside)} non-members resolve rates of 1/{len(outside)} at best; "
            f"{math.ceil(1 / target - 1e-9)} are needed",
        )  # fmt: skip
    allowed = np.flatnonzero(fpr <= target * (1 + 1e-9))  # ascending; the first is "nobody"
    place = thresholds[allowed[-1]]
    hits, alarms = int((inside >= place).sum()), int((outside >= place).sum())
    return TruePositives(
        target=target,
        tpr=Proportion.of(hits, len(inside), level=level),
        fpr=Proportion.of(alarms, len(outside), level=level),
        threshold=float(values[int(place)]) if np.isfinite(place) else math.inf,
        note="",
    )


def _area(value: float, inside: FloatArray, outside: FloatArray, *, level: float) -> AreaUnderCurve:
    """Return the AUC's interval: DeLong's on the logit scale, exact where nothing overlaps."""
    confidence = check.real("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
    pairs = min(len(inside), len(outside))
    if value in (0.0, 1.0):
        # Disjoint pairs are independent trials of "member above"; all of them agree.
        edge = ((1 - confidence) / 2) ** (1 / pairs)
        low, high = (edge, 1.0) if value == 1.0 else (0.0, 1.0 - edge)
        return AreaUnderCurve(value, low, high, confidence)
    if pairs < 2:
        return AreaUnderCurve(value, 0.0, 1.0, confidence)
    everyone = rankdata(np.concatenate([inside, outside]))
    m, n = len(inside), len(outside)
    # Of each member the share of non-members below it, and the other way round.
    above = (everyone[:m] - rankdata(inside)) / n
    below = 1.0 - (everyone[m:] - rankdata(outside)) / m
    std = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    if std == 0.0:
        return AreaUnderCurve(value, 0.0, 1.0, confidence)
    reach = float(norm.isf((1 - confidence) / 2)) * std / (value * (1 - value))
    low, high = expit(logit(value) + np.array([-reach, reach]))
    return AreaUnderCurve(value, float(low), float(high), confidence)


def _scikit_learn() -> tuple[Any, Any]:
    try:
        from sklearn.metrics import roc_auc_score, roc_curve
    except ImportError as error:
        raise ImportError(
            "Expected scikit-learn for ROC curves, got none. Run "
            'pip install "opacus-pil[evaluation]".'
        ) from error
    return roc_auc_score, roc_curve
