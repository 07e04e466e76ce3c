"""Per-example membership scores: LiRA, U-LiRA against retrained models, memorisation.

Works on log-odds margins of ensembles (`ensemble_outputs`). Knows no models, and no thresholds:
how well scores tell members from others is `attack.py`. A score is evidence about one attack,
never a bound on what a better one could find.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from .. import _validate as check
from .._validate import FloatArray


@dataclass(frozen=True)
class MembershipScores:
    """Scores of one attack.

    Attributes:
        scores: Higher means more likely a member. NaN where an ensemble has fewer than 2 models of
            a kind, or no spread: no likelihood was fitted.
        attack: Which attack, in full: a score without this name says nothing.
    """

    scores: FloatArray
    attack: str


@dataclass(frozen=True)
class ULiraScores:
    """U-LiRA scores of held-out models.

    Attributes:
        unlearned: Shape (unlearned models, instances), scores of models that unlearned the
            instances. Higher: more like the unlearned ensemble than like the retrained one.
        retrained: Shape (retrained models, instances), the same of models that never saw them.
        attack: Which attack.
    """

    unlearned: FloatArray
    retrained: FloatArray
    attack: str


def membership_scores(
    margins: npt.ArrayLike,
    *,
    out_margins: npt.ArrayLike,
    in_margins: npt.ArrayLike | None = None,
    shared_variance: bool = False,
) -> MembershipScores:
    """Return LiRA's per-example membership scores of a target model (or several).

    With φ the log-odds margin and Gaussians fitted to each example's shadow margins, the online
    attack scores log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²); without `in_margins` the offline
    attack scores −log Pr[N(μ_out, σ_out²) > φ], which sees only how far φ lies above models that
    were trained without the example. Against an unlearned model `out_margins` come from models
    retrained without the forget set, and a high score says that it is not like them.

    Args:
        margins: Shape (instances,) or (models, instances), φ of the model(s) under attack, which
            are in neither ensemble.
        out_margins: Shape (models, instances), φ of models trained without the instance; NaN where
            a model was trained with it. With random halves: `np.where(members, nan, margins)`.
        in_margins: Shape (models, instances), φ of models trained with it, NaN elsewhere. None:
            offline attack.
        shared_variance: Use one variance for all examples (of each kind), pooled from within each;
            advised below some 64 models per kind.

    Returns:
        MembershipScores, scores of the shape of `margins`, in nats.

    Raises:
        ValueError: Shapes that do not fit, a target margin that is not finite, infinities.

    Edge cases:
        fewer than 2 models of a kind for an example   NaN, with a shared variance fewer than 1
        no spread among them                           NaN

    Source: Carlini et al. (2022), arXiv:2112.03570, Algorithm 1 and Sec. V-E (offline:
        theirs is 1 − Pr[… > φ], which ranks alike and rounds to 1). Ours:
        sample variances (divisor models − 1); the shared variance is pooled within examples, where
        the authors' code takes that of all margins together.
    Privacy: depends on private data; not private to release.

    >>> membership_scores([2.0], out_margins=[[-1.0], [1.0]], in_margins=[[1.0], [3.0]]).attack
    'LiRA (online, variance per example)'
    """
    own = check.real_array("margins", margins, cure="Did the model diverge?")
    if own.ndim not in (1, 2):
        raise ValueError(
            check.expected("margins", "of shape (instances,) or (models, instances)", own.shape)
        )
    kind = "shared variance" if shared_variance else "variance per example"
    instances = own.shape[-1]
    outside = _Gaussian.fit(_shadow("out_margins", out_margins, instances), shared=shared_variance)
    if in_margins is None:
        scores = -norm.logsf(own, outside.mean, outside.std)
        return MembershipScores(np.asarray(scores), f"LiRA (offline, {kind})")
    inside = _Gaussian.fit(_shadow("in_margins", in_margins, instances), shared=shared_variance)
    scores = inside.log_density(own) - outside.log_density(own)
    return MembershipScores(scores, f"LiRA (online, {kind})")


def u_lira_scores(
    unlearned: npt.ArrayLike, *, retrained: npt.ArrayLike, shared_variance: bool = False
) -> ULiraScores:
    """Return U-LiRA's scores: can one tell an unlearned model from a retrained one, per example?

    Each model is scored by the likelihood ratio of Gaussians fitted to the *other* unlearned models
    and to the (other) retrained models on that very example, so that no model is judged by a
    likelihood it was fitted into. Perfect unlearning makes both kinds of scores alike.

    Args:
        unlearned: Shape (models, instances), φ of independent models that learned and then
            unlearned the instances, at least 3.
        retrained: Shape (models, instances), φ of models retrained without them, at least 3.
        shared_variance: As in `membership_scores`.

    Returns:
        ULiraScores; for `attack_summary` treat `unlearned` as members and `retrained` as the
        others. Models of one ensemble share their fits, so scores of different models are not
        independent: take one held-out model of each kind for an interval that holds.

    Raises:
        ValueError: Fewer than 3 models of a kind, different numbers of instances, not finite.

    Edge cases:
        no spread among the other models   NaN

    Source: Hayes et al. (2024), arXiv:2403.01218, U-LiRA; leave-one-out in place of their split
        into shadow and target models.
    Privacy: depends on private data; not private to release.
    """
    first = _ensemble("unlearned", unlearned)
    second = _ensemble("retrained", retrained)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Expected margins of the same instances, got {first.shape[1]} and {second.shape[1]}."
        )
    how = {"shared": shared_variance}
    scores: list[FloatArray] = []
    for own, other, sign in ((first, second, 1.0), (second, first, -1.0)):
        others = _Gaussian.fit(other, **how)
        rows = []
        for number, margins in enumerate(own):
            same = _Gaussian.fit(np.delete(own, number, axis=0), **how)
            rows.append(sign * (same.log_density(margins) - others.log_density(margins)))
        scores.append(np.stack(rows))
    kind = "shared variance" if shared_variance else "variance per example"
    return ULiraScores(scores[0], scores[1], f"U-LiRA (leave-one-out, {kind})")


def memorisation_scores(correct: npt.ArrayLike, *, members: npt.ArrayLike) -> FloatArray:
    """Return memorisation Pr[correct | trained with] − Pr[correct | trained without], per instance.

    Args:
        correct: Shape (models, instances), whether each model predicts the true class.
        members: Shape (models, instances), whether each model was trained with the instance.

    Returns:
        Shape (instances,), in [-1, 1]. With M models of each kind its standard error is up to
        1/√(2M): Feldman and Zhang took some 2,000 models.

    Raises:
        ValueError: Different shapes, or values other than true and false.

    Edge cases:
        no model with, or none without, an instance   NaN

    Source: Feldman, Zhang (2020), arXiv:2008.03703, Sec. 1 and the subsampled form of Sec. 2.
    Privacy: depends on private data; not private to release.
    """
    right, inside = _flags("correct", correct), _flags("members", members)
    if right.shape != inside.shape or right.ndim != 2:
        raise ValueError(
            f"Expected correct and members of one shape (models, instances), got {right.shape} and "
            f"{inside.shape}."
        )
    with np.errstate(invalid="ignore"):  # 0 / 0: no model of the kind, NaN as promised
        with_it = (right & inside).sum(axis=0) / inside.sum(axis=0)
        without = (right & ~inside).sum(axis=0) / (~inside).sum(axis=0)
    return np.asarray(with_it - without)


@dataclass(frozen=True)
class _Gaussian:
    mean: FloatArray
    std: FloatArray  # NaN where no likelihood can be fitted

    @classmethod
    def fit(cls, margins: FloatArray, *, shared: bool) -> _Gaussian:
        """Fit one Gaussian per instance to the models that count (not NaN)."""
        counts = (~np.isnan(margins)).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):  # too few models: NaN
            mean = np.nansum(margins, axis=0) / counts
            squares = np.nansum((margins - mean) ** 2, axis=0)
            if shared:
                variance = np.full(len(mean), squares.sum() / (counts - 1).clip(min=0).sum())
            else:
                variance = squares / (counts - 1)
        enough = (variance > 0) & np.isfinite(variance) & (counts >= 1)
        return cls(mean, np.sqrt(np.where(enough, variance, np.nan)))

    def log_density(self, values: FloatArray) -> FloatArray:
        """Log density up to the constant that all Gaussians share."""
        return np.asarray(-np.log(self.std) - ((values - self.mean) / self.std) ** 2 / 2.0)


def _shadow(name: str, values: npt.ArrayLike, instances: int) -> FloatArray:
    """Return shadow margins (models, instances), NaN where a model does not count."""
    margins = np.asarray(values, dtype=np.float64)
    if margins.ndim != 2 or margins.shape[1] != instances or np.isinf(margins).any():
        raise ValueError(
            f"Expected {name} of shape (models, {instances}), finite or NaN, got shape "
            f"{margins.shape} with {int(np.isinf(margins).sum())} infinite. Use the instances of "
            "margins, in their order."
        )
    return margins


def _ensemble(name: str, values: npt.ArrayLike) -> FloatArray:
    margins = check.real_array(name, values, cure="Did a model diverge?")
    if margins.ndim != 2 or len(margins) < 3:
        raise ValueError(
            f"Expected {name} of shape (models, instances) with at least 3 models, got shape "
            f"{margins.shape}. Each model is scored by likelihoods of the others."
        )
    return margins


def _flags(name: str, values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    flags = np.asarray(values)
    if flags.dtype != np.bool_ and not np.isin(flags, (0, 1)).all():
        raise ValueError(f"Expected {name} to be true or false, got other values.")
    return flags.astype(np.bool_)
