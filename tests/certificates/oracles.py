"""Independent slow truth for certificates: linear chains, a quadratic programme, mpmath."""

from __future__ import annotations

import mpmath as mp
import numpy as np
from scipy.optimize import nnls


def linear_chain(contraction, noise_std, shifts, initial_distance):
    """Gap of means and standard deviation of z ← c·z + s + N(0, ζ²), run step by step."""
    gap, variance = initial_distance, 0.0
    for c, noise, shift in zip(contraction, noise_std, shifts, strict=True):
        gap, variance = c * gap + shift, c * c * variance + noise * noise
    return gap, np.sqrt(variance)


def programme_mu(contraction, noise_std, shifts, initial_distance):
    """μ by the definition: min ‖y‖ with z_t = c_t z_{t−1} + s_t − ζ_t y_t >= 0 and z_N <= 0.

    A least-distance problem, solved through its dual: Lawson, Hanson (1974), Solving Least
    Squares Problems, Chapter 23, algorithm LDP.
    """
    steps = len(shifts)
    constant, response = initial_distance, np.zeros(steps)  # z_t = constant + response·y
    rows, sides = [], []
    for t in range(steps):
        constant, response = contraction[t] * constant + shifts[t], contraction[t] * response
        response[t] = -noise_std[t]
        rows.append(response.copy())
        sides.append(-constant)
    rows.append(-rows[-1] if rows else response)
    sides.append(constant)
    stacked = np.vstack([np.array(rows).T, np.array(sides)])
    target = np.r_[np.zeros(steps), 1.0]
    multipliers, residual_norm = nnls(stacked, target)
    if residual_norm < 1e-9:
        return np.inf  # the constraints exclude each other
    residual = stacked @ multipliers - target
    return float(np.linalg.norm(residual[:-1] / residual[-1]))


def minimax_mu(contraction, noise_std, shifts, initial_distance):
    """μ by the min-max formula of isotonic regression, 60 digits, no scaling needed; O(N³)."""
    with mp.workdps(60):
        steps = len(shifts)
        carried = [mp.mpf(1)] * (steps + 1)
        for t in range(steps - 1, -1, -1):
            carried[t] = carried[t + 1] * mp.mpf(contraction[t])
        gaps = [carried[t + 1] * mp.mpf(shifts[t]) for t in range(steps)]
        gaps[0] += carried[0] * mp.mpf(initial_distance)
        weights = [(carried[t + 1] * mp.mpf(noise_std[t])) ** 2 for t in range(steps)]
        total = mp.mpf(0)
        for t in range(steps):
            slope = max(
                min(mp.fsum(gaps[a : b + 1]) / mp.fsum(weights[a : b + 1]) for b in range(t, steps))
                for a in range(t + 1)
            )
            total += slope**2 * weights[t]
        return mp.sqrt(total)


def gaussian_delta(mu, epsilon):
    """Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2) with digits enough for the cancellation."""
    with mp.workdps(400):
        mu, epsilon = mp.mpf(mu), mp.mpf(epsilon)

        def phi(x):
            return mp.erfc(-x / mp.sqrt(2)) / 2

        return phi(-epsilon / mu + mu / 2) - mp.exp(epsilon) * phi(-epsilon / mu - mu / 2)


def renyi_on_grid(p, q, order, cell):
    """Rényi divergence of two densities given on a grid of width `cell`."""
    return np.log(np.sum(p**order * q ** (1.0 - order)) * cell) / (order - 1.0)
