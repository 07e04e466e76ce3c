"""What all figures look like: colours, scales, legends and numbers. Knows no figure by name."""

from __future__ import annotations

import io
import math
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .. import _validate as check

# Okabe and Ito (2008): told apart with every common colour vision; markers and dashes differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), ":")
INK = "#222222"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a set named "$x" is a name, not a formula
    "svg.hashsalt": "opacus_pil",
}


def to_png(figure: Figure, *, dpi: int = 150) -> bytes:
    """Return a figure as PNG bytes, the same bytes for the same figure (no date inside)."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def vector(name: str, values: npt.ArrayLike, *, low: float) -> npt.NDArray[np.float64]:
    """Return a non-empty vector of values ≥ low, infinities allowed."""
    array = check.real_array(name, values, low=low, allow_infinite=True)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(check.expected(name, "to be a non-empty sequence", array.shape))
    return array


def scale(axes: Any, side: str, values: npt.NDArray[np.float64]) -> bool:
    """Make one axis logarithmic if its positive values span a factor above 30; say whether."""
    positive = values[values > 0]
    if len(positive) == 0 or positive.max() <= 30 * positive.min():
        return False
    setter = getattr(axes, f"set_{side}scale")
    if len(positive) == len(values):
        setter("log")
    else:
        setter("symlog", linthresh=float(positive.min()))
    axis = getattr(axes, f"{side}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
    return True


def legend_above(axes: Any, *, columns: int) -> None:
    """Put the legend above the data, where it covers none of it."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2,
        columnspacing=1.4, handlelength=2.2, borderpad=0.0,
    )  # fmt: skip


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
