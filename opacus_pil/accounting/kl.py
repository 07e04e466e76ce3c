"""Kullback–Leibler divergence of one Poisson-sampled Gaussian step, without from with.

Knows sensitivities, noise and rate; composing steps is the caller's.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray
from .quadrature import renyi_divergence

# Divergences grow with the order, so that the one at an order just above 1 is not below the limit;
# it adds (α−1)/2 · variance of the log density, relative 1e-7 to 1e-6.
_ORDER = 1.0 + 2.0**-22
_CHUNK = 1 << 14


def sampled_gaussian_kl(
    sensitivity: npt.ArrayLike, *, noise_multiplier: float, sample_rate: float
) -> FloatArray:
    """KL(N(0,1) ‖ (1−q)·N(0,1) + q·N(s/z,1)) of each sensitivity, rounded up.

    Guarantee: entry i bounds from above the KL divergence from the step *without* an instance to
        the step with it, if its clipped gradient norm is at most sensitivity[i] · max_grad_norm;
        above the true value by at most a relative 1e-6 for shifts s/z up to 400.

    Args:
        sensitivity: Any shape, >= 0. Unitless.
        noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
        sample_rate: q, probability that an instance is drawn, in [0, 1].

    Returns:
        Nats, shape of `sensitivity`. Sums over steps, and means over the runs that the norms come
        from, are KL divergences of the transcript, by the chain rule.

    Raises:
        TypeError, ValueError: An argument outside its range; names the first row.

    Edge cases (first match wins):
        sample_rate = 0       0
        sensitivity = 0       0
        noise_multiplier = 0  −log(1 − q); inf at q = 1
        sample_rate = 1       s² / (2z²)

    Source: the limit at order 1 of `quadrature.renyi_divergence`, reverse.
    Privacy: as private as the sensitivities.

    >>> sampled_gaussian_kl([0.0, 0.5], noise_multiplier=1.0, sample_rate=1.0)
    array([0.   , 0.125])
    """
    values = check.real_array("sensitivity", sensitivity, low=0.0)
    noise = check.noise_multiplier(noise_multiplier)
    rate = check.sample_rate(sample_rate)
    result = np.zeros(values.shape)
    moved = values > 0.0
    if rate == 0.0 or not moved.any():
        return result
    if noise == 0.0:
        result[moved] = math.inf if rate == 1.0 else -math.log1p(-rate)
        return result
    if rate == 1.0:
        result[moved] = (values[moved] / noise) ** 2 / 2.0
        return result
    distinct, place = np.unique(values[moved], return_inverse=True)
    found = np.concatenate(
        [
            renyi_divergence(part / noise, np.full(len(part), _ORDER), rate, forward=False)
            for part in np.array_split(distinct, -(-len(distinct) // _CHUNK))
        ]
    )
    result[moved] = found[place]
    return result
