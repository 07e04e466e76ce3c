"""Per-instance privacy losses of a sweep's training, from the norms that its passes measured."""

from __future__ import annotations

import numpy as np

from .._validate import FloatArray
from ..accounting import ContractedLoss, PerInstanceAccountant
from ..evaluation.estimated_losses import HELD, EstimatedLosses, clip_norms

_RUN = "one training, whose noise may be nominal"


def privacy_losses(
    norms: FloatArray,
    *,
    steps_per_epoch: int,
    noise_multiplier: float,
    sample_rate: float,
    order: float,
    max_grad_norm: float | str | None = None,
) -> EstimatedLosses:
    """Return every instance's Rényi divergence of the whole training, summed over its steps.

    Guarantee: none; the label is `estimate`. Norms are measured before each epoch and held through
        it, of one training; for training without noise the noise is nominal.

    Args:
        norms: Shape (epochs, instances), unclipped gradient norms.
        steps_per_epoch: Steps that each row of `norms` stands for.
        noise_multiplier: Noise on the summed gradient, in the unit of the norms.
        sample_rate: Of Poisson sampling.
        order: Rényi order.
        max_grad_norm: Bound that norms are clipped at, or "median", as in `clip_norms`.

    Returns:
        Losses of shape (instances,), in nats, > 0: a norm below 0.001 counts as 0.001.
    """
    clip = clip_norms(norms, max_grad_norm=max_grad_norm)
    accountant = PerInstanceAccountant(
        norms.shape[1], orders=[order], max_sensitivity=max(float(clip.norms.max()), 1.0)
    )
    nobody = np.empty(0, dtype=np.int64)
    for measured in clip.norms:
        accountant.observe_all(np.maximum(measured, 1e-3))
        for _ in range(steps_per_epoch):
            accountant.step(
                indices=nobody,
                sensitivities=np.empty(0),
                noise_multiplier=noise_multiplier,
                sample_rate=sample_rate,
            )
    return EstimatedLosses(
        np.asarray(accountant.rdp()[:, 0]), clip.max_grad_norm, (HELD, _RUN, *clip.reasons)
    )


def contracted_losses(
    norms: FloatArray, *, steps_per_epoch: int, decay_per_epoch: float, max_grad_norm: float | str
) -> EstimatedLosses:
    """Return every instance's shift S_T at the end of training, in units of the clipping bound.

    Args:
        norms: As in `privacy_losses`.
        steps_per_epoch: As there.
        decay_per_epoch: What an epoch leaves of an earlier shift, in (0, 1].
        max_grad_norm: As there.

    Returns:
        Losses of shape (instances,), label `estimate`.
    """
    clip = clip_norms(norms, max_grad_norm=max_grad_norm)
    assert clip.max_grad_norm is not None
    loss = ContractedLoss(norms.shape[1], decay=decay_per_epoch ** (1.0 / steps_per_epoch))
    everybody = np.arange(norms.shape[1])
    for measured in clip.norms:
        loss.update(everybody, measured / clip.max_grad_norm)
        for _ in range(steps_per_epoch - 1):
            loss.update([], [])
    return EstimatedLosses(
        loss.values(), clip.max_grad_norm, (HELD, _RUN, *loss.reasons[1:], *clip.reasons)
    )


def ties_broken(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return ranks by `first`, and by `second` among equals, as numbers from 0.

    Instances whose norm is above the bound before every epoch have one and the same clipped loss.
    """
    ranks = np.empty(len(first))
    ranks[np.lexsort((second, first))] = np.arange(len(first))
    return ranks
