"""How far the margins of unlearned models are from those of their oracles: KLOM, and single models.

The margin is φ = log p_y − log(1 − p_y), the log-odds of the true class (`ensemble_outputs`). Works
on arrays (models, instances); claims nothing about privacy: a small divergence of margins is
evidence, never a certificate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from .. import _validate as check
from .._validate import FloatArray

BINS = 20  # the three constants of the reference implementation
CLIP = 100.0
FLOOR = 1e-5


@dataclass(frozen=True)
class Klom:
    """KL divergence of margins, per instance.

    Attributes:
        values: Shape (instances,), nats, >= 0.
        unlearned_models, oracle_models: Sizes of the two ensembles.
        ceiling: Largest value the method can give; a value near it says "disjoint", no more. inf
            for the Gaussian form.
        method: "binned" or "gaussian", with its constants.
    """

    values: FloatArray
    unlearned_models: int
    oracle_models: int
    ceiling: float
    method: str

    def quantile(self, level: float = 0.95) -> float:
        """Return a quantile over the instances; 0.95 is what the literature reports.

        Args:
            level: In [0, 1].
        """
        return float(np.quantile(self.values, check.probability("level", level)))


def klom(
    unlearned: npt.ArrayLike,
    *,
    oracles: npt.ArrayLike,
    bins: int = BINS,
    clip: float = CLIP,
    floor: float = FLOOR,
) -> Klom:
    """Return KLOM: KL(unlearned ‖ oracles) of binned margins, for every instance.

    Per instance both ensembles' margins are clipped to [−clip, clip] and counted in `bins` equal
    bins from the smallest to the largest of all; p and q are the shares of the unlearned and of
    the oracle models, q is raised to `floor` where p > 0 and normalised, and the value is
    Σ p log(p / q).

    A plug-in estimate, biased *up*: two ensembles of one law have KLOM > 0, the more so the fewer
    models there are. Read it beside `klom_of_oracles`, which is that bias.

    Args:
        unlearned: Shape (models, instances), φ of each unlearned model, from independent runs; at
            least 2 models.
        oracles: Shape (models, instances), φ of each retrained model; at least 2.
        bins: >= 2.
        clip: > 0.
        floor: Smallest probability of a bin under the oracles, in (0, 1).

    Returns:
        Klom, values in [0, ceiling].

    Raises:
        ValueError: A margin that is not finite, different numbers of instances, or one model: a
            single model has no distribution, see `margin_deviation`.

    Edge cases (first match wins):
        all margins equal       0
        disjoint margins        the ceiling, about −log(floor), if one bin holds all unlearned ones

    Source: Georgiev et al. (2024), arXiv:2410.23232, App. E.1, with the constants of its reference
        implementation (data-unlearning-bench, EasyDUB): 20 bins, clip 100, floor 1e-5. Deviations:
        the last bin includes its upper end (the reference drops the largest margin of all);
        ensembles may have different sizes.
    Privacy: depends on private data; not private to release.
    """
    p_margins, q_margins = _two_ensembles(unlearned, oracles)
    count = check.integer("bins", bins, low=2)
    limit = check.real("clip", clip, low=0.0, open_low=True)
    least = check.real("floor", floor, low=0.0, high=1.0, open_low=True, open_high=True)
    p_margins, q_margins = np.clip(p_margins, -limit, limit), np.clip(q_margins, -limit, limit)
    low = np.minimum(p_margins.min(axis=0), q_margins.min(axis=0))
    width = np.maximum(p_margins.max(axis=0), q_margins.max(axis=0)) - low
    width = np.where(width > 0, width, 1.0)
    p = _shares(p_margins, low, width, count)
    q = _shares(q_margins, low, width, count)
    q = np.where(p > 0, np.maximum(q, least), q)
    q /= q.sum(axis=0)
    terms = p * np.log(np.where(p > 0, p, 1.0) / np.where(p > 0, q, 1.0))
    return Klom(
        values=np.maximum(terms.sum(axis=0), 0.0),  # rounding
        unlearned_models=len(p_margins),
        oracle_models=len(q_margins),
        ceiling=math.log((1.0 + least) / least),
        method=f"binned ({count} bins, clip {limit:g}, floor {least:g})",
    )


def gaussian_klom(unlearned: npt.ArrayLike, *, oracles: npt.ArrayLike) -> Klom:
    """Return the KL divergence of Gaussians fitted to the margins, for every instance.

    log(σ_o/σ_u) + (σ_u² + (μ_u − μ_o)²)/(2σ_o²) − 1/2, with sample means and sample variances
    (divisor models − 1). Needs fewer models than bins do, has no ceiling, and is only as good as
    the Gaussians; with few models it is biased up as well.

    Args:
        unlearned: Shape (models, instances), at least 2 models.
        oracles: Shape (models, instances), at least 2 models; some ten say something.

    Returns:
        Klom. May be inf.

    Raises:
        ValueError: As in `klom`.

    Edge cases (first match wins):
        no spread in either, equal means   0
        no spread in one of them           inf

    Source: the closed form of KL(N‖N); margins taken as Gaussian as in LiRA, arXiv:2112.03570.
    Privacy: as in `klom`.
    """
    p_margins, q_margins = _two_ensembles(unlearned, oracles)
    mean_p, mean_q = p_margins.mean(axis=0), q_margins.mean(axis=0)
    # Of equal margins the mean may round; their range does not.
    std_p, std_q = (
        np.where(np.ptp(m, axis=0) > 0, m.std(axis=0, ddof=1), 0.0) for m in (p_margins, q_margins)
    )
    same = (std_p == 0) & (std_q == 0) & (p_margins[0] == q_margins[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = std_p / std_q
        values = (ratio**2 - 1.0) / 2.0 - np.log(ratio) + ((mean_p - mean_q) / std_q) ** 2 / 2.0
    values = np.where((std_p == 0) | (std_q == 0), np.inf, np.maximum(values, 0.0))
    return Klom(
        values=np.where(same, 0.0, values),
        unlearned_models=len(p_margins),
        oracle_models=len(q_margins),
        ceiling=math.inf,
        method="gaussian",
    )


def klom_of_oracles(
    oracles: npt.ArrayLike,
    *,
    bins: int = BINS,
    clip: float = CLIP,
    floor: float = FLOOR,
) -> Klom:
    """Return the KLOM of one half of the oracles against the other: what perfect unlearning gets.

    With half as many models on each side it is a little larger than the bias of `klom` itself.

    Args:
        oracles: Shape (models, instances), at least 4 models; even rows against odd ones.
        bins, clip, floor: As in `klom`.

    Returns:
        Klom.

    Raises:
        ValueError: Fewer than 4 models; else as in `klom`.

    Source: definition of this package.
    Privacy: as in `klom`.
    """
    margins = _margins("oracles", oracles, least=4)
    return klom(margins[::2], oracles=margins[1::2], bins=bins, clip=clip, floor=floor)


@dataclass(frozen=True)
class MarginDeviation:
    """How one model's margins lie among those of its oracles.

    Attributes:
        t: Shape (instances,), Student's t with oracle_models − 1 degrees of freedom; positive where
            the model is more confident in the true class than the oracles.
        p_value: Shape (instances,), two-sided: small where a further oracle would hardly be so far.
            One test per instance, none of them corrected for the others.
        oracle_models: Number of oracles.
    """

    t: FloatArray
    p_value: FloatArray
    oracle_models: int


def margin_deviation(margins: npt.ArrayLike, *, oracles: npt.ArrayLike) -> MarginDeviation:
    """Say for a *single* model how far each margin is from the oracles', in their own spread.

    t = (φ − mean) / (s·√(1 + 1/R)), R oracles with sample deviation s: if the model were one more
    oracle, and margins Gaussian, t would have Student's law with R − 1 degrees of freedom. It can
    show that a model is not an oracle; that it is one it cannot show.

    Args:
        margins: Shape (instances,), φ of the one model.
        oracles: Shape (models, instances), at least 2 models.

    Returns:
        MarginDeviation.

    Raises:
        ValueError: A margin that is not finite, different numbers of instances, one oracle.

    Edge cases (first match wins):
        oracles without spread, φ equal to them   t 0, p 1
        oracles without spread                    t ±inf, p 0

    Source: Student's prediction interval for one more observation.
    Privacy: as in `klom`.
    """
    references = _margins("oracles", oracles, least=2)
    own = check.real_array("margins", margins, cure="Did the model diverge?")
    check.same_length("margins", own, "instances of the oracles", references.shape[1])
    models = len(references)
    spread = np.where(np.ptp(references, axis=0) > 0, references.std(axis=0, ddof=1), 0.0)
    away = np.where(spread > 0, own - references.mean(axis=0), own - references[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(away == 0, 0.0, away / (spread * math.sqrt(1.0 + 1.0 / models)))
    return MarginDeviation(t, 2.0 * stats.t.sf(np.abs(t), models - 1), models)


def _shares(margins: FloatArray, low: FloatArray, width: FloatArray, bins: int) -> FloatArray:
    """Return the share of models in each bin: shape (bins, instances)."""
    models, instances = margins.shape
    places = np.minimum((margins - low) / width * bins, bins - 1).astype(np.int64)
    counts = np.bincount((places * instances + np.arange(instances)).reshape(-1),
                         minlength=bins * instances)  # fmt: skip
    return counts.reshape(bins, instances) / models


def _two_ensembles(
    unlearned: npt.ArrayLike, oracles: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    first, second = (
        _margins(name, values, least=2)
        for name, values in (("unlearned", unlearned), ("oracles", oracles))
    )
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Expected margins of the same instances, got {first.shape[1]} of the unlearned and "
            f"{second.shape[1]} of the oracles. Evaluate both on one split."
        )
    return first, second


def _margins(name: str, values: npt.ArrayLike, *, least: int) -> FloatArray:
    """Return finite margins of shape (models, instances)."""
    margins = check.real_array(name, values, cure="Did a model diverge?")
    if margins.ndim != 2 or len(margins) < least:
        raise ValueError(
            f"Expected {name} of shape (models, instances) with at least {least} models, got shape "
            f"{margins.shape}. One model has no distribution of margins: retrain more, or use "
            "margin_deviation."
        )
    return margins
