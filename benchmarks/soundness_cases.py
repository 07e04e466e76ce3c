"""What a family of random cases is, for `soundness.py` and the modules that draw the cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np

DIGITS = 40


@dataclass
class Case:
    """Values of opacus_pil beside the exact ones; `parameters` are enough to repeat the case.

    `rivals`: by name, our value and another one that it must not exceed.
    """

    pairs: list[tuple[float, Any]]
    parameters: dict[str, Any]
    rivals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Random cases of one bound.

    Args:
        name: Shown in the table.
        truth: How the exact value is found.
        draw: Draws a case.
        share: Part of all cases, relative to the other families.
        error: Relative error of the exact value; a bound below by more than that is a violation.
        limit: Largest bound/exact − 1 that the documentation promises, or None.
    """

    name: str
    truth: str
    draw: Callable[[np.random.Generator], Case]
    share: int
    error: float
    limit: float | None = None


def as_mpf(value: Any) -> Any:
    """Exact conversion of floats and long doubles."""
    if isinstance(value, np.longdouble):
        high = float(value)
        return mpmath.mpf(high) + mpmath.mpf(float(value - np.longdouble(high)))
    return mpmath.mpf(value)


def excess(bound: float, exact: Any) -> float:
    """bound/exact − 1; 0 where both are 0 or infinite.

    nan, sound but not counted in the distribution, where the exact value is 0 or below 1e-290: the
    smallest positive numbers that opacus_pil reports are 1e-290 and 1e-300.
    """
    if math.isnan(bound):
        return -math.inf  # a NaN is no bound
    with mpmath.workdps(DIGITS):
        truth = as_mpf(exact)
        if truth > mpmath.mpf(2) ** 1024 or truth == mpmath.inf:  # beyond every double
            return 0.0 if bound == math.inf else -1.0
        if truth < mpmath.mpf("1e-290"):
            return 0.0 if bound == truth == 0 else math.nan if bound >= truth else -math.inf
        return float(mpmath.mpf(bound) / truth - 1) if bound < math.inf else math.inf


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(10 ** rng.uniform(math.log10(low), math.log10(high)))


def any_rate(rng: np.random.Generator, tiny: float = 1e-12) -> float:
    """A sample rate: anywhere, tiny, or near 1; sometimes exactly 1."""
    kind = rng.integers(0, 10)
    if kind == 0:
        return 1.0
    if kind == 1:
        return 1.0 - log_uniform(rng, 1e-12, 0.5)
    return float(rng.uniform()) if kind < 5 else log_uniform(rng, tiny, 1.0)


def rare_and_far(rng: np.random.Generator) -> tuple[float, float]:
    """A far shift and a sample rate so small that it still matters little."""
    return log_uniform(rng, 1.0, 100.0), log_uniform(rng, 1e-100, 1e-6)


def any_order(rng: np.random.Generator, low: float = 1.01, high: float = 4096.0) -> float:
    return 1.0 + log_uniform(rng, low - 1.0 + 1e-12, high - 1.0)
