"""Random cases of opacus_pil.certificates, for `soundness.py`, against chains solved exactly."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
from exact import step_divergence
from exact_curves import gaussian_delta, gaussian_epsilon
from scipy.optimize import nnls
from scipy.stats import norm
from soundness_cases import Case, Family, any_order, log_uniform

from opacus_pil.accounting import DEFAULT_ORDERS, sampled_gaussian_rdp
from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    NoisyFineTuningCertificate,
    sequential_requests,
)

DIGITS = 40


class LinearChain:
    """z ← c·z + s + N(0, ζ²) with and without the shifts: two Gaussians of one variance."""

    def __init__(self, distance: float = 0.0, variance: Any = 0) -> None:
        self.gap, self.variance = mpmath.mpf(distance), mpmath.mpf(variance)

    def step(self, contraction: Any, noise: float, shift: Any = 0, times: int = 1) -> LinearChain:
        for _ in range(times):
            self.gap = contraction * self.gap + shift
            self.variance = mpmath.mpf(contraction) ** 2 * self.variance + mpmath.mpf(noise) ** 2
        return self

    @property
    def mu(self) -> Any:
        return self.gap / mpmath.sqrt(self.variance)


# --- contraction ---------------------------------------------------------------------------------


def _constant_chain(rng: np.random.Generator) -> tuple[float, float, float, int, float]:
    """c, ζ, s, T, Z_0 with a feasible chord: no initial distance, or no shifts."""
    c = 1.0 if rng.integers(0, 5) == 0 else float(rng.uniform(0.2, 1.0))
    noise, size = log_uniform(rng, 1e-3, 1e3), log_uniform(rng, 1e-4, 1e2)
    if rng.integers(0, 2):
        return c, noise, noise * size, int(rng.integers(1, 60)), 0.0
    return c, noise, 0.0, 0, noise * size


def contraction_chord(rng: np.random.Generator) -> Case:
    """The chain is exact where one chord is the hull: constant c, s, ζ; or T = 0."""
    c, noise, shift, training, distance = _constant_chain(rng)
    steps, order = int(rng.integers(0 if training else 1, 80)), any_order(rng)
    ours = ContractionCertificate(c, noise, (shift,) * training, distance)
    with mpmath.workdps(DIGITS):
        chain = LinearChain(distance).step(c, noise, shift, training).step(c, noise, times=steps)
        exact = mpmath.mpf(order) * chain.mu**2 / 2
        pairs = [(ours.mu(steps), +chain.mu), (float(ours.rdp([order], steps=steps)[0]), exact)]
    parameters = {
        "c": c, "noise": noise, "shift": shift, "training": training, "distance": distance,
        "steps": steps, "order": order,
    }  # fmt: skip
    return Case(pairs, parameters)


def contraction_requests(rng: np.random.Generator) -> Case:
    """Requests served one after the other: shifts that fall at each; the chain is exact."""
    c, noise, _, _, _ = _constant_chain(rng)
    phases = rng.integers(0, 20, size=int(rng.integers(1, 5))).tolist()
    phases[0] += 1
    shifts, steps = noise * rng.uniform(0.0, 1.0, size=len(phases)), int(rng.integers(0, 40))
    ours = sequential_requests(c, noise_std=noise, phase_steps=phases, request_shifts=shifts)
    with mpmath.workdps(DIGITS):
        chain = LinearChain()
        for phase, length in enumerate(phases):
            left = mpmath.fsum(mpmath.mpf(shift) for shift in shifts[phase:])
            chain.step(c, noise, left, length)
        exact = chain.step(c, noise, times=steps).mu
    parameters = {
        "c": c, "noise": noise, "phases": phases, "shifts": shifts.tolist(), "steps": steps,
    }  # fmt: skip
    return Case([(ours.mu(steps), exact)], parameters)


def contraction_hull(rng: np.random.Generator) -> Case:
    """Anything goes: μ² = min Σ y_t², z_t = c_t·z_{t−1} + s_t − ζ_t·y_t >= 0, z_N = 0.

    Solved by its dual (Lawson, Hanson 1974, Chapter 23, algorithm LDP; scipy's nnls). Any
    multipliers λ >= 0 give the lower bound λᵀh/‖Gᵀλ‖ on μ, whatever nnls got wrong: weak duality.
    """
    training, steps = int(rng.integers(1, 14)), int(rng.integers(0, 10))
    c = rng.uniform(0.3, 1.1, size=training) if rng.integers(0, 2) else np.full(training, 0.9)
    noise = np.exp(rng.normal(size=training)) if rng.integers(0, 2) else np.ones(training)
    shifts = rng.uniform(size=training) * (rng.uniform(size=training) < 0.5)
    shifts[-1] += 0.1
    distance, later_c = float(rng.uniform(0, 2) * rng.integers(0, 2)), float(rng.uniform(0.5, 1.05))
    later_noise = log_uniform(rng, 0.1, 3.0)
    ours = ContractionCertificate(
        c.tolist(), noise.tolist(), shifts.tolist(), distance,
        unlearning_contraction=later_c, unlearning_noise_std=later_noise,
    )  # fmt: skip
    total = training + steps
    all_c, all_s = np.append(c, [later_c] * steps), np.append(shifts, [0.0] * steps)
    all_noise = np.append(noise, [later_noise] * steps)
    rows, sides = np.zeros((total + 1, total)), np.zeros(total + 1)
    level, row = distance, np.zeros(total)
    for t in range(total):
        level, row = all_c[t] * level + all_s[t], all_c[t] * row
        row[t] -= all_noise[t]
        rows[t], sides[t] = row, -level
    rows[total], sides[total] = -row, level  # z_N <= 0
    multipliers, _ = nnls(np.vstack([rows.T, sides]), np.append(np.zeros(total), 1.0))
    exact = float(multipliers @ sides / np.linalg.norm(rows.T @ multipliers))
    parameters = {
        "c": all_c.tolist(), "noise": all_noise.tolist(), "shifts": all_s.tolist(),
        "distance": distance, "steps": steps,
    }  # fmt: skip
    return Case([(ours.mu(steps), exact)], parameters)


def contraction_glm(rng: np.random.Generator) -> Case:
    """Full-batch DP-SGD of the loss ⟨θ, x⟩, whose gradient x is clipped to its cap: a chain.

    The members share one direction. Opacus's clip factor cap·C/(‖x‖ + 1e-6) shortens by 1e-6 or
    less of ‖x‖, which the certificate does not use.
    """
    members, training, steps = (int(rng.integers(*span)) for span in ((1, 20), (1, 40), (0, 40)))
    caps = rng.uniform(0.01, 1.0, size=members)
    clip, noise, size = (log_uniform(rng, *span) for span in ((0.1, 10), (0.1, 100), (30, 1e4)))
    eta = log_uniform(rng, 1e-2, 5.0)
    decay = float(rng.uniform(0.01, 1.1)) / eta
    length = float(clip * caps.max() * rng.uniform(1.0, 2.0))
    ours = ContractionCertificate.one_output_glm(
        caps=caps, max_grad_norm=clip, step_size=eta, weight_decay=decay, feature_norm=length,
        noise_multiplier=noise, expected_batch_size=size, num_instances=int(size) + members,
        training_steps=training, loss_smoothness=0.0,
    )  # fmt: skip
    with mpmath.workdps(DIGITS):
        factors = [min(mpmath.mpf(1), cap * clip / (mpmath.mpf(length) + 1e-6)) for cap in caps]
        shift = mpmath.mpf(eta) / size * mpmath.fsum(factors) * length
        c = 1 - mpmath.mpf(eta) * decay
        # a negative c turns the gap round each step: exact, but then the shifts are not all alike
        std = mpmath.mpf(eta) * noise * clip / size
        chain = LinearChain().step(c, std, shift, training).step(c, std, times=steps)
        exact = abs(chain.mu)
    parameters = {
        "caps": caps.tolist(), "clip": clip, "noise": noise, "batch": size, "eta": eta,
        "decay": decay, "feature_norm": length, "training": training, "steps": steps,
    }  # fmt: skip
    return Case([(ours.mu(steps), exact)], parameters)


def contraction_epsilon(rng: np.random.Generator) -> Case:
    """ε, δ and the number of steps against the exact Gaussian curve."""
    c, noise, shift, training, distance = _constant_chain(rng)
    c = min(c, 0.995)
    delta, steps = log_uniform(rng, 1e-30, 0.3), int(rng.integers(1, 60))
    ours = ContractionCertificate(c, noise, (shift,) * training, distance)
    with mpmath.workdps(DIGITS):
        chain = LinearChain(distance).step(c, noise, shift, training).step(c, noise, times=steps)
        mu = +chain.mu
        pairs = [(ours.epsilon(delta=delta, steps=steps), gaussian_epsilon(mu, delta))]
        target = float(pairs[0][1] or mu * (1 + mu / 2)) * float(rng.uniform(0.05, 1.0))
        if mu < 100:
            pairs.append((ours.delta(epsilon=target, steps=steps), gaussian_delta(mu, target)))
        chain = LinearChain(distance).step(c, noise, shift, training)
        if chain.variance == 0:
            chain.step(c, noise)
        needed = 0 if training else 1
        while gaussian_delta(chain.mu, target) > delta:
            chain.step(c, noise)
            needed += 1
        pairs.append((float(ours.steps_for(epsilon=target, delta=delta)), mpmath.mpf(needed)))
    parameters = {
        "c": c, "noise": noise, "shift": shift, "training": training, "distance": distance,
        "steps": steps, "delta": delta, "target": target,
    }  # fmt: skip
    return Case(pairs, parameters)


# --- noisy fine-tuning ---------------------------------------------------------------------------


def finetuning_linear(rng: np.random.Generator) -> Case:
    """No gradient: the weights decay under noise, constant or a schedule; exact at every K."""
    clip, eta = log_uniform(rng, 0.01, 10.0), log_uniform(rng, 1e-3, 1.0)
    decay = float(rng.uniform(0.0, 0.999) * rng.integers(0, 2)) / eta
    steps = int(rng.integers(1, 60))
    noise: Any = log_uniform(rng, 0.05, 5.0)
    if rng.integers(0, 2):
        noise = (noise * rng.uniform(0.0, 1.0, size=steps)).tolist()
    distance = float(clip * rng.uniform(0.0, 3.0)) if rng.integers(0, 2) else None
    ours = NoisyFineTuningCertificate(clip, 0.0, eta, decay, noise, distance)
    with mpmath.workdps(DIGITS):
        c = 1 - mpmath.mpf(eta) * decay
        chain = LinearChain(2 * clip if distance is None else min(2 * clip, distance))
        for t in range(steps):
            chain.step(c, noise if isinstance(noise, float) else noise[t])
        exact = 3 * chain.mu**2 / 2
    parameters = {
        "model_clip": clip, "step_size": eta, "weight_decay": decay, "noise": noise,
        "distance": distance, "steps": steps,
    }  # fmt: skip
    return Case([(float(ours.rdp([3.0], steps=steps)[0]), exact)], parameters)


def finetuning_pushed(rng: np.random.Generator) -> Case:
    """A clipped gradient that drives the two runs apart; densities carried along on a grid."""
    clip, push = log_uniform(rng, 0.2, 1.5), float(rng.uniform(0.5, 6.0))
    gradient, eta, noise = float(rng.uniform(0.0, 1.5)), 0.4, float(rng.uniform(0.6, 1.2))
    decay, order = float(rng.uniform(0.0, 1.5) * rng.integers(0, 2)), float(rng.uniform(1.2, 4.0))
    ours = NoisyFineTuningCertificate(clip, gradient, eta, decay, noise)
    steps = int(rng.integers(1, 5))
    reach = order * (clip + steps * eta * gradient) + 8.0 * noise * math.sqrt(steps)
    grid = np.linspace(-reach, reach, 1201)
    cell = grid[1] - grid[0]

    def drift(theta: Any) -> Any:
        return (1.0 - eta * decay) * theta + eta * gradient * np.tanh(push * theta)

    kernel = norm.pdf(grid[:, None], drift(grid)[None, :], noise) * cell
    p, q = (norm.pdf(grid, drift(np.array(start)), noise) for start in (clip, -clip))
    for _ in range(steps - 1):
        p, q = kernel @ p, kernel @ q
    seen = np.minimum(p, q) > 1e-300  # leaving the rest out lowers the truth
    logs = order * np.log(p[seen]) + (1.0 - order) * np.log(q[seen])
    exact = math.log(float(np.exp(logs).sum() * cell)) / (order - 1.0)
    parameters = {
        "model_clip": clip, "gradient_clip": gradient, "step_size": eta, "weight_decay": decay,
        "noise": noise, "push": push, "order": order, "steps": steps,
    }  # fmt: skip
    return Case([(float(ours.rdp([order], steps=steps)[0]), exact)], parameters)


# --- data processing -----------------------------------------------------------------------------


def data_processing(rng: np.random.Generator) -> Case:
    """Training curves given at the default orders, asked for in between.

    One sampled step against quadrature; or a chain of full-batch steps, then unlearning steps.
    """
    order, noise = any_order(rng, low=1.011, high=4000.0), log_uniform(rng, 0.3, 100.0)
    if rng.integers(0, 2):
        rate = log_uniform(rng, 1e-4, 1.0)
        curve = sampled_gaussian_rdp(
            1.0, noise_multiplier=noise, sample_rate=rate, orders=DEFAULT_ORDERS
        )
        ours = DataProcessingCertificate(tuple(curve), DEFAULT_ORDERS)
        exact = step_divergence(1 / np.longdouble(noise), order, rate, forward=True)
        parameters = {"noise": noise, "rate": rate, "order": order}
        return Case([(float(ours.rdp([order], steps=7)[0]), exact)], parameters)
    training, steps, c = (int(rng.integers(1, 30)), int(rng.integers(0, 5)), rng.uniform(0.9, 1.0))
    curve = training * sampled_gaussian_rdp(
        1.0, noise_multiplier=noise, sample_rate=1.0, orders=DEFAULT_ORDERS
    )
    ours = DataProcessingCertificate(tuple(curve), DEFAULT_ORDERS)
    with mpmath.workdps(DIGITS):
        chain = LinearChain().step(c, noise, 1, training).step(c, noise, times=steps)
        exact = order * chain.mu**2 / 2
    parameters = {"noise": noise, "training": training, "steps": steps, "c": c, "order": order}
    return Case([(float(ours.rdp([order], steps=steps)[0]), exact)], parameters)


CHAIN = "linear chain"
FAMILIES = [
    Family("contraction, one chord", CHAIN, contraction_chord, 500, 1e-30, 1e-4),
    Family("contraction, requests", CHAIN, contraction_requests, 200, 1e-30, 1e-4),
    Family("contraction, hull", "dual of the QP (nnls)", contraction_hull, 500, 1e-13),
    Family("contraction, clipped GLM", CHAIN, contraction_glm, 200, 1e-30),
    Family("contraction, ε, δ, steps", "Gaussian curve", contraction_epsilon, 250, 1e-30),
    Family("fine-tuning, no gradient", CHAIN, finetuning_linear, 300, 1e-30),
    Family("fine-tuning, pushed apart", "densities on a grid", finetuning_pushed, 150, 1e-9),
    Family("data processing", f"{CHAIN}, quadrature", data_processing, 350, 1e-15),
]
