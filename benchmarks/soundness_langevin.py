"""Random cases of the log-Sobolev certificates, for `soundness.py`, against Gaussian chains.

Every law of θ ← c·θ + s + N(0, ζ²) from a Gaussian start is Gaussian, its log-Sobolev constant is
its variance, and the divergence of two Gaussians is a formula.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
from soundness_cases import Case, Family, any_order, log_uniform

from opacus_pil.accounting import DEFAULT_ORDERS
from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    LangevinCertificate,
    best_of,
)

DIGITS = 200  # near the end of a long chain the laws differ in late digits only
UP = 1.0 + 1e-14  # constants and curves are handed over rounded up


def gaussian_divergence(order: Any, gap: Any, variance: Any, other: Any) -> Any:
    """D_α(N(gap, variance) ‖ N(0, other)): Gil, Alajaji, Linder (2013), Table 2."""
    a = mpmath.mpf(order)
    mixed = (1 - a) * variance + a * other
    if mixed <= 0:
        return mpmath.inf
    logs = mpmath.log(mixed) - (1 - a) * mpmath.log(variance) - a * mpmath.log(other)
    return a * gap * gap / (2 * mixed) + logs / (2 * (1 - a))


class Laws:
    """A trained and a retrained Gaussian law, carried along by the unlearning step."""

    def __init__(self, rng: np.random.Generator, *, stationary: bool) -> None:
        self.c, self.noise = float(rng.uniform(0.3, 0.999)), log_uniform(rng, 1e-2, 1e2)
        c, variance = mpmath.mpf(self.c), mpmath.mpf(self.noise) ** 2
        self.limit = variance / (1 - c * c)
        if stationary:
            self.variance = self.limit * mpmath.mpf(rng.uniform(0.3, 1.0))
            self.other = self.limit
        else:
            self.variance = self.limit * mpmath.mpf(log_uniform(rng, 0.05, 5.0))
            self.other = self.variance
        self.gap = mpmath.sqrt(self.limit) * mpmath.mpf(log_uniform(rng, 1e-3, 10.0))

    def after(self, steps: int, start: Any) -> Any:
        """Variance after some steps."""
        shrunk = mpmath.mpf(self.c) ** (2 * steps)
        return shrunk * start + (1 - shrunk) * self.limit


def _curve(laws: Laws) -> tuple[float, ...]:
    values = (
        gaussian_divergence(order, laws.gap, laws.variance, laws.other) for order in DEFAULT_ORDERS
    )
    return tuple(float(value) * UP for value in values)


def _decay(rng: np.random.Generator, *, stationary: bool, moving: bool) -> Case:
    order, steps = any_order(rng, high=1000.0), int(rng.integers(0, 60))
    with mpmath.workdps(DIGITS):
        laws = Laws(rng, stationary=stationary)
        ours = LangevinCertificate(
            _curve(laws), DEFAULT_ORDERS, laws.c, laws.noise, float(laws.other) * UP,
            "stationary" if stationary else "same_horizon", moving_order=moving,
        )  # fmt: skip
        exact = gaussian_divergence(
            order,
            mpmath.mpf(laws.c) ** steps * laws.gap,
            laws.after(steps, laws.variance),
            laws.after(steps, laws.other),
        )
    bound = float(ours.rdp([order], steps=steps)[0])
    parameters = {
        "c": laws.c, "noise": laws.noise, "gap": float(laws.gap), "order": order, "steps": steps,
        "variances": [float(laws.variance), float(laws.other)], "moving_order": moving,
    }  # fmt: skip
    return Case([(bound, exact)], parameters)


def same_horizon(rng: np.random.Generator) -> Case:
    return _decay(rng, stationary=False, moving=False)


def same_horizon_moving(rng: np.random.Generator) -> Case:
    return _decay(rng, stationary=False, moving=True)


def stationary(rng: np.random.Generator) -> Case:
    return _decay(rng, stationary=True, moving=bool(rng.integers(0, 2)))


def retrained(rng: np.random.Generator) -> Case:
    """From the law retrained for T steps: what the triangle through π′ costs."""
    order, steps, moving = any_order(rng, high=50.0), int(rng.integers(0, 60)), rng.integers(0, 2)
    with mpmath.workdps(DIGITS):
        laws = Laws(rng, stationary=True)
        laws.other = laws.variance  # trained and retrained law, on the way to π′
        distance = mpmath.sqrt(laws.limit) * mpmath.mpf(log_uniform(rng, 1e-4, 1.0))

        def to_limit(alpha: float) -> float:
            with mpmath.workdps(DIGITS):
                value = gaussian_divergence(alpha, distance, laws.variance, laws.limit)
                return float(value) * UP

        def from_limit(alpha: float) -> float:
            with mpmath.workdps(DIGITS):
                value = gaussian_divergence(alpha, distance, laws.limit, laws.variance)
                return float(value) * UP

        ours = LangevinCertificate(
            _curve(laws), DEFAULT_ORDERS, laws.c, laws.noise, float(laws.limit) * UP, "retrained",
            retrained_to_stationary=to_limit, stationary_to_retrained=from_limit,
            moving_order=bool(moving),
        )  # fmt: skip
        # π′ has mean 0, ν′ mean −distance, the trained law is `gap` beyond ν′
        moved = mpmath.mpf(laws.c) ** steps * (laws.gap - distance) + distance
        exact = gaussian_divergence(order, moved, laws.after(steps, laws.variance), laws.variance)
    bound = float(ours.rdp([order], steps=steps)[0])
    parameters = {
        "c": laws.c, "noise": laws.noise, "gap": float(laws.gap), "distance": float(distance),
        "variance": float(laws.variance), "order": order, "steps": steps,
    }  # fmt: skip
    return Case([(bound, exact)], parameters)


def _replaced(rng: np.random.Generator) -> tuple[dict[str, Any], Any, Any, Any]:
    """Quadratic losses m‖θ‖²/2 − ⟨g, θ⟩ with S of n gradients turned round: Z, c, variance."""
    size, convexity = int(rng.integers(10, 10_000)), log_uniform(rng, 1e-2, 1.0)
    smoothness = convexity * float(rng.uniform(1.0, 5.0))
    setting = {
        "num_instances": size, "num_deleted": int(rng.integers(1, size // 2)),
        "strong_convexity": convexity, "smoothness": smoothness,
        "step_size": float(rng.uniform(0.01, 1.0)) * 2.0 / (convexity + smoothness) * (1 - 1e-12),
        "langevin_sigma": log_uniform(rng, 1e-2, 10.0), "gradient_bound": log_uniform(rng, 0.1, 5),
    }  # fmt: skip
    m, eta = mpmath.mpf(convexity), mpmath.mpf(setting["step_size"])
    distance = 2 * mpmath.mpf(setting["num_deleted"]) * setting["gradient_bound"] / (size * m)
    c = 1 - eta * m
    return setting, distance, c, 2 * eta * mpmath.mpf(setting["langevin_sigma"]) ** 2 / (1 - c * c)


def _replacement(rng: np.random.Generator, *, published: bool) -> Case:
    order, steps = any_order(rng, high=1000.0), int(rng.integers(0, 200))
    with mpmath.workdps(DIGITS):
        setting, distance, c, variance = _replaced(rng)
        make = LangevinCertificate.chien2024 if published else LangevinCertificate.strongly_convex
        exact = order * (c**steps * distance) ** 2 / (2 * variance)
        bound = float(make(**setting).rdp([order], steps=steps)[0])
    return Case([(bound, exact)], {**setting, "order": order, "steps": steps})


def replacement_published(rng: np.random.Generator) -> Case:
    return _replacement(rng, published=True)


def replacement_sharp(rng: np.random.Generator) -> Case:
    return _replacement(rng, published=False)


def best(rng: np.random.Generator) -> Case:
    """The least of contraction, log-Sobolev and data processing on one chain."""
    training, steps = int(rng.integers(1, 40)), int(rng.integers(0, 40))
    c, noise, order = float(rng.uniform(0.5, 1.0)), log_uniform(rng, 1e-2, 1e2), any_order(rng)
    shift = noise * log_uniform(rng, 1e-3, 1.0)
    with mpmath.workdps(DIGITS):
        gap, variance = mpmath.mpf(0), mpmath.mpf(0)
        for t in range(training + steps):
            if t == training:
                start, constant = gap * gap / (2 * variance), variance
            gap = c * gap + (shift if t < training else 0)
            variance = mpmath.mpf(c) ** 2 * variance + mpmath.mpf(noise) ** 2
        if not steps:
            start, constant = gap * gap / (2 * variance), variance
        curve = tuple(float(a * start) * UP for a in DEFAULT_ORDERS)
        transcript = (shift / noise) ** 2 / 2 * training * UP
        exact = order * gap * gap / (2 * variance)
    ours = best_of(
        [
            ContractionCertificate(c, noise, (shift,) * training),
            LangevinCertificate(curve, DEFAULT_ORDERS, c, noise, float(constant) * UP),
            DataProcessingCertificate([a * transcript for a in DEFAULT_ORDERS], DEFAULT_ORDERS),
        ]
    )
    parameters = {
        "c": c, "noise": noise, "shift": shift, "training": training, "steps": steps,
        "order": order,
    }  # fmt: skip
    return Case([(float(ours.rdp([order], steps=steps)[0]), exact)], parameters)


CHAIN = "Gaussian chain"
FAMILIES = [
    Family("Langevin, same horizon", CHAIN, same_horizon, 250, 1e-30),
    Family("Langevin, moving order", CHAIN, same_horizon_moving, 250, 1e-30),
    Family("Langevin, stationary", CHAIN, stationary, 250, 1e-30),
    Family("Langevin, retrained", CHAIN, retrained, 150, 1e-30),
    Family("Langevin, chien2024", CHAIN, replacement_published, 150, 1e-30),
    Family("Langevin, strongly convex", CHAIN, replacement_sharp, 150, 1e-30),
    Family("least of several", CHAIN, best, 200, 1e-30),
]
