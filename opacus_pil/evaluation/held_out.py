"""What runs without an instance say about it: the privacy loss and the loss it was held out of.

Knows arrays of runs, with a mask of who was left out of which. Does not know how the folds were
drawn or the runs trained.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..accounting.kl import sampled_gaussian_kl
from .estimated_losses import HELD, EstimatedLosses, clip_norms


def held_out_losses(
    norms: npt.ArrayLike,
    *,
    held_out: npt.ArrayLike,
    noise_multiplier: float,
    sample_rate: float,
    max_grad_norm: float | str,
    steps_per_checkpoint: npt.ArrayLike = 1,
) -> EstimatedLosses:
    """KL divergence of the training without an instance from the one with it, per instance.

    By the chain rule KL(Q‖P) of the whole transcript is the expected sum over the steps of a run
    *without* the instance (law Q) of the steps' own divergences, each a function of the instance's
    clipped gradient norm there: s²/(2z²) at sample rate 1, else at most
    KL(N(0,1) ‖ (1−q)·N(0,1) + q·N(s/z, 1)).

    Guarantee: none; the label is `estimate`. It would be a bound in expectation over the runs with
        norms at every step: here is a mean over some runs, without a confidence value.

    Args:
        norms: Shape (runs, checkpoints, instances), gradient norms, >= 0, of runs that each lack a
            part of the instances. Entries of instances that a run was trained with are not read.
        held_out: Shape (runs, instances), True where the run was trained without the instance.
        noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
        sample_rate: Probability that an instance is drawn, in [0, 1].
        max_grad_norm: Clipping bound in the unit of the norms, > 0; or "median", see
            `clip_norms`: of the norms that are read.
        steps_per_checkpoint: Steps that each checkpoint stands for, a number or shape
            (checkpoints,), each >= 1.

    Returns:
        Shape (instances,), nats: the mean over the runs without each.

    Raises:
        TypeError, ValueError: A value outside its range, or another shape.

    Edge cases (first match wins):
        no run without an instance   NaN
        its norms are 0              0

    Source: THEORY 12. Cross-fitted folds (each instance in one fold, one run without each fold)
        give every instance a run; the runs of a sweep over forget sets do for their members.
    Privacy: depends on private data; not private to release.

    >>> found = held_out_losses(
    ...     [[[1.0, 9.0]], [[3.0, 3.0]]], held_out=[[True, False], [False, True]],
    ...     noise_multiplier=1.0, sample_rate=1.0, max_grad_norm=2.0,
    ... )
    >>> found.values
    array([0.125, 0.5  ])
    """
    apart = _mask(held_out)
    given = np.asarray(norms, dtype=np.float64)
    if given.ndim != 3 or 0 in given.shape or (given.shape[0], given.shape[2]) != apart.shape:
        raise ValueError(
            "Expected norms of shape (runs, checkpoints, instances) and held_out of shape (runs, "
            f"instances), got {given.shape} and {apart.shape}."
        )
    steps = held_steps(steps_per_checkpoint, checkpoints=given.shape[1])
    read = np.where(apart[:, None, :], given, 0.0)
    check.real_array("norms", read, low=0.0, cure="Pass gradient norms.")
    clip = clip_norms(np.where(apart[:, None, :], read, np.nan), max_grad_norm=max_grad_norm)
    assert clip.max_grad_norm is not None
    sizes = np.where(apart[:, None, :], clip.norms, 0.0) / clip.max_grad_norm
    divergences = sampled_gaussian_kl(
        sizes, noise_multiplier=noise_multiplier, sample_rate=sample_rate
    )
    values = mean_held_out((divergences * steps[:, None]).sum(axis=1), held_out=apart)
    few = int(apart.sum(axis=0).min())
    mean = f"a mean over the runs without an instance, {few} at least, with no confidence value"
    held = () if (steps == 1).all() else (HELD,)
    return EstimatedLosses(values, clip.max_grad_norm, (mean, *held, *clip.reasons))


def mean_held_out(values: npt.ArrayLike, *, held_out: npt.ArrayLike) -> FloatArray:
    """Return the mean of a quantity over the runs that were trained without each instance.

    Of the instances' losses it is the held-out loss, a score of difficulty (`DIFFICULTY_SCORES`).

    Args:
        values: Shape (runs, instances); those of runs with the instance are not read.
        held_out: Shape (runs, instances), True where the run was trained without the instance.

    Returns:
        Shape (instances,), in the unit of the values; NaN where no run is without the instance.

    Raises:
        ValueError: Different shapes, or a mask of other values than true and false.

    Source: of correctness it is Pr_out of `memorisation_scores`, arXiv:2008.03703.
    Privacy: depends on private data; not private to release.

    >>> mean_held_out([[1.0, 2.0], [3.0, 4.0]], held_out=[[True, True], [True, False]])
    array([2., 2.])
    """
    apart = _mask(held_out)
    measured = np.asarray(values, dtype=np.float64)
    if measured.shape != apart.shape:
        raise ValueError(
            "Expected values and held_out of one shape (runs, instances), got "
            f"{measured.shape} and {apart.shape}."
        )
    with np.errstate(invalid="ignore"):  # 0 / 0: NaN as promised
        total = np.where(apart, measured, 0.0).sum(axis=0)
        return np.asarray(total / apart.sum(axis=0))


def held_steps(steps_per_checkpoint: npt.ArrayLike, *, checkpoints: int) -> IntArray:
    """Return the steps that each checkpoint stands for, shape (checkpoints,), each >= 1."""
    steps = np.asarray(steps_per_checkpoint)
    if steps.dtype.kind not in "iu" or (steps < 1).any() or steps.ndim > 1:
        raise ValueError(
            check.expected(
                "steps_per_checkpoint", "to be whole numbers >= 1, one or one per checkpoint",
                steps_per_checkpoint,
            )
        )  # fmt: skip
    if steps.ndim == 1:
        check.same_length("steps_per_checkpoint", steps, "checkpoints", checkpoints)
    return np.broadcast_to(steps, checkpoints).astype(np.int64)


def _mask(held_out: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    mask = np.asarray(held_out)
    if mask.dtype.kind != "b" or mask.ndim != 2:
        raise ValueError(
            "Expected held_out to be true and false of shape (runs, instances), got "
            f"{mask.dtype} of shape {mask.shape}."
        )
    return mask
