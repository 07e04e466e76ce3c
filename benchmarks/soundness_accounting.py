"""Random cases of forget sets, loss distributions and the accountant, for `soundness.py`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
from exact import Long, Mixture, binomial_divergence
from exact_curves import gaussian_epsilon, mixture_delta
from scipy.optimize import brentq
from soundness_cases import Case, Family, any_order, any_rate, as_mpf, log_uniform, rare_and_far

from opacus_pil.accounting import PerInstanceAccountant, group_rdp
from opacus_pil.accounting.pld import tight_epsilon, tight_group_epsilon

# --- forget sets ---------------------------------------------------------------------------------


def _members(rng: np.random.Generator, low: int, high: int) -> tuple[list[float], float, float]:
    size = log_uniform(rng, 1e-3, 2.0)
    values = (size * rng.uniform(0.1, 1.0, size=int(rng.integers(low, high + 1)))).tolist()
    if rng.integers(0, 4):
        return values, float(np.clip(any_rate(rng, 1e-6), 0.0, 0.999)), any_order(rng, high=300.0)
    far, rate = rare_and_far(rng)
    return [far / size * value for value in values], rate, any_order(rng, high=300.0)


def group_collinear(rng: np.random.Generator) -> Case:
    values, rate, order = _members(rng, 2, 3)
    bound = group_rdp(values, noise_multiplier=1.0, sample_rate=rate, orders=[order])[0]
    law = Mixture.of_members(values, rate)
    exact = max(law.divergence(order, forward=side) for side in (True, False))
    return Case([(bound, exact)], {"sensitivities": values, "rate": rate, "order": order})


def group_gram(rng: np.random.Generator) -> Case:
    """Two or three gradients in a plane, both directions by the tensor trapezoid rule."""
    gradients = rng.normal(size=(int(rng.integers(2, 4)), 2)) * log_uniform(rng, 0.1, 1.0)
    if rng.integers(0, 5) == 0:
        gradients[1] = -gradients[0] * rng.choice([0.5, 1.0])
    rate = float(rng.uniform(0.02, 0.7))
    order = float(rng.integers(2, 6)) if rng.integers(0, 2) else float(rng.uniform(1.1, 6.0))
    bound = group_rdp(
        np.linalg.norm(gradients, axis=1), noise_multiplier=1.0, sample_rate=rate, orders=[order],
        gram=gradients @ gradients.T,
    )[0]  # fmt: skip
    drawn = np.array(list(itertools.product((0, 1), repeat=len(gradients))), dtype=float)
    centres, size = drawn @ gradients, drawn.sum(axis=1)
    masses = rate**size * (1 - rate) ** (len(gradients) - size)
    reach = 9.0 + order * float(np.linalg.norm(centres, axis=1).max())
    step = min(0.12, 1.0 / (1.0 + reach / 10))
    axis = np.arange(-reach, reach, step)
    x, y = axis[:, None], axis[None, :]
    density = sum(
        p * np.exp(c[0] * x + c[1] * y - c @ c / 2) for p, c in zip(masses, centres, strict=True)
    )
    weight = np.exp(-(x * x + y * y) / 2) / (2 * math.pi) * step * step
    logs, beyond = np.log(density), density - 1
    moments = [
        float(((np.expm1(power * logs) - power * beyond) * weight).sum())
        for power in (order, 1 - order)
    ]
    exact = math.log1p(max(moments)) / (order - 1)
    parameters = {"gradients": gradients.tolist(), "rate": rate, "order": order}
    return Case([(bound, exact)], parameters)


def group_many(rng: np.random.Generator) -> Case:
    """Up to 120 members, unequal, at order 2: the second moment of the exact convolution."""
    places = rng.integers(1, int(rng.integers(2, 12)), size=int(rng.integers(13, 121)))
    unit, rate = log_uniform(rng, 1e-4, 0.1), log_uniform(rng, 1e-4, 0.5)
    drawn, left = np.log(Long(rate)), np.log1p(-Long(rate))
    logs = np.zeros(1, dtype=Long)
    for place in places:
        nothing = np.full(place, -np.inf, dtype=Long)
        logs = np.logaddexp(np.append(logs + left, nothing), np.append(nothing, logs + drawn))
    kept = np.flatnonzero(logs > -np.inf)
    logs, exponent = logs[kept], np.outer(kept, kept) * Long(unit) ** 2
    masses, total = logs[:, None] + logs, Long(0)
    near = exponent < 1
    total += (np.exp(masses[near]) * np.expm1(exponent[near])).sum()
    total += (np.exp(masses[~near] + exponent[~near]) - np.exp(masses[~near])).sum()
    exact = np.log1p(total)
    values = unit * places
    bound = group_rdp(values, noise_multiplier=1.0, sample_rate=rate, orders=[2.0])[0]
    return Case([(bound, exact)], {"unit": unit, "places": places.tolist(), "rate": rate})


# --- loss distributions --------------------------------------------------------------------------


def _delta_to_epsilon(delta_of: Any, delta: float) -> float:
    """Root of δ(ε) = δ by a bracketing search; 0 where δ(0) is small enough."""
    if delta_of(0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high) > delta:
        high *= 2
    return float(brentq(lambda e: delta_of(e) / delta - 1.0, 0.0, high, xtol=1e-13))


def loss_distribution(rng: np.random.Generator) -> Case:
    """Full batches: one Gaussian. Otherwise one sampled step, both directions."""
    noise, sensitivity = log_uniform(rng, 0.7, 20.0), float(rng.uniform(0.1, 1.0))
    delta = log_uniform(rng, 1e-7, 1e-2)
    rate, count = 1.0, int(log_uniform(rng, 1, 300))
    if rng.integers(0, 2):
        rate, count = log_uniform(rng, 1e-3, 1.0), 1
    bound = tight_epsilon([(sensitivity, noise, rate, count)], delta=delta)
    shift = mpmath.mpf(sensitivity) / mpmath.mpf(noise) * mpmath.sqrt(count)
    atoms, masses = [mpmath.mpf(0), shift], [1 - mpmath.mpf(rate), mpmath.mpf(rate)]
    if rate == 1.0:
        exact = gaussian_epsilon(shift, delta)
    else:
        exact = _delta_to_epsilon(lambda e: float(max(mixture_delta(atoms, masses, e))), delta)
    parameters = {"run": [sensitivity, noise, rate, count], "delta": delta}
    return Case([(bound, exact)], parameters)


def group_loss_distribution(rng: np.random.Generator) -> Case:
    values = rng.uniform(0.1, 1.0, size=int(rng.integers(2, 4))).tolist()
    noise, rate = log_uniform(rng, 1.0, 10.0), log_uniform(rng, 1e-2, 0.9)
    delta = log_uniform(rng, 1e-6, 1e-2)
    bound = tight_group_epsilon([(values, noise, rate, 1)], delta=delta)
    law = Mixture.of_members((np.array(values, dtype=Long) / Long(noise)).tolist(), rate)
    atoms, masses = [as_mpf(m) for m in law.shifts], [as_mpf(p) for p in law.masses]
    exact = _delta_to_epsilon(lambda e: float(max(mixture_delta(atoms, masses, e))), delta)
    parameters = {"sensitivities": values, "noise": noise, "rate": rate, "delta": delta}
    return Case([(bound, exact)], parameters)


# --- the accountant ------------------------------------------------------------------------------


def accountant(rng: np.random.Generator) -> Case:
    """Moving levels against the exact sum at the sensitivities as given, before rounding."""
    size, orders = 4, (2, 5, 16)
    ours = PerInstanceAccountant(size, orders=orders, levels=int(rng.choice([256, 1024, 4096])))
    kernels = [(log_uniform(rng, 0.3, 30.0), any_rate(rng, 1e-4)) for _ in range(3)]
    now, gone = np.ones(size), np.zeros(size, dtype=bool)
    held = [[mpmath.mpf(0)] * len(orders) for _ in range(size)]
    for _ in range(int(rng.integers(1, 30))):
        noise, rate = kernels[int(rng.integers(0, 3))]
        unattributed = rng.integers(0, 10) == 0
        rows = np.flatnonzero((rng.uniform(size=size) < 0.4) & ~gone)
        fresh = np.array([log_uniform(rng, 1e-3, 1.0) for _ in rows]).clip(1e-3, 1.0)
        fresh[rng.uniform(size=len(rows)) < 0.1] = 0.0
        if rng.integers(0, 8) == 0:
            now = np.where(gone, now, rng.uniform(1e-3, 1.0, size=size))
            ours.observe_all(now)
        if not unattributed:
            now[rows] = fresh
        ours.step(
            indices=None if unattributed else rows,
            sensitivities=None if unattributed else fresh,
            noise_multiplier=noise,
            sample_rate=rate,
        )
        for i in np.flatnonzero(~gone):
            shift = mpmath.mpf(1.0 if unattributed else now[i]) / mpmath.mpf(noise)
            for j, order in enumerate(orders):
                held[i][j] += binomial_divergence(shift, order, rate)
        if rng.integers(0, 15) == 0 and (~gone).sum() > 1:
            leaver = int(np.flatnonzero(~gone)[0])
            ours.forget([leaver])
            gone[leaver] = True
        if rng.integers(0, 15) == 0:
            state = ours.state_dict()
            ours = PerInstanceAccountant(size, orders=orders, levels=len(ours.levels))
            ours.load_state_dict(state)
    rdp = ours.rdp()
    pairs = [(float(rdp[i, j]), held[i][j]) for i in range(size) for j in range(len(orders))]
    return Case(pairs, {"kernels": kernels, "steps": ours.steps, "levels": len(ours.levels)})


def accountant_budgets(rng: np.random.Generator) -> Case:
    """Under a filter: budgets against the exact sum at the caps that were enforced."""
    size, orders = 4, (2, 5, 16)
    caps, budget = rng.uniform(size=size), log_uniform(rng, 0.05, 20.0)
    kernels = [(log_uniform(rng, 0.5, 10.0), any_rate(rng, 1e-3)) for _ in range(3)]
    moving = bool(rng.integers(0, 2))
    if not moving:  # a hair less than a whole number of the first instance's steps
        caps[0], kernels = 1.0, kernels[:1]
        price = float(binomial_divergence(1 / mpmath.mpf(kernels[0][0]), 5, kernels[0][1]))
        budget = price * int(rng.integers(1, 15)) * (1 - 1e-9)
    places = rng.permutation(3) if moving else [0, 1, 2]
    curve = budget * np.array([math.inf, 1.0, 1.0 if moving else math.inf])[places]
    ours = PerInstanceAccountant(size, orders=orders, caps=caps, budget=curve)
    held = [[mpmath.mpf(0)] * len(orders) for _ in range(size)]
    for _ in range(int(rng.integers(1, 25))):
        noise, rate = kernels[int(rng.integers(0, len(kernels)))]
        if moving and rng.integers(0, 3) == 0:
            ours.set_caps(rng.uniform(size=size))
        enforced = ours.caps_for(noise_multiplier=noise, sample_rate=rate)
        rows = np.flatnonzero(rng.uniform(size=size) < 0.5)
        ours.step(
            indices=rows, sensitivities=enforced[rows], noise_multiplier=noise, sample_rate=rate,
            guarantee="bound",
        )  # fmt: skip
        for i in np.flatnonzero(enforced):
            for j, order in enumerate(orders):
                shift = mpmath.mpf(enforced[i]) / mpmath.mpf(noise)
                held[i][j] += binomial_divergence(shift, order, rate)
    claimed, spent = ours.rdp(), ours.spent_rdp()
    places = list(itertools.product(range(size), range(len(orders))))
    pairs = [(float(spent[i, j]), held[i][j]) for i, j in places]
    i, j = max(places, key=lambda place: held[place[0]][place[1]] / claimed[place])
    parameters = {"caps": caps.tolist(), "budget": curve.tolist(), "kernels": kernels}
    exceeded = {"the budget": (float(held[i][j]), float(claimed[i, j]))}
    return Case(pairs, parameters, exceeded)


def accountant_set(rng: np.random.Generator) -> Case:
    """A forget set read from the history against its exact joint steps (collinear gradients)."""
    order, size, members = any_order(rng, low=1.2, high=40.0), 4, [0, 2]
    ours = PerInstanceAccountant(size, orders=[order], history=True)
    now, exact = np.ones(size), Long(0)
    for _ in range(int(rng.integers(1, 6))):
        noise, rate = log_uniform(rng, 0.5, 10.0), min(any_rate(rng, 1e-3), 0.999)
        rows = np.flatnonzero(rng.uniform(size=size) < 0.6)
        now[rows] = rng.uniform(0.01, 1.0, size=len(rows))
        ours.step(indices=rows, sensitivities=now[rows], noise_multiplier=noise, sample_rate=rate)
        shifts = [Long(now[i]) / Long(noise) for i in members]
        law = Mixture.of_members(shifts, rate)
        exact += max(law.divergence(order, forward=side) for side in (True, False))
    bound = float(ours.group_rdp(members)[0])
    return Case([(bound, exact)], {"order": order, "steps": ours.steps, "last": now.tolist()})


# --- table ---------------------------------------------------------------------------------------

FAMILIES = [
    Family("forget set, norms", "80-bit quadrature", group_collinear, 400, 1e-15, 1e-9),
    Family("forget set, Gram matrix", "plane quadrature", group_gram, 350, 1e-11),
    Family("forget set, many members", "convolution", group_many, 250, 1e-13),
    Family("loss distribution", "closed form", loss_distribution, 150, 1e-10),
    Family("loss distribution, set", "closed form", group_loss_distribution, 40, 1e-10),
    Family("accountant", "binomial sums", accountant, 250, 1e-30),
    Family("accountant, budgets", "binomial sums", accountant_budgets, 150, 1e-30),
    Family("accountant, forget set", "80-bit quadrature", accountant_set, 150, 1e-15),
]
