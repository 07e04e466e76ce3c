"""Random cases of the mini-batch certificates, for `soundness.py`, solved exactly.

The loss is linear, so one step is θ ← (1 − ηλ)θ − (η/b)·Σ gradients + N(0, ζ²): given the batches
both models are Gaussian with one variance. The divergence of batches and model together, which the
bound covers, is a sum over all ways to draw the forgotten instances; that of the model alone is
smaller.
"""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import numpy as np
from exact import Long
from soundness_cases import Case, Family, any_order, log_uniform

from opacus_pil.certificates import PoissonContractionCertificate, known_batches

DIGITS = 40


def _setting(rng: np.random.Generator) -> tuple[float, float, float]:
    """η, λ, b."""
    eta = log_uniform(rng, 1e-2, 2.0)
    return eta, float(rng.uniform(0.0, 0.9)) / eta, log_uniform(rng, 1.0, 100.0)


def poisson(rng: np.random.Generator) -> Case:
    eta, decay, batch = _setting(rng)
    training, steps, members = (int(rng.integers(*span)) for span in ((1, 11), (0, 12), (1, 4)))
    training = max(1, min(training, 10 // members))  # up to 1,024 ways
    bounds = rng.uniform(0.2, 1.0, size=members)
    noise = float(eta / batch * log_uniform(rng, 0.3, 30.0))
    rate, order = log_uniform(rng, 1e-2, 0.95), any_order(rng, high=60.0)
    ours = PoissonContractionCertificate(
        bounds.tolist(), rate, noise, training, eta, decay, 0.0, batch, int(rng.integers(0, 1000))
    )
    c = 1 - Long(eta) * Long(decay)
    std = Long(noise) * np.sqrt((c ** (2 * np.arange(training + steps))).sum())
    carried = c ** (steps + np.arange(training))
    shifts = np.outer(carried, Long(eta) / Long(batch) * bounds.astype(Long)).ravel() / std
    coins = np.array(list(itertools.product((0, 1), repeat=shifts.size)), dtype=Long)
    heads = coins.sum(axis=1)
    logs = heads * np.log(Long(rate)) + (shifts.size - heads) * np.log1p(-Long(rate))
    total = np.exp(logs) @ np.expm1(Long(order) * (Long(order) - 1) / 2 * (coins @ shifts) ** 2)
    exact = np.log1p(total) / (Long(order) - 1)
    parameters = {
        "eta": eta, "decay": decay, "batch": batch, "bounds": bounds.tolist(), "noise": noise,
        "rate": rate, "training": training, "steps": steps, "order": order,
    }  # fmt: skip
    return Case([(float(ours.rdp([order], steps=steps)[0]), exact)], parameters)


def known(rng: np.random.Generator) -> Case:
    eta, decay, batch = _setting(rng)
    training, steps, members = (int(rng.integers(*span)) for span in ((1, 30), (0, 30), (1, 6)))
    bounds = rng.uniform(0.0, 1.0, size=members)
    batches = [np.flatnonzero(rng.uniform(size=20) < 0.4) for _ in range(training)]
    noise, order = float(eta / batch * log_uniform(rng, 0.1, 30.0)), any_order(rng)
    ours = known_batches(
        batches, forget=np.arange(members), gradient_bounds=bounds, noise_std=noise,
        step_size=eta, weight_decay=decay, smoothness=0.0, expected_batch_size=batch,
    )  # fmt: skip
    with mpmath.workdps(DIGITS):
        c, gap, variance = 1 - mpmath.mpf(eta) * decay, mpmath.mpf(0), mpmath.mpf(0)
        for t in range(training + steps):
            rows: Any = batches[t] if t < training else []
            drawn = mpmath.fsum(mpmath.mpf(bounds[i]) for i in rows if i < members)
            gap = c * gap + mpmath.mpf(eta) / batch * drawn
            variance = c * c * variance + mpmath.mpf(noise) ** 2
        exact = order * gap * gap / (2 * variance)
    parameters = {
        "eta": eta, "decay": decay, "batch": batch, "bounds": bounds.tolist(), "noise": noise,
        "batches": [rows.tolist() for rows in batches], "steps": steps, "order": order,
    }  # fmt: skip
    return Case([(float(ours.rdp([order], steps=steps)[0]), exact)], parameters)


FAMILIES = [
    Family("mini-batches, Poisson", "enumeration", poisson, 200, 1e-15),
    Family("mini-batches, known", "linear chain", known, 150, 1e-30),
]
