"""How steady the ranking by privacy loss is: nominal noise, checkpoints, trajectories.

Works on gradient norms (trajectories, checkpoints, instances) that were measured before. Everything
here is an `estimate`: norms are held between checkpoints, and the noise may be nominal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..accounting import compose_per_instance, sampled_gaussian_rdp
from .bootstrap import RESAMPLES, Estimate, Statistic, bootstrap
from .estimated_losses import HELD, EstimatedLosses, clip_norms
from .held_out import held_steps
from .rank_correlation import spearman_statistic

_NODES = 257  # sensitivities at which a step's divergence is computed; between them log–log chords


@dataclass(frozen=True)
class RankingStability:
    """How alike two rankings by estimated privacy loss are.

    Attributes:
        varied: "noise_std", "checkpoints" or "trajectories".
        value: The one looked at: a noise, or a number of checkpoints or trajectories.
        compared_with: What its ranking is compared with, in words.
        overlap: Whether both rankings use some of the same norms, which flatters the correlation.
        correlation: Spearman's, with an interval over instances: it says nothing about other
            trainings.
        guarantee: "estimate", always.

    Privacy: computed from private norms; not private to release.
    """

    varied: str
    value: float
    compared_with: str
    overlap: bool
    correlation: Estimate
    guarantee: str = "estimate"


def estimated_privacy_losses(
    norms: npt.ArrayLike,
    *,
    noise_std: float,
    sample_rate: float,
    steps_per_checkpoint: npt.ArrayLike = 1,
    order: float = 2.0,
    max_grad_norm: float | str | None = None,
) -> EstimatedLosses:
    """Return the Rényi divergence of the training per instance, estimated from checkpoints' norms.

    Each checkpoint's norm is held for its steps; the checkpoints' blocks of steps are composed over
    the trajectories by the per-instance composition theorem with Hölder exponent 3 · checkpoints.

    Guarantee: none; the label is `estimate`.

    Args:
        norms: Shape (trajectories, checkpoints, instances), gradient norms, >= 0.
        noise_std: Noise on the *summed* gradient of a step, in the unit of the norms, > 0; nominal
            for training without noise. DP-SGD: noise_multiplier · max_grad_norm.
        sample_rate: Probability that an instance is drawn, in [0, 1].
        steps_per_checkpoint: Steps that each checkpoint stands for, a number or shape
            (checkpoints,), each >= 1.
        order: Rényi order, > 1.
        max_grad_norm: Bound that the norms are clipped at, in their unit: that of the training,
            or one that makes sums rank better than the early peaks of unclipped norms do. "median":
            the median of all norms, a rule on private data. None: norms as they are.

    Returns:
        Losses of shape (instances,), nats, with the bound and the reasons for the label.

    Raises:
        ValueError: A value outside its range, or another shape.

    Edge cases (first match wins):
        sample_rate = 0 or norms 0   0
        one trajectory, one block    steps · D(norm), the plain sum

    Source: Thudi et al. (2024), arXiv:2307.00310, see `compose_per_instance`. A step's divergence
        is computed at 257 norms between the least and the largest, and interpolated.
    Privacy: depends on private data; not private to release.

    >>> how = {"noise_std": 2.0, "sample_rate": 1.0}
    >>> estimated_privacy_losses([[[2.0, 4.0]]], **how).values.round(6)
    array([1., 4.])
    >>> estimated_privacy_losses([[[2.0, 4.0]]], **how, max_grad_norm=3.0).values.round(6)
    array([1.  , 2.25])
    """
    measured, steps = _checked(norms, steps_per_checkpoint)
    clip = clip_norms(measured, max_grad_norm=max_grad_norm)
    values = _losses(
        clip.norms, noise_std=noise_std, sample_rate=sample_rate, steps=steps, order=order
    )
    runs = f"composed over {len(measured)} trajectories, with no confidence value"
    return EstimatedLosses(values, clip.max_grad_norm, (HELD, runs, *clip.reasons))


def estimate_convergence(
    norms: npt.ArrayLike,
    *,
    noise_std: Sequence[float],
    sample_rate: float,
    steps_per_checkpoint: npt.ArrayLike = 1,
    order: float = 2.0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[RankingStability, ...]:
    """Compare rankings by estimated privacy loss under other noise, checkpoints and trajectories.

    The first noise is the reference. Compared are: every other noise with it, on all norms; the
    ranking from 1, 2, 4, … evenly spaced checkpoints (each then stands for more steps) with that
    from all; and rankings from 1, 2, 4, … trajectories with those from as many *others*, averaged
    over the disjoint pairs there are: how well the estimate repeats itself.

    Args:
        norms: Shape (trajectories, checkpoints, instances), as in `estimated_privacy_losses`.
        noise_std: Noises on the summed gradient, each > 0, the reference first.
        sample_rate, steps_per_checkpoint, order: As in `estimated_privacy_losses`.
        level, resamples, seed: Of the intervals, as in `rank_correlation`.

    Returns:
        One RankingStability per comparison; `pandas.DataFrame(map(dataclasses.asdict, result))`
        makes a table of them.

    Raises:
        ValueError: As in `estimated_privacy_losses`; no noise, or one instance.

    Edge cases:
        one trajectory    no comparison of trajectories
        one checkpoint    no comparison of checkpoints
        equal losses      correlation NaN

    Source: definition of this package; reviewers of arXiv:2505.18786 asked for the sensitivity to
        the nominal noise.
    Privacy: depends on private data; not private to release.
    """
    measured, steps = _checked(norms, steps_per_checkpoint)
    noises = np.atleast_1d(check.real_array("noise_std", noise_std, low=0.0, open_low=True))
    check.integer("number of noises", len(noises), low=1)
    trajectories, checkpoints, instances = measured.shape
    check.integer("number of instances", instances, low=2, cure="One cannot be ranked.")

    def losses(part: FloatArray, held: IntArray = steps, noise: float = noises[0]) -> FloatArray:
        return _losses(
            part, noise_std=float(noise), sample_rate=sample_rate, steps=held, order=order
        )

    def compared(pairs: list[tuple[FloatArray, FloatArray]]) -> Estimate:
        return bootstrap(
            _mean_of([spearman_statistic(a, b) for a, b in pairs]), count=instances, level=level,
            resamples=resamples, seed=seed,
        )  # fmt: skip

    everything = losses(measured)
    found = [
        RankingStability(
            "noise_std", float(noise), f"noise_std {noises[0]:g}", True,
            compared([(losses(measured, noise=noise), everything)]),
        )
        for noise in noises[1:]
    ]  # fmt: skip
    for count in _doubling(checkpoints - 1):
        kept = np.arange(count) * checkpoints // count
        held = np.add.reduceat(steps, kept)
        found.append(
            RankingStability(
                "checkpoints", count, f"all {checkpoints} checkpoints", True,
                compared([(losses(measured[:, kept], held), everything)]),
            )
        )  # fmt: skip
    for count in _doubling(trajectories // 2):
        groups = [
            losses(measured[start : start + count])
            for start in range(0, trajectories - count + 1, count)
        ]
        pairs = list(zip(groups[::2], groups[1::2], strict=False))
        found.append(
            RankingStability(
                "trajectories", count, f"{count} others ({len(pairs)} disjoint pairs)", False,
                compared(pairs),
            )
        )  # fmt: skip
    return tuple(found)


def _doubling(most: int) -> list[int]:
    """Return 1, 2, 4, … up to `most`."""
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _mean_of(statistics: list[Statistic]) -> Statistic:
    return lambda taken: np.asarray(np.mean([each(taken) for each in statistics], axis=0))


def _checked(
    norms: npt.ArrayLike, steps_per_checkpoint: npt.ArrayLike
) -> tuple[FloatArray, IntArray]:
    measured = check.real_array("norms", norms, low=0.0, cure="Pass gradient norms.")
    if measured.ndim != 3 or 0 in measured.shape:
        raise ValueError(
            f"Expected norms of shape (trajectories, checkpoints, instances), got {measured.shape}."
        )
    return measured, held_steps(steps_per_checkpoint, checkpoints=measured.shape[1])


def _losses(
    norms: FloatArray, *, noise_std: float, sample_rate: float, steps: IntArray, order: float
) -> FloatArray:
    positive = norms[norms > 0]
    if not len(positive):
        return np.zeros(norms.shape[2])
    nodes = np.geomspace(positive.min(), positive.max(), _NODES)
    by_instance = np.log(np.where(norms > 0, norms, nodes[0])).transpose(2, 0, 1)
    blocks = np.where(norms > 0, steps[:, None], 0).transpose(2, 0, 1)

    def block_rdp(at: float) -> FloatArray:
        """One block per checkpoint: its steps at one norm, shape (instances, runs, checkpoints)."""
        values = sampled_gaussian_rdp(
            nodes, noise_multiplier=noise_std, sample_rate=sample_rate, orders=[at]
        )[:, 0]
        if values[-1] == 0.0:
            return np.zeros(blocks.shape)
        return np.asarray(blocks * np.exp(np.interp(by_instance, np.log(nodes), np.log(values))))

    composed = compose_per_instance(
        block_rdp, order=order, holder_exponent=max(3 * norms.shape[1], 2)
    )
    return np.asarray(composed.rdp)
