"""Random cases of the mini-batch certificates, for `soundness.py`, solved exactly.

The loss is linear, so one step is θ ← (1 − ηλ)θ − (η/b)·Σ gradients + N(0, ζ²): given the batches
both models are Gaussian with one variance. The divergence of batches and model together, which the
bound covers, is a sum over all ways to draw the forgotten instances; that of the model alone is
smaller. "Blocks" are the mathematics alone: any law of the factor and the shift of a step, and
plans that cut even ten steps into blocks.
"""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import numpy as np
from exact import Long
from scipy.special import log_ndtr
from soundness_cases import Case, Family, any_order, log_uniform

from opacus_pil.certificates import PoissonContractionCertificate, known_batches
from opacus_pil.certificates.batch_laws import Law
from opacus_pil.certificates.batch_moments import FINE, BatchMoments

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


def _chain(rng: np.random.Generator) -> tuple[dict[str, Any], BatchMoments, Any, Any]:
    """Laws of a short chain, its moments, and of each way to draw it: log probability, μ."""
    training, steps = int(rng.integers(1, 9)), int(rng.integers(0, 5))
    kinds, members = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    while (kinds * (members + 1)) ** training * kinds**steps > 100_000:
        training, steps = max(1, training - 1), max(0, steps - 1)
    factors = np.sort(rng.uniform(0.3, 1.0, size=kinds))
    if rng.uniform() < 0.5:
        factors[-1] = rng.choice([1.0, 1.0 + 1e-12, 1.05, 1.5])  # convex, or a batch expands
    shifts = np.arange(members + 1) * log_uniform(rng, 1e-2, 3.0)
    often = [np.array([1.0])] * 2
    for place, size in ((0, kinds), (1, members + 1)):
        rare = 10.0 ** rng.uniform(-4.0, 0.0, size=size)
        often[place] = rare / rare.sum()
    ours = BatchMoments(Law(factors, often[0]), Law(shifts, often[1]), training_steps=training)
    logs, gap, variance = Long([0.0]), Long([0.0]), Long([0.0])
    chances = [np.log(part.astype(Long)) for part in often]
    for step in range(training + steps):
        moves = shifts.astype(Long) if step < training else Long([0.0])
        chance = chances[1] if step < training else Long([0.0])
        logs = (logs[:, None, None] + chances[0][:, None] + chance).ravel()
        c = factors.astype(Long)[:, None]
        gap = (gap[:, None, None] * c + moves).ravel()
        variance = (variance[:, None, None] * c * c + 1 + 0 * moves).ravel()
    parameters = {
        "factors": factors.tolist(), "often": [part.tolist() for part in often],
        "shifts": shifts.tolist(), "training": training, "steps": steps,
    }  # fmt: skip
    return parameters, ours, logs, gap / np.sqrt(variance)


def blocks(rng: np.random.Generator) -> Case:
    parameters, ours, logs, mu = _chain(rng)
    order = any_order(rng, high=60.0)
    plan = FINE._replace(blocks=int(rng.integers(1, 5)))
    bound = float(ours.rdp(np.array([order]), steps=parameters["steps"], resolution=plan)[0])
    power = Long(order) * (Long(order) - 1) / 2 * mu**2
    if power.max() < 1e4:
        moment = np.log1p(np.exp(logs) @ np.expm1(power))
    else:  # beyond long doubles, and so large that 1 does not matter
        top = (logs + power).max()
        moment = top + np.log(np.exp(logs + power - top).sum())
    exact = moment / (Long(order) - 1)
    return Case([(bound, exact)], {**parameters, "order": order, "plan": plan})


def converted(rng: np.random.Generator) -> Case:
    parameters, ours, logs, mu = _chain(rng)
    delta = log_uniform(rng, 1e-6, 0.2)
    epsilon = ours.epsilon(delta=delta, steps=parameters["steps"])
    mu = np.maximum(mu.astype(float), 1e-12)  # a curve that grows in μ
    low = log_ndtr(-epsilon / mu + mu / 2)
    high = np.minimum(epsilon + log_ndtr(-epsilon / mu - mu / 2), low)
    exact = float(np.exp(logs.astype(float)) @ (np.exp(low) - np.exp(high)))
    return Case([(delta, exact)], {**parameters, "delta": delta, "epsilon": epsilon})


FAMILIES = [
    Family("mini-batches, Poisson", "enumeration", poisson, 200, 1e-15),
    Family("mini-batches, blocks", "enumeration", blocks, 200, 1e-15),
    Family("mini-batches, δ of ε", "enumeration", converted, 100, 1e-9),
    Family("mini-batches, known", "linear chain", known, 150, 1e-30),
]
