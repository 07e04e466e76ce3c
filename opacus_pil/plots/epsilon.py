"""Figures of privacy losses: who is exposed, and what a set costs over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import _validate as check
from .style import COLOURS, INK, MARKERS, STYLE, legend_above, rounded_up, scale, vector


def epsilon_histogram(
    epsilons: npt.ArrayLike,
    *,
    worst_case: float,
    forget_sets: Mapping[str, npt.ArrayLike] | None = None,
    guarantee: str = "estimate",
    delta: float | None = None,
) -> Figure:
    """Draw how ε is distributed over the instances, beside the worst case everybody is told.

    Args:
        epsilons: Per-instance ε in nats, shape (instances,), ≥ 0, may be inf.
        worst_case: ε of the whole run in nats, ≥ 0, may be inf.
        forget_sets: Name -> indices into `epsilons`; each becomes a row of ticks under the bars.
        guarantee: Label of the per-instance values, printed on the axis; the weakest by default.
        delta: Printed on the axis if given.

    Returns:
        The figure.

    Raises:
        ValueError: No instance, NaN or negative values, unknown label, indices out of range.

    Edge cases:
        infinite values    left out of the bars and counted in the legend
        all values equal   one bar

    Privacy: shows per-instance values and their histogram: private.
    """
    values = vector("epsilons", epsilons, low=0.0)
    worst = float(check.real_array("worst_case", worst_case, low=0.0, allow_infinite=True))
    check.choice("guarantee", guarantee, _GUARANTEES)
    members = {
        name: check.index_array(f"forget_sets[{name!r}]", rows, size=len(values))
        for name, rows in (forget_sets or {}).items()
    }
    finite = values[np.isfinite(values)]
    with matplotlib.rc_context(STYLE):
        rows = len(members)
        figure = Figure(figsize=(7.2, 3.6 + 0.28 * rows), layout="constrained")
        if rows:
            axes, rug = figure.subplots(
                2, 1, sharex=True, height_ratios=[3.2, 0.28 * rows], squeeze=True
            )
        else:
            axes, rug = figure.subplots(), None
        shown = np.append(finite, worst) if math.isfinite(worst) else finite
        low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
        pad = 0.04 * (high - low) or 0.05 * max(high, 1.0)
        if len(finite):
            _bars(axes, finite, pad, median=float(np.median(values)))
        if math.isfinite(worst):
            label = f"worst case, the same ε for all: {rounded_up(worst)}"
            axes.axvline(worst, color=COLOURS[1], lw=2, label=label)
        else:
            axes.plot([], [], color=COLOURS[1], lw=2, label="worst case: ε is infinite")
        axes.set_xlim(max(low - pad, 0.0) if low > pad else min(0.0, low) - pad / 2, high + pad)
        axes.set_ylabel("instances")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        lost = len(values) - len(finite)
        if lost:
            axes.plot([], [], " ", label=f"{lost} of {len(values)} have infinite ε: not drawn")
        legend_above(axes, columns=2)
        bottom = axes
        if rug is not None:
            _rug(rug, values, members)
            bottom = rug
        at = "" if delta is None else f" at δ = {rounded_up(delta)}"
        bottom.set_xlabel(f"per-instance ε{at} (nats; label: {guarantee})")
    return figure


_GUARANTEES = ("bound", "expectation_bound", "output_specific", "estimate")


def _bars(axes: Any, values: npt.NDArray[np.float64], pad: float, *, median: float) -> None:
    """Draw finite values as bars, and the median of all instances, infinite ones included."""
    if np.ptp(values) <= 1e-9 * max(1.0, float(values.max())):
        width = pad / 2
        label = f"{len(values)} instances with the same ε"
        axes.bar(values[0], len(values), width=width, color=COLOURS[0], label=label)
        return
    bins = int(np.clip(len(np.histogram_bin_edges(values, bins="auto")) - 1, 5, 60))
    axes.hist(values, bins=bins, color=COLOURS[0], alpha=0.85, label=f"{len(values)} instances")
    label = f"median instance: {rounded_up(median)}"
    if math.isfinite(median):
        axes.axvline(median, color=INK, lw=1.4, ls="--", label=label)
    else:
        axes.plot([], [], color=INK, lw=1.4, ls="--", label=label)


def _rug(
    axes: Any, values: npt.NDArray[np.float64], members: Mapping[str, npt.NDArray[np.int64]]
) -> None:
    """Draw one row of ticks per forget set, named on the left."""
    for row, (_, index) in enumerate(members.items()):
        chosen = values[index]
        chosen = chosen[np.isfinite(chosen)]
        colour = COLOURS[(row + 2) % len(COLOURS)]
        axes.plot(chosen, np.full(len(chosen), row), "|", ms=9, mew=1.4, color=colour, alpha=0.8)
    axes.set_yticks(range(len(members)), [f"{n} ({len(i)})" for n, i in members.items()])
    axes.set_ylim(len(members) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def epsilon_against_steps(
    points: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    *,
    xlabel: str = "privacy loss of the forget set (ε, nats)",
    ylabel: str = "steps to forget",
    limit: float | None = None,
) -> Figure:
    """Draw how many steps forgetting takes against the privacy loss of what is forgotten.

    An axis is logarithmic when its values span more than a factor of 30.

    Args:
        points: Series name -> (privacy losses ≥ 0, steps ≥ 0); steps None or inf: not reached.
        xlabel, ylabel: Axis labels with units.
        limit: Number of steps that the runs had; unreached points are drawn above it.

    Returns:
        The figure.

    Raises:
        ValueError: No series, sequences of different lengths, NaN or negative values.

    Edge cases:
        step None or inf         open marker on a line named "not reached" at the top
        privacy loss inf         left out and counted in the legend
        0 on a logarithmic axis  drawn on a linear stretch next to the axis (symlog)

    Privacy: depends on the forget sets: private.
    """
    if not points:
        raise ValueError(check.expected("points", "to hold at least one series", dict(points)))
    series = {}
    lost = 0
    for name, (losses, steps) in points.items():
        x = vector(f"losses of {name!r}", losses, low=0.0)
        y = vector(f"steps of {name!r}", [math.inf if s is None else s for s in steps], low=0.0)
        check.same_length(f"steps of {name!r}", y, "its losses", len(x))
        keep = np.isfinite(x)
        lost += int((~keep).sum())
        series[name] = (x[keep], y[keep])
    all_x = np.concatenate([x for x, _ in series.values()])
    all_y = np.concatenate([y for _, y in series.values()])
    reached = all_y[np.isfinite(all_y)]
    top = max([*reached.tolist(), 0.0 if limit is None else float(limit), 1.0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        log_y = scale(axes, "y", reached)
        scale(axes, "x", all_x)
        ceiling = top * (1.6 if log_y else 1.12)
        for number, (name, (x, y)) in enumerate(series.items()):
            colour, marker = COLOURS[number % 6], MARKERS[number % 6]
            done = np.isfinite(y)
            axes.plot(
                x[done], y[done], marker, ms=6, color=colour, mec="white", mew=0.6, label=name
            )
            if not done.all():
                height = np.full((~done).sum(), ceiling)
                axes.plot(x[~done], height, marker, ms=7, mfc="none", color=colour)
        if not np.isfinite(all_y).all():
            axes.axhline(ceiling, color="#999999", lw=1, ls=":", zorder=0)
            within = "" if limit is None else f" within {limit:g} steps"
            axes.plot([], [], "o", ms=7, mfc="none", color="#666666", label=f"not reached{within}")
        if lost:
            axes.plot([], [], " ", label=f"{lost} with infinite loss not drawn")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.06, y=0.08)
        if not log_y:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.set_ylim(bottom=-0.04 * top)
        legend_above(axes, columns=3)
    return figure
