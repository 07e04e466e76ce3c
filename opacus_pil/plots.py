"""Figures of the report: one function per figure, each returns a matplotlib Figure.

Knows plain numbers and images. Keeps no global state (no pyplot) and writes no file. What a figure
shows is private wherever its numbers are (per-instance values, forget sets).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _validate as check

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError(
        "Expected matplotlib for the figures, got none. "
        'Install the report extra: pip install "opacus-pil[report]".'
    ) from error

if TYPE_CHECKING:
    from .evaluation.loss_barrier import LossBarrier

# Okabe and Ito (2008): told apart with every common colour vision; markers and dashes differ too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), ":")
_INK = "#222222"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": _INK,
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
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


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
    values = _vector("epsilons", epsilons, low=0.0)
    worst = float(check.real_array("worst_case", worst_case, low=0.0, allow_infinite=True))
    check.choice("guarantee", guarantee, _GUARANTEES)
    members = {
        name: check.index_array(f"forget_sets[{name!r}]", rows, size=len(values))
        for name, rows in (forget_sets or {}).items()
    }
    finite = values[np.isfinite(values)]
    with matplotlib.rc_context(_STYLE):
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
            axes.axvline(worst, color=_COLOURS[1], lw=2, label=label)
        else:
            axes.plot([], [], color=_COLOURS[1], lw=2, label="worst case: ε is infinite")
        axes.set_xlim(max(low - pad, 0.0) if low > pad else min(0.0, low) - pad / 2, high + pad)
        axes.set_ylabel("instances")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        lost = len(values) - len(finite)
        if lost:
            axes.plot([], [], " ", label=f"{lost} of {len(values)} have infinite ε: not drawn")
        _legend_above(axes, columns=2)
        bottom = axes
        if rug is not None:
            _rug(rug, values, members)
            bottom = rug
        at = "" if delta is None else f" at δ = {delta:.3g}"
        bottom.set_xlabel(f"per-instance ε{at} (nats; label: {guarantee})")
    return figure


_GUARANTEES = ("bound", "expectation_bound", "output_specific", "estimate")


def _bars(axes: Any, values: npt.NDArray[np.float64], pad: float, *, median: float) -> None:
    """Draw finite values as bars, and the median of all instances, infinite ones included."""
    if np.ptp(values) <= 1e-9 * max(1.0, float(values.max())):
        width = pad / 2
        label = f"{len(values)} instances with the same ε"
        axes.bar(values[0], len(values), width=width, color=_COLOURS[0], label=label)
        return
    bins = int(np.clip(len(np.histogram_bin_edges(values, bins="auto")) - 1, 5, 60))
    axes.hist(values, bins=bins, color=_COLOURS[0], alpha=0.85, label=f"{len(values)} instances")
    label = f"median instance: {rounded_up(median)}"
    if math.isfinite(median):
        axes.axvline(median, color=_INK, lw=1.4, ls="--", label=label)
    else:
        axes.plot([], [], color=_INK, lw=1.4, ls="--", label=label)


def _rug(
    axes: Any, values: npt.NDArray[np.float64], members: Mapping[str, npt.NDArray[np.int64]]
) -> None:
    """Draw one row of ticks per forget set, named on the left."""
    for row, (_, index) in enumerate(members.items()):
        chosen = values[index]
        chosen = chosen[np.isfinite(chosen)]
        colour = _COLOURS[(row + 2) % len(_COLOURS)]
        axes.plot(chosen, np.full(len(chosen), row), "|", ms=9, mew=1.4, color=colour, alpha=0.8)
    axes.set_yticks(range(len(members)), [f"{n} ({len(i)})" for n, i in members.items()])
    axes.set_ylim(len(members) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def image_grid(
    images: Any, *, captions: Sequence[str], title: str, columns: int | None = None
) -> Figure:
    """Draw small grey images in a grid, each with its caption (the most or least exposed ones).

    Args:
        images: Array or CPU tensor, shape (n, height, width) or (n, 1, height, width), n ≥ 1.
        captions: One per image.
        title: Above the grid.
        columns: Images per row; up to 10 when None.

    Returns:
        The figure.

    Raises:
        ValueError: Shapes that do not fit, values not finite, or no image.

    Privacy: shows training images: private.
    """
    pixels = check.real_array("images", images)
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        pixels = pixels[:, 0]
    if pixels.ndim != 3 or len(pixels) == 0:
        raise ValueError(check.expected("images", "of shape (n, height, width)", pixels.shape))
    if len(captions) != len(pixels):
        raise ValueError(
            check.expected("captions", f"to be one per image ({len(pixels)})", len(captions))
        )
    wide = min(len(pixels), 10) if columns is None else check.integer("columns", columns, low=1)
    tall = math.ceil(len(pixels) / wide)
    lines = max(caption.count("\n") + 1 for caption in captions)
    with matplotlib.rc_context(_STYLE):
        size = (max(0.85 * wide, 2.5), (0.85 + 0.17 * lines) * tall + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
        grid = figure.subplots(tall, wide, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, image, caption in zip(grid, pixels, captions, strict=False):
            # Dark on light, as on paper; each image over its own range, so faint strokes show.
            axes.imshow(image, cmap="gray_r", interpolation="nearest")
            axes.set_title(caption, fontsize=8, loc="center", color=_INK)
    return figure


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
        x = _vector(f"losses of {name!r}", losses, low=0.0)
        y = _vector(f"steps of {name!r}", [math.inf if s is None else s for s in steps], low=0.0)
        check.same_length(f"steps of {name!r}", y, "its losses", len(x))
        keep = np.isfinite(x)
        lost += int((~keep).sum())
        series[name] = (x[keep], y[keep])
    all_x = np.concatenate([x for x, _ in series.values()])
    all_y = np.concatenate([y for _, y in series.values()])
    reached = all_y[np.isfinite(all_y)]
    top = max([*reached.tolist(), 0.0 if limit is None else float(limit), 1.0])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        log_y = _scale(axes, "y", reached)
        _scale(axes, "x", all_x)
        ceiling = top * (1.6 if log_y else 1.12)
        for number, (name, (x, y)) in enumerate(series.items()):
            colour, marker = _COLOURS[number % 6], _MARKERS[number % 6]
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
        _legend_above(axes, columns=3)
    return figure


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
    with matplotlib.rc_context(_STYLE):
        width = min(3.1 * len(splits) + 1.0, 11.0)
        height = 3.0 + 0.2 * len(barriers)
        figure = Figure(figsize=(max(width, 4.6), height), layout="constrained")
        panels = figure.subplots(1, len(splits), squeeze=False, sharex=True)[0]
        for axes, split in zip(panels, splits, strict=True):
            for number, pair in enumerate(barriers.values()):
                if split not in pair:
                    continue
                line, colour = pair[split], _COLOURS[number % 6]
                axes.plot(
                    line.alphas,
                    np.where(np.isfinite(line.losses), line.losses, np.nan),
                    color=colour,
                    ls=_DASHES[number % 6],
                    marker=_MARKERS[number % 6],
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
            _legend_above(axes, columns=1)
        panels[0].set_ylabel("loss (nats)")
        keys = [
            Line2D([], [], color=_COLOURS[n % 6], ls=_DASHES[n % 6], marker=_MARKERS[n % 6], ms=4)
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
    with matplotlib.rc_context(_STYLE):
        width = min(2.6 * len(accuracies) + 1.2, 12.0)
        figure = Figure(figsize=(max(width, 4.6), 3.5), layout="constrained")
        panels = figure.subplots(1, len(accuracies), squeeze=False, sharey=True)[0]
        for number, (axes, name) in enumerate(zip(panels, accuracies, strict=True)):
            x = _vector(f"steps of {name!r}", steps[name], low=0.0)
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
                color=_COLOURS[0],
                lw=1.8,
                marker="o",
                ms=4 if len(x) <= 40 else 0,
                label="unlearning run",
            )
            when = (reached or {}).get(name)
            if when is not None:
                axes.axvline(when, color=_COLOURS[1], lw=1.5, ls="--", label="time to unlearn")
            elif reached is not None:
                axes.text(
                    0.97, 0.03, "not reached", transform=axes.transAxes, ha="right",
                    color=_COLOURS[1],
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


def _vector(name: str, values: npt.ArrayLike, *, low: float) -> npt.NDArray[np.float64]:
    """Return a non-empty vector of values ≥ low, infinities allowed."""
    array = check.real_array(name, values, low=low, allow_infinite=True)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(check.expected(name, "to be a non-empty sequence", array.shape))
    return array


def _scale(axes: Any, side: str, values: npt.NDArray[np.float64]) -> bool:
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


def _legend_above(axes: Any, *, columns: int) -> None:
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
