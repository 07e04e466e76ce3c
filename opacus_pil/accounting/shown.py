"""How privacy numbers are printed: upper ones never too small, lower ones never too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

import numpy as np

from .._validate import FloatArray


def rounded_up(value: float, *, digits: int = 3) -> str:
    """Print a number with a few significant digits, rounded up: ε is never shown too small.

    >>> rounded_up(1.2301), rounded_up(0.05), rounded_up(float("inf"))
    ('1.24', '0.05', '∞')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    # Through repr: 0.05 means the decimal that was printed, not the binary number just above it.
    number = Decimal(repr(float(value)))
    number = Context(prec=digits, rounding=ROUND_CEILING).plus(number)
    return f"{number:f}" if number == 0 or 1e-6 <= abs(number) < 1e7 else f"{number:e}"


def rounded_down(value: float, *, digits: int = 3) -> str:
    """Print a number that bounds from below with a few significant digits, rounded down.

    >>> rounded_down(1.2399), rounded_down(0.05), rounded_down(0.0)
    ('1.23', '0.05', '0')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    number = Context(prec=digits, rounding=ROUND_FLOOR).plus(Decimal(repr(float(value))))
    if number == 0:
        return "0"
    return f"{number:f}" if 1e-6 <= abs(number) < 1e7 else f"{number:e}"


def quantiles_above(values: FloatArray, shares: Sequence[float]) -> list[float]:
    """Return quantiles that are values of instances, the higher neighbour: never interpolated.

    At least the share of all values is at most its quantile, and an infinite one stays infinite.

    >>> quantiles_above(np.array([1.0, 2.0, 4.0, np.inf]), [0.0, 0.5, 1.0])
    [1.0, 4.0, inf]
    """
    found: list[float] = np.quantile(values, shares, method="higher").tolist()
    return found
