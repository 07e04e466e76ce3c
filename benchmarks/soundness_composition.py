"""Random adaptive mechanisms for `soundness.py`, solved exactly, and composed by opacus_pil.

One or two Poisson-sampled Gaussian steps whose outputs decide the next step's sensitivity. Each
output is sorted into cells of equal probability under the law *with* the instance, and the next
sensitivity depends on the cell only. So one run per combination of cells, all equally likely, *is*
that law: the theorem's expectations are exact means over these runs, nothing is estimated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from exact import step_divergence
from scipy.special import logsumexp, ndtr
from soundness_cases import Case, Family, log_uniform

from opacus_pil.accounting import compose_per_instance, sampled_gaussian_rdp
from opacus_pil.accounting.composition import SHORT_RUN_INFLATIONS

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_GRID = 40  # panels in a cell; cells are at most about 20 wide or are cut there


class Chain:
    """Sensitivities `levels[plan[cells so far]]` at noise 1 and one sample rate."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.steps = int(rng.integers(2, 4))
        self.cells = int(rng.integers(4, 40)) if self.steps == 2 else int(rng.integers(3, 13))
        self.rate = 1.0 if rng.integers(0, 2) else log_uniform(rng, 0.01, 0.9)
        top = float(rng.uniform(0.2, 1.2)) if self.rate == 1.0 else float(rng.uniform(0.3, 2.5))
        self.levels = np.append(top * rng.uniform(0.0, 1.0, size=2), top)
        # Steps up with the output more often than at random: that is what correlates with the past.
        self.plan = [self._plan(rng, length) for length in range(self.steps)]
        self.edges = [self._edges(level) for level in self.levels]

    def _plan(self, rng: np.random.Generator, length: int) -> Any:
        shape = (self.cells,) * length
        if rng.integers(0, 2) or length == 0:
            return rng.integers(0, 3, size=shape)
        past = sum(np.indices(shape)) / length / self.cells
        return np.digitize(past, np.sort(rng.uniform(size=2)))

    def _edges(self, level: float) -> Any:
        """Quantiles of (1−q)·N(0,1) + q·N(level,1), by bisection."""
        shares = np.arange(1, self.cells) / self.cells
        low, high = np.full(self.cells - 1, -15.0), np.full(self.cells - 1, 15.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = (1 - self.rate) * ndtr(middle) + self.rate * ndtr(middle - level) < shares
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def cell_moments(self, level: int, order: float, *, forward: bool) -> Any:
        """∫ over each cell of (1+u)^power dN(0,1), shape (cells,)."""
        power, shift = (order if forward else 1 - order), self.levels[level]
        reach = 10.0 + order * shift
        edges = np.concatenate([[-reach], self.edges[level], [reach]])
        ends = np.linspace(edges[:-1], edges[1:], _GRID + 1, axis=1)
        half = (ends[:, 1:] - ends[:, :-1]) / 2
        t = ((ends[:, 1:] + ends[:, :-1]) / 2)[..., None] + half[..., None] * _NODES
        with np.errstate(divide="ignore"):
            logs = np.logaddexp(
                np.log1p(-self.rate), math.log(self.rate) + t * shift - shift**2 / 2
            )
        density = np.exp(power * logs - t * t / 2) / math.sqrt(2 * math.pi)
        return ((density @ _WEIGHTS) * half).sum(axis=1)

    def exact(self, order: float, *, forward: bool) -> float:
        last = np.exp(
            [
                float((order - 1) * step_divergence(s, order, self.rate, forward=forward))
                if s > 0
                else 0.0
                for s in self.levels
            ]
        )
        moments = np.stack(
            [self.cell_moments(k, order, forward=forward) for k in range(len(self.levels))]
        )
        total = last[self.plan[-1]]
        for length in range(self.steps - 2, -1, -1):
            total = (moments[self.plan[length]] * total).sum(axis=-1)
        return math.log(float(total)) / (order - 1)

    def step_rdp(self, direction: str) -> Any:
        """Order -> (runs, steps), all runs equally likely under the law with the instance."""
        runs = np.indices((self.cells,) * (self.steps - 1)).reshape(self.steps - 1, -1)
        met = np.stack([self.plan[t][tuple(runs[:t])] for t in range(1, self.steps)], axis=1)
        met = np.hstack([np.full((len(met), 1), self.plan[0]), met])

        def at(order: float) -> Any:
            return sampled_gaussian_rdp(
                self.levels, noise_multiplier=1.0, sample_rate=self.rate, orders=[order],
                direction=direction,
            )[met, 0]  # fmt: skip

        return at


def published(step_rdp: Any, order: float, steps: int) -> float:
    """The paper's recursion g(α) = ρα − 1/h, at the best of the exponents that ours tries.

    Both are minima over the Hölder exponent; on other grids either may lose a few millionths.

    The first step is spared the Hölder factor here as in ours, so only the orders differ.
    """
    best = math.inf
    for inflation in SHORT_RUN_INFLATIONS:
        holder = -1 / math.expm1(-inflation / (steps - 1))
        rho, total, alpha = holder / (holder - 1), 0.0, order
        for back in range(steps):
            factor = holder if back < steps - 1 else 1.0
            exponent = factor * (alpha - 1) * step_rdp(alpha)[:, steps - 1 - back]
            log_mean = float(logsumexp(exponent)) - math.log(len(exponent))
            total += rho**-back / factor * log_mean
            alpha = rho * alpha - 1 / holder
        best = min(best, total / (order - 1))
    return best


def _composed(rng: np.random.Generator, direction: str) -> Case:
    chain, order = Chain(rng), float(1.0 + log_uniform(rng, 0.1, 10.0))
    step_rdp = chain.step_rdp(direction)
    bound = float(compose_per_instance(step_rdp, order=order, direction=direction).rdp)
    forward = direction == "with_without"
    exact = chain.exact(order, forward=forward)
    rivals = {}
    if forward:
        rivals["the published recursion"] = (bound, published(step_rdp, order, chain.steps))
    parameters = {
        "order": order, "steps": chain.steps, "cells": chain.cells, "rate": chain.rate,
        "levels": chain.levels.tolist(), "plan": [plan.tolist() for plan in chain.plan],
    }  # fmt: skip
    return Case([(bound, exact)], parameters, rivals)


def composition_forward(rng: np.random.Generator) -> Case:
    return _composed(rng, "with_without")


def composition_reverse(rng: np.random.Generator) -> Case:
    return _composed(rng, "without_with")


FAMILIES = [
    Family("composition (A), forward", "cells, quadrature", composition_forward, 300, 1e-11),
    Family("composition (B), reverse", "cells, quadrature", composition_reverse, 250, 1e-11),
]
