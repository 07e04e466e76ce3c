"""Exact laws of one clipped logistic output under noise: densities on a grid, no bound of anything.

Shared by `soundness_heads.py` and the tests of certificates. Calls nothing of opacus_pil.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ClippedLogistic:
    """Laws of one clipped logistic output with one feature, by convolution on a grid.

    θ ← (1 − ηλ)θ − (η/b) Σ clip(σ(θx) − y)·x + N(0, ζ²), from θ = 0, over all rows or without some.

    Args:
        x, y, limits: Of each row: its feature, its target, what its gradient is clipped to.
        finer: Points per step of noise, in units of 8.
    """

    def __init__(
        self, x: Any, y: Any, limits: Any, *, step_size: float, weight_decay: float, batch: float,
        noise_std: float, finer: float = 1.0,
    ) -> None:  # fmt: skip
        self._rows = (x, y, limits)
        self._eta, self._decay, self._batch, self._noise = step_size, weight_decay, batch, noise_std
        keep = 1.0 - step_size * weight_decay
        spread = noise_std / np.sqrt(1.0 - keep * keep)
        drift = step_size / batch * float(np.minimum(np.abs(x), limits).sum()) / (1.0 - keep)
        reach = drift + 14.0 * spread
        self._points = np.linspace(-reach, reach, int(16 * finer * reach / noise_std) | 1)
        self._cell = self._points[1] - self._points[0]

    def _map(self, theta: Any, first: int) -> Any:
        x, y, limits = (part[first:, None] for part in self._rows)
        gradients = (1.0 / (1.0 + np.exp(-theta * x)) - y) * x
        clipped = gradients * np.minimum(1.0, limits / (np.abs(gradients) + 1e-6))
        return (1.0 - self._eta * self._decay) * theta - self._eta / self._batch * clipped.sum(0)

    def _density(self, centre: Any) -> Any:
        scaled = (self._points[:, None] - centre) / self._noise
        return np.exp(-0.5 * scaled**2) / (self._noise * np.sqrt(2.0 * np.pi))

    def _law(self, firsts: Sequence[int]) -> Any:
        law = self._density(self._map(np.zeros(1), firsts[0]))[:, 0]
        kernels = {
            first: self._density(self._map(self._points, first)) * self._cell
            for first in set(firsts[1:])
        }
        for first in firsts[1:]:
            law = kernels[first] @ law
        return law

    def divergences(
        self, orders: Sequence[float], *, members: int, training: int, steps: int
    ) -> Any:
        """D_α of trained with the first rows and then without, and of never with; both ways.

        Shape (2, orders).
        """
        mixed = self._law([0] * training + [members] * steps)
        never = self._law([members] * (training + steps))
        pairs = ((mixed, never), (never, mixed))
        return np.array([[self._renyi(p, q, a) for a in orders] for p, q in pairs])

    def _renyi(self, p: Any, q: Any, order: float) -> float:
        known = (p > 0.0) & (q > 0.0)
        logs = order * np.log(p[known]) + (1.0 - order) * np.log(q[known])
        top = logs.max()
        total = top + np.log(np.exp(logs - top).sum() * self._cell)
        return max(total, 0.0) / (order - 1.0)
