"""How numbers are printed: upper ones rounded up, lower ones down, missing ones a dash."""

from __future__ import annotations

import math
from typing import Any

from ..accounting.shown import rounded_down, rounded_up
from .words import NONE


def up(value: Any, *, digits: int = 4) -> str:
    """Print a number that bounds from above, rounded up; None is a dash.

    >>> up(1.23401), up(None), up(float("inf"))
    ('1.235', '–', '∞')
    """
    return NONE if value is None else rounded_up(float(value), digits=digits)


def down(value: Any, *, digits: int = 4) -> str:
    """Print a number that bounds from below, rounded down; None is a dash.

    >>> down(1.23499), down(0.0), down(None)
    ('1.234', '0', '–')
    """
    if value is None or math.isnan(float(value)):
        return NONE
    if math.isinf(float(value)):
        return "∞" if float(value) > 0 else NONE
    return rounded_down(float(value), digits=digits)


def plain(value: Any) -> str:
    """Print a measured number; None and NaN are dashes."""
    if value is None or math.isnan(float(value)):
        return NONE
    return ("∞" if value > 0 else "−∞") if math.isinf(float(value)) else f"{float(value):.4g}"
