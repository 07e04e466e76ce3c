"""How privacy numbers are printed: never too small."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal


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
