"""Exposed: everybody's ε as a page shows it, with a table, a histogram and a distribution function.

Knows a `PerInstanceEpsilon` and how wide a chart is. Values are rounded up before anything is
counted, so that table, histogram and filter agree to the last instance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .._validate import FloatArray
from ..accounting.shown import quantiles_above
from ..exposure import PerInstanceEpsilon
from .numbers import up

MOST_ROWS = 50_000  # of the table: 3 MB of page; charts and counts are of everybody
_FIRST = 20  # rows that are in the page without its script: on paper too
_BARS = 40
_POINTS = 200  # of the distribution function, which is read to half a per cent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480.0, 250.0, 52.0, 14.0, 30.0, 42.0


@dataclass(frozen=True)
class Bar:
    """Instances with low <= ε < high, and where they are drawn."""

    low: float
    high: float
    count: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Chart:
    """Axes in a drawing of WIDTH by HEIGHT: (place, text) of each tick.

    Attributes:
        x_ticks, y_ticks: Along both axes.
        worst: Where the worst case is; None: it is infinite.
        bars: Of a histogram.
        steps: Of a distribution function, SVG path.
        points: The same as (place, ε, share), for whoever points at it.
    """

    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    worst: float | None
    bars: tuple[Bar, ...] = ()
    steps: str = ""
    points: tuple[tuple[float, str, str], ...] = ()


@dataclass(frozen=True)
class Exposed:
    """Everybody's ε, ready to be shown.

    Attributes:
        size: Number of instances.
        guarantee: Label of the values.
        delta: Their δ, in words.
        worst: The worst case by the same method, in words.
        quantiles: (name, ε in words).
        rows: Columns of the table, most exposed first: id, epsilon (None: infinite), tied, norm
            (None: not seen); for JSON.
        first: The first rows, in words.
        infinite: How many have no finite ε.
        ties: How many share their ε with another.
        histogram, distribution: Charts; None where nobody's ε is finite.
    """

    size: int
    guarantee: str
    delta: str
    worst: str
    quantiles: tuple[tuple[str, str], ...]
    rows: dict[str, list[Any]]
    first: tuple[tuple[str, ...], ...]
    infinite: int
    ties: int
    histogram: Chart | None
    distribution: Chart | None

    @property
    def listed(self) -> int:
        """Rows of the table."""
        return len(self.rows["id"])

    @classmethod
    def of(cls, spent: PerInstanceEpsilon, *, named: bool = True) -> Self:
        """Return what a page shows of everybody's ε.

        Args:
            spent: Everybody's ε.
            named: List single instances too, not only how their ε are distributed.

        Raises:
            ImportError: pandas or matplotlib is missing; install the extra `report`.
        """
        table = spent.top(len(spent))
        epsilon = np.array([float(up(value)) if math.isfinite(value) else math.inf
                            for value in table["epsilon"].tolist()])  # fmt: skip
        norms = [None if math.isnan(v) else float(f"{v:.4g}") for v in table["norm"].tolist()]
        known = any(norm is not None for norm in norms)
        most = MOST_ROWS if named else 0
        ids = table["instance_id"].tolist()[:most]
        rows: dict[str, list[Any]] = {
            "id": [one if isinstance(one, int) else str(one) for one in ids],
            "epsilon": [None if math.isinf(v) else v for v in epsilon[:most].tolist()],
            "tied": table["tied"].tolist()[:most],
            "norm": norms[:most] if known else [],
        }
        finite = epsilon[np.isfinite(epsilon)]
        charts = _charts(finite, size=len(spent), worst=spent.worst_case) if len(finite) else (
            None, None)  # fmt: skip
        shares = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
        found: list[float | None] = [None] * len(shares)
        if len(spent):
            found = [*quantiles_above(spent.epsilon, list(shares.values()))]
        return cls(
            size=len(spent),
            guarantee=spent.guarantee,
            delta=up(spent.delta, digits=3),
            worst=up(spent.worst_case),
            quantiles=tuple(zip(shares, map(up, found), strict=True)),
            rows=rows,
            first=tuple(
                (str(rows["id"][i]), _shown(rows["epsilon"][i]), str(rows["tied"][i]),
                 _norm(rows["norm"], i))
                for i in range(min(_FIRST, len(ids)))
            ),
            infinite=int(np.isinf(spent.epsilon).sum()),
            ties=spent.ties,
            histogram=charts[0],
            distribution=charts[1],
        )  # fmt: skip


def _shown(value: float | None) -> str:
    return "∞" if value is None else f"{value:g}"


def _norm(norms: list[Any], place: int) -> str:
    return "–" if not norms or norms[place] is None else f"{norms[place]:g}"


def _charts(finite: FloatArray, *, size: int, worst: float) -> tuple[Chart, Chart]:
    """Draw finite values on one axis from 0 to the worst case, or to the largest of them."""
    from matplotlib.ticker import MaxNLocator  # an optional extra

    end = max(float(finite.max()), worst if math.isfinite(worst) else 0.0) or 1.0
    edges = np.array([float(f"{e:.10g}") for e in MaxNLocator(_BARS).tick_values(0.0, end)])
    edges = edges[edges >= 0.0]
    if edges[-1] <= finite.max():  # bars are half open, and nobody may be left out
        edges = np.append(edges, 2.0 * edges[-1] - edges[-2])
    counts, _ = np.histogram(finite, bins=edges)
    span, rise = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(value: float) -> float:
        return round(LEFT + span * value / float(edges[-1]), 2)

    def upward(value: float, top: float) -> float:
        return round(HEIGHT - BOTTOM - rise * value / top, 2)

    ticks = MaxNLocator(6).tick_values(0.0, float(edges[-1]))
    x_ticks = tuple((across(t), f"{t:g}") for t in ticks if 0.0 <= t <= edges[-1])
    line = across(worst) if math.isfinite(worst) else None
    heights = MaxNLocator(4, integer=True).tick_values(0.0, float(counts.max()))
    top = float(heights[-1])
    least = top / rise  # a pixel: one instance among thousands can be seen and clicked
    bars = tuple(
        Bar(
            float(low), float(high), int(count), across(float(low)),
            upward(max(int(count), least), top),
            round(across(float(high)) - across(float(low)), 2),
            round(HEIGHT - BOTTOM - upward(max(int(count), least), top), 2),
        )
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        if count
    )  # fmt: skip
    histogram = Chart(
        x_ticks, tuple((upward(t, top), f"{int(t):,}") for t in heights if t >= 0), line, bars
    )
    ranked = np.sort(finite)
    grid = np.unique(np.append(np.linspace(0.0, float(edges[-1]), _POINTS), ranked[-1]))
    # Of everybody: where some are infinite the curve ends below 1. Rounded down, never too good.
    shares = np.floor(1e3 * np.searchsorted(ranked, grid, side="right") / size) / 1e3
    path = [f"M{LEFT:g},{upward(0.0, 1.0):g}"]
    for value, share in zip(grid.tolist(), shares.tolist(), strict=True):
        path.append(f"H{across(value):g}V{upward(share, 1.0):g}")
    points = tuple(
        (across(v), f"{v:.4g}", f"{100 * s:.1f} %")
        for v, s in zip(grid.tolist(), shares.tolist(), strict=True)
    )
    y_ticks = tuple((upward(t, 1.0), f"{100 * t:g} %") for t in (0.0, 0.25, 0.5, 0.75, 1.0))
    return histogram, Chart(x_ticks, y_ticks, line, steps="".join(path), points=points)
