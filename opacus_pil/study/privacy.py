"""Per-instance privacy losses of a sweep's training, from the norms that its passes measured."""

from __future__ import annotations

import numpy as np

from .._validate import FloatArray
from ..accounting import PerInstanceAccountant


def privacy_losses(
    norms: FloatArray,
    *,
    steps_per_epoch: int,
    noise_multiplier: float,
    sample_rate: float,
    order: float,
) -> FloatArray:
    """Return every instance's Rényi divergence of the whole training, summed over its steps.

    Guarantee: none; the label is `estimate`. Norms are measured before each epoch and held through
        it, of one training, without clipping; for training without noise the noise is nominal.

    Args:
        norms: Shape (epochs, instances), unclipped gradient norms.
        steps_per_epoch: Steps that each row of `norms` stands for.
        noise_multiplier: Noise on the summed gradient, in the unit of the norms.
        sample_rate: Of Poisson sampling.
        order: Rényi order.

    Returns:
        Shape (instances,), in nats, > 0: a norm below 0.001 counts as 0.001.
    """
    accountant = PerInstanceAccountant(
        norms.shape[1], orders=[order], max_sensitivity=max(float(norms.max()), 1.0)
    )
    nobody = np.empty(0, dtype=np.int64)
    for measured in norms:
        accountant.observe_all(np.maximum(measured, 1e-3))
        for _ in range(steps_per_epoch):
            accountant.step(
                indices=nobody,
                sensitivities=np.empty(0),
                noise_multiplier=noise_multiplier,
                sample_rate=sample_rate,
            )
    return np.asarray(accountant.rdp()[:, 0])
