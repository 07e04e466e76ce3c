"""Figures of unlearning: barriers between models, and what is forgotten step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .. import _validate as check
from .style import COLOURS, DASHES, MARKERS, STYLE, legend_above, vector

if TYPE_CHECKING:
    from ..evaluation.loss_barrier import LossBarrier


def loss_barrier_curves(barriers: Mapping[str, Mapping[str, LossBarrier]]) -> Figure:
    """Draw the loss along the straight line between models: one panel per split, one line per pair.

    Args:
        barriers: Pair name (such as "unlearned to retrained") -> split name -> LossBarrier.

    Returns:
        The figure; dotted lines are the chords, the legend gives each barrier.

    Raises:
        ValueError: Nothing to draw.

    Edge cases:
        loss not finite   a gap in the line; the legend says inf or nan

    Privacy: depends on the forget set: private.
    """
    splits = list(dict.fromkeys(split for pair in barriers.values() for split in pair))
    if not splits:
        raise ValueError(check.expected("barriers", "to hold at least one split", dict(barriers)))
    with matplotlib.rc_context(STYLE):
        width = min(3.1 * len(splits) + 1.0, 11.0)
        height = 3.0 + 0.2 * len(barriers)
        figure = Figure(figsize=(max(width, 4.6), height), layout="constrained")
        panels = figure.subplots(1, len(splits), squeeze=False, sharex=True)[0]
        for axes, split in zip(panels, splits, strict=True):
            for number, pair in enumerate(barriers.values()):
                if split not in pair:
                    continue
                line, colour = pair[split], COLOURS[number % 6]
                axes.plot(
                    line.alphas,
                    np.where(np.isfinite(line.losses), line.losses, np.nan),
                    color=colour,
                    ls=DASHES[number % 6],
                    marker=MARKERS[number % 6],
                    ms=4,
                    label=f"barrier {line.barrier:.3g}",
                )
                if np.isfinite(line.chord).all():
                    axes.plot(line.alphas, line.chord, color=colour, lw=1, ls=":")
            rows = len(axes.get_legend_handles_labels()[0])
            axes.set_title(split, loc="left", pad=8 + 14 * rows)  # above the legend
            axes.set_xlabel("position on the line")
            axes.set_xticks([0, 0.5, 1], ["first\nmodel", "½", "second\nmodel"])
            axes.margins(y=0.08)
            legend_above(axes, columns=1)
        panels[0].set_ylabel("loss (nats)")
        keys = [
            Line2D([], [], color=COLOURS[n % 6], ls=DASHES[n % 6], marker=MARKERS[n % 6], ms=4)
            for n in range(len(barriers))
        ]
        figure.legend(keys, list(barriers), loc="outside upper left", ncols=len(splits))
    return figure


def forget_curves(
    steps: Mapping[str, Sequence[float]],
    *,
    accuracies: Mapping[str, Sequence[float]],
    oracle_bands: Mapping[str, tuple[float, float]],
    reached: Mapping[str, int | None] | None = None,
    ylabel: str = "forget accuracy",
) -> Figure:
    """Draw the forget accuracy over the unlearning steps, one panel per forget set.

    Args:
        steps: Forget set -> unlearning step of each recorded point, ascending.
        accuracies: Forget set -> accuracy at those points, in [0, 1].
        oracle_bands: Forget set -> (smallest, largest) accuracy of its retrained oracles.
        reached: Forget set -> time to unlearn, or None where it was not reached.
        ylabel: Axis label of the statistic.

    Returns:
        The figure; the shaded band is the range of the oracles.

    Raises:
        ValueError: Nothing to draw, sets that do not match, values outside [0, 1], lengths differ.

    Edge cases:
        one recorded point    a marker
        band of width 0       a line

    Privacy: depends on the forget sets: private.
    """
    if not accuracies:
        raise ValueError(check.expected("accuracies", "to hold at least one set", {}))
    for name in accuracies:
        if name not in steps or name not in oracle_bands:
            raise ValueError(
                f"Expected steps and an oracle band for each forget set, got none for {name!r}."
            )
    with matplotlib.rc_context(STYLE):
        width = min(2.6 * len(accuracies) + 1.2, 12.0)
        figure = Figure(figsize=(max(width, 4.6), 3.5), layout="constrained")
        panels = figure.subplots(1, len(accuracies), squeeze=False, sharey=True)[0]
        for number, (axes, name) in enumerate(zip(panels, accuracies, strict=True)):
            x = vector(f"steps of {name!r}", steps[name], low=0.0)
            y = check.real_array(f"accuracies of {name!r}", accuracies[name], low=0.0, high=1.0)
            check.same_length(f"accuracies of {name!r}", y, "its steps", len(x))
            band = check.real_array(
                f"oracle_bands[{name!r}]", oracle_bands[name], low=0.0, high=1.0
            )
            low, high = float(band.min()), float(band.max())
            axes.axhspan(
                low, high, color="#BBBBBB", alpha=0.55, lw=2, ec="#888888", label="retrained models"
            )
            axes.plot(
                x,
                y,
                color=COLOURS[0],
                lw=1.8,
                marker="o",
                ms=4 if len(x) <= 40 else 0,
                label="unlearning run",
            )
            when = (reached or {}).get(name)
            if when is not None:
                axes.axvline(when, color=COLOURS[1], lw=1.5, ls="--", label="time to unlearn")
            elif reached is not None:
                axes.text(
                    0.97, 0.03, "not reached", transform=axes.transAxes, ha="right",
                    color=COLOURS[1],
                )  # fmt: skip
            suffix = "" if when is None else f": {when:,} steps"
            axes.set_title(name + suffix, loc="left")
            axes.set_xlabel("unlearning steps")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            if np.ptp(x) == 0:
                axes.set_xlim(x[0] - 1, x[0] + 1)  # one point: whole steps around it
            axes.set_ylim(-0.04, 1.04)
            if number == 0:
                axes.set_ylabel(ylabel)
        entries: dict[str, Any] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=3)
    return figure
