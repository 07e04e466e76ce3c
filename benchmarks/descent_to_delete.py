"""Descent-to-delete: noise-free gradient descent on the rest, then Gaussian noise on what is shown.

Neel, Roth, Sharifi-Malvajerdi (2021), arXiv:2007.02923, perturbed gradient descent for strongly
convex losses: with γ = (L − m)/(L + m) and step size 2/(L + m), an update (one record more or less)
moves the optimum by at most 2M/(mn), each of I steps brings a model γ times as near to it, so the
distances to the optimum stay below 4Mγ^I/(mn(1 − γ^I)) (n may fall to half, hence 4), those of the
updated and of the retrained model alike, and noise of
σ = 4√2·Mγ^I / (mn(1 − γ^I)(√(log(1/δ) + ε) − √log(1/δ))) makes them (ε, δ)-indistinguishable.
The formula is the one of the Langevin paper's code (`calculate_baseline_sigma`); the theorem itself
was not at hand, and its proof is redone in these lines. The guarantee is about the published model
only: the noise-free one is kept as a secret state and goes on with the next update.

Also a sharper form of our own for one request after a training that has converged: the optimum
moves by 2SM/(mn) when S of n records leave, no sum over earlier updates, the exact Gaussian curve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from opacus_pil.certificates.gaussian import gaussian_epsilon


class DescentToDelete(NamedTuple):
    """Constants of the averaged, regularised loss; S records leave in one update."""

    num_instances: int
    num_deleted: int
    strong_convexity: float
    smoothness: float
    gradient_bound: float

    @property
    def rate(self) -> float:
        """γ, what a step leaves of the distance to the optimum."""
        low, high = self.strong_convexity, self.smoothness
        return (high - low) / (high + low)

    @property
    def step_size(self) -> float:
        return 2.0 / (self.strong_convexity + self.smoothness)

    @property
    def moved(self) -> float:
        """Most by which the optimum moves when the records leave: 2SM/(mn)."""
        shift = 2.0 * self.num_deleted * self.gradient_bound
        return shift / (self.strong_convexity * self.num_instances)

    def training_steps(self, steps: int, *, start: float) -> int:
        """Steps of training that the theorem asks for, from at most `start` away."""
        return steps + math.ceil(max(math.log(start / self.moved), 0.0) / -math.log(self.rate))

    def published_sigma(self, steps: int, *, epsilon: float, delta: float) -> float:
        """σ of the theorem after `steps` >= 1 steps; records that leave together add up."""
        left = self.rate**steps
        apart = 4.0 * self.moved * left / (1.0 - left)
        log = math.log(1.0 / delta)
        return apart / (math.sqrt(2.0) * (math.sqrt(log + epsilon) - math.sqrt(log)))

    def sharp_sigma(self, steps: int, *, epsilon: float, delta: float, converged: float) -> float:
        """σ for one request, if training ended at most `converged` from the optimum."""
        apart = self.rate**steps * (self.moved + 2.0 * converged)
        # (ε, δ) of two Gaussians `apart`: μ = apart/σ, the largest with ε(μ) <= ε
        mu = brentq(lambda m: gaussian_epsilon(m, delta=delta) - epsilon, 1e-6, 1e3, xtol=1e-12)
        return apart / mu


def descend(
    weights: np.ndarray, features: np.ndarray, labels: np.ndarray, *,
    steps: int, step_size: float, weight_decay: float,
) -> np.ndarray:  # fmt: skip
    """So many steps of gradient descent on the mean logistic loss + weight_decay/2·‖θ‖²."""
    features, labels = features.astype(weights.dtype), labels.astype(weights.dtype)
    for _ in range(steps):
        slope = 1.0 / (1.0 + np.exp(-features @ weights)) - labels
        gradient = features.T @ slope / len(features) + weight_decay * weights
        weights = weights - step_size * gradient
    return weights
