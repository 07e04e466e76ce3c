"""Random cases of one step's divergence, of RDP to (ε, δ) and back, for `soundness.py`."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
from exact import Long, binomial_divergence, step_divergence
from exact_curves import epsilon_at, log_delta_at, normal_tail
from scipy.optimize import minimize_scalar
from soundness_cases import Case, Family, any_order, any_rate, log_uniform, rare_and_far

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    noise_multiplier_for,
    rdp_to_delta,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)

# --- one step ------------------------------------------------------------------------------------


def _one_step(rng: np.random.Generator, *, forward: bool) -> Case:
    noise = log_uniform(rng, 1e-2, 1e4)
    order = any_order(rng)
    if rng.integers(0, 4):
        sensitivity, rate = noise / log_uniform(rng, 1e-2, 1e8), any_rate(rng)
    else:
        far, rate = rare_and_far(rng)
        sensitivity = noise * far
    bound = sampled_gaussian_rdp(
        sensitivity, noise_multiplier=noise, sample_rate=rate, orders=[order],
        direction="with_without" if forward else "without_with",
    )[0]  # fmt: skip
    shift = Long(sensitivity) / Long(noise)
    exact = step_divergence(shift, order, rate, forward=forward)
    return Case(
        [(bound, exact)],
        {"sensitivity": sensitivity, "noise": noise, "rate": rate, "order": order},
    )


def step_forward(rng: np.random.Generator) -> Case:
    return _one_step(rng, forward=True)


def step_reverse(rng: np.random.Generator) -> Case:
    return _one_step(rng, forward=False)


def step_binomial(rng: np.random.Generator) -> Case:
    noise, rate = log_uniform(rng, 1e-2, 1e8), any_rate(rng)
    order = int(log_uniform(rng, 2.0, 1500.0))
    bound = sampled_gaussian_rdp(1.0, noise_multiplier=noise, sample_rate=rate, orders=[order])[0]
    exact = binomial_divergence(1 / mpmath.mpf(noise), order, rate)
    return Case([(bound, exact)], {"noise": noise, "rate": rate, "order": order})


def step_range(rng: np.random.Generator) -> Case:
    """Shifts and rates out of the ordinary; the exact value is replaced by a lower bound."""
    far = bool(rng.integers(0, 2))
    shift = log_uniform(rng, 3e2, 1e170) if far else log_uniform(rng, 1e-170, 1e-8)
    rate = log_uniform(rng, 1e-300, 1.0)
    order = any_order(rng) if far else any_order(rng, low=2.0)
    forward, back = (
        float(
            sampled_gaussian_rdp(
                shift, noise_multiplier=1.0, sample_rate=rate, orders=[order], direction=direction
            )[0]
        )
        for direction in ("with_without", "without_with")
    )
    with mpmath.workdps(400):
        r, q, a = mpmath.mpf(shift), mpmath.mpf(rate), mpmath.mpf(order)
        if far:  # drop 1 − q; cut the integral at r/4
            exact = max(a / (a - 1) * mpmath.log(q) + a * r * r / 2, mpmath.mpf(0))
            inside = mpmath.log1p(-normal_tail(r / 4)) / (a - 1) if r < 1e4 else mpmath.mpf(0)
            below = -mpmath.log(1 - q + q * mpmath.exp(-r * r / 4)) + inside
        else:  # D_α >= D_2; (1+u)^(−1) >= 1 − u + u² − u³ with E[u³] in closed form
            exact = mpmath.log1p(q * q * mpmath.expm1(r * r))
            third = q**3 * (mpmath.exp(3 * r * r) - 3 * mpmath.exp(r * r) + 2)
            below = mpmath.log1p(q * q * mpmath.expm1(r * r) - third)
        pairs = [(forward, +exact), (back, +below)]
    return Case(pairs, {"shift": shift, "rate": rate, "order": order})


# --- RDP to (ε, δ) and back ----------------------------------------------------------------------


def _curve(rng: np.random.Generator) -> tuple[list[float], list[float], float]:
    count = int(rng.integers(1, 40))
    orders = sorted({any_order(rng) for _ in range(count)})
    curve = np.sort([log_uniform(rng, 1e-12, 1e4) for _ in orders])
    curve[rng.uniform(size=len(orders)) < 0.1] = math.inf
    return curve.tolist(), orders, log_uniform(rng, 1e-300, 0.9)


def epsilon_given_orders(rng: np.random.Generator) -> Case:
    curve, orders, delta = _curve(rng)
    bound, _ = rdp_to_epsilon(curve, orders=orders, delta=delta)
    with mpmath.workdps(40):
        values = [epsilon_at(d, a, delta) for d, a in zip(curve, orders, strict=True)]
        exact = max(min(values), mpmath.mpf(0))
    return Case([(float(bound), exact)], {"rdp": curve, "orders": orders, "delta": delta})


def epsilon_all_orders(rng: np.random.Generator) -> Case:
    rho, delta = log_uniform(rng, 1e-6, 1e2), log_uniform(rng, 1e-12, 1e-2)
    orders = np.array(DEFAULT_ORDERS)
    bound, _ = rdp_to_epsilon(orders * rho, orders=orders, delta=delta)

    def at(log_gap: float) -> float:
        return float(epsilon_at(rho * (1 + math.exp(log_gap)), 1 + math.exp(log_gap), delta))

    best = minimize_scalar(at, bounds=(-12.0, 25.0), method="bounded", options={"xatol": 1e-9})
    with mpmath.workdps(40):
        order = 1 + mpmath.exp(mpmath.mpf(float(best.x)))
        exact = max(epsilon_at(mpmath.mpf(rho) * order, order, delta), mpmath.mpf(0))
    return Case([(float(bound), exact)], {"rdp per order": rho, "delta": delta})


def delta_given_orders(rng: np.random.Generator) -> Case:
    curve, orders, _ = _curve(rng)
    epsilon = log_uniform(rng, 1e-3, 1e3)
    bound, _ = rdp_to_delta(curve, orders=orders, epsilon=epsilon)
    with mpmath.workdps(40):
        logs = [log_delta_at(d, a, epsilon) for d, a in zip(curve, orders, strict=True)]
        exact = min(mpmath.exp(min(logs)), mpmath.mpf(1))
    return Case([(float(bound), exact)], {"rdp": curve, "orders": orders, "epsilon": epsilon})


def noise_for_target(rng: np.random.Generator) -> Case:
    """The noise found meets the target, exactly computed; with 0.1 % less noise ε exceeds it."""
    orders = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    delta, rate = log_uniform(rng, 1e-10, 1e-2), min(log_uniform(rng, 1e-4, 2.0), 1.0)
    floor = min(float(epsilon_at(0.0, a, delta)) for a in orders)
    epsilon, steps = max(floor, 0.01) * log_uniform(rng, 1.05, 30), int(log_uniform(rng, 1, 1e4))
    noise = float(
        noise_multiplier_for(
            epsilon=epsilon, delta=delta, steps=steps, sample_rate=rate, orders=orders
        )
    )

    def exact(noise: Any) -> Any:
        curve = [steps * binomial_divergence(1 / noise, a, rate) for a in orders]
        return min(epsilon_at(d, a, delta) for d, a in zip(curve, orders, strict=True))

    with mpmath.workdps(40):
        met, missed = exact(mpmath.mpf(noise)), exact(mpmath.mpf(noise) * mpmath.mpf("0.999"))
    parameters = {"epsilon": epsilon, "delta": delta, "steps": steps, "rate": rate, "noise": noise}
    return Case([(epsilon, met)], parameters, {"0.1 % less noise": (epsilon, float(missed))})


INTEGRAL = "80-bit quadrature"
FAMILIES = [
    Family("one step, forward", INTEGRAL, step_forward, 1800, 1e-15, 1e-9),
    Family("one step, reverse", INTEGRAL, step_reverse, 1300, 1e-15, 1e-9),
    Family("one step, integer orders", "binomial sum", step_binomial, 500, 1e-30, 1e-9),
    Family("one step, extreme ranges", "lower bounds", step_range, 400, 1e-30),
    Family("RDP to ε, given orders", "formula", epsilon_given_orders, 700, 1e-30),
    Family("RDP to ε, all real orders", "minimum", epsilon_all_orders, 500, 1e-13),
    Family("RDP to δ, given orders", "formula", delta_given_orders, 500, 1e-30),
    Family("noise for a target", "binomial sum", noise_for_target, 250, 1e-30),
]
