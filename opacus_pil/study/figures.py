"""The study's figures: one function each, plain numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#E4E4E4", "legend.frameon": False, "legend.fontsize": 8,
    "text.parse_math": False,
}  # fmt: skip
_KINDS = {"quantile": "sets at quantiles of P", "random": "random sets", "top": "tops of scores"}


def _sets(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the forget sets of all trainings of a condition."""
    return [one for training in entry["trainings"] for one in training["forget_sets"]]


def times_figure(entries: Sequence[Mapping[str, Any]], *, definition: str) -> Figure:
    """Draw time to unlearn against the mean log privacy loss, one panel per condition."""
    figure, panels = _panels(entries)
    for entry, axes in zip(entries, panels, strict=True):
        last = max(_sets(entry)[0]["steps"], 1) / entry["steps_per_epoch"]
        for number, (kind, label) in enumerate(_KINDS.items()):
            sets = [one for one in _sets(entry) if one["kind"] == kind]
            if not sets:
                continue
            x = np.array([one["log_privacy_loss"] for one in sets])
            times = [one["time_to_unlearn"][definition]["mean_curve"] for one in sets]
            y = np.array([np.nan if t is None else t / entry["steps_per_epoch"] for t in times])
            style = {"color": COLOURS[number], "marker": MARKERS[number], "ls": "none", "ms": 5}
            axes.plot(x, y, label=label, **style)
            never = np.isnan(y)
            axes.plot(x[never], np.full(never.sum(), 1.08 * last), mfc="none", **style)
        found = entry["time_against_log_privacy_loss"][definition]
        line = found["line_with_unreached_at_the_end"]
        _draw_line(axes, entry, line, 1.0 / entry["steps_per_epoch"], high=1.05 * last)
        axes.axhline(1.03 * last, color="#999999", lw=0.8, ls=":")
        axes.set_title(f"{entry['model']}, {entry['name']}")
    _labels(figure, panels, f"epochs until {definition} (hollow: not reached)")
    return figure


def gaps_figure(entries: Sequence[Mapping[str, Any]], *, budget: str) -> Figure:
    """Draw the gap to the oracles after a fixed budget against the mean log privacy loss."""
    figure, panels = _panels(entries)
    for entry, axes in zip(entries, panels, strict=True):
        for number, (kind, label) in enumerate(_KINDS.items()):
            sets = [one for one in _sets(entry) if one["kind"] == kind]
            if sets:
                axes.plot(
                    [one["log_privacy_loss"] for one in sets],
                    [one["gap"][budget] for one in sets],
                    color=COLOURS[number], marker=MARKERS[number], ls="none", ms=5, label=label,
                )  # fmt: skip
        line = entry["gap_against_log_privacy_loss"][budget]["line"]
        _draw_line(axes, entry, line, 1.0, high=1.0)
        axes.set_title(f"{entry['model']}, {entry['name']}")
    _labels(figure, panels, f"|confidence − oracles| after {budget}")
    return figure


def scores_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw every score's rank correlation with the gaps of instances, with its interval."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * len(entries) + 1.8, 4.2), layout="constrained")
        panels = figure.subplots(1, len(entries), squeeze=False, sharey=True)[0]
        for entry, axes in zip(entries, panels, strict=True):
            for number, (statistic, found) in enumerate(entry["scores"].items()):
                for place, one in enumerate(found["scores"].values()):
                    value, height = one["spearman"], place + 0.3 * number
                    if None in value.values():
                        continue
                    style: dict[str, Any] = {"color": COLOURS[number]}
                    axes.plot([value["low"], value["high"]], [height] * 2, lw=1.5, **style)
                    label = f"gap in {statistic}" if place == 0 else None
                    marker = MARKERS[number]
                    axes.plot(value["value"], height, marker, ms=5, label=label, **style)
                axes.set_yticks(range(len(found["scores"])), list(found["scores"]))
            axes.set_title(f"{entry['model']}, {entry['name']}")
            axes.set_xlabel("Spearman with the gap")
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def tops_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the gap of every score's hardest instances, with its interval."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * len(entries) + 1.8, 4.2), layout="constrained")
        panels = figure.subplots(1, len(entries), squeeze=False, sharey=True)[0]
        for entry, axes in zip(entries, panels, strict=True):
            found = entry["top_sets"]["scores"]
            for place, (name, one) in enumerate(found.items()):
                value = one["gap"]["value"]
                colour = COLOURS[0 if name in entry["top_sets"]["proxies"] else 1]
                if None not in value.values():
                    axes.plot([value["low"], value["high"]], [place] * 2, lw=1.5, color=colour)
                    axes.plot(value["value"], place, "o", ms=5, color=colour)
            axes.set_yticks(range(len(found)), list(found))
            axes.set_title(f"{entry['model']}, {entry['name']}")
            axes.set_xlabel(f"gap after {entry['top_sets']['after_epochs']} epochs")
        panels[0].invert_yaxis()
    return figure


def barriers_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the loss barriers on the forget set against the mean log privacy loss."""
    figure, panels = _panels(entries)
    for entry, axes in zip(entries, panels, strict=True):
        sets = [one for one in _sets(entry) if one["kind"] != "top"]
        x = [one["log_privacy_loss"] for one in sets]
        for number, pair in enumerate(("original", "unlearned")):
            style: dict[str, Any] = {
                "color": COLOURS[number], "marker": MARKERS[number], "ls": "none", "ms": 5,
            }  # fmt: skip
            heights = [one["barriers"][pair]["forget"] for one in sets]
            axes.plot(x, [h["chord"] for h in heights], label=f"{pair} to oracle", **style)
            axes.plot(x, [h["above_ends"] for h in heights], mfc="none", **style)
        axes.set_title(f"{entry['model']}, {entry['name']}")
    _labels(figure, panels, "loss barrier on the forget set (nats; hollow: above both ends)")
    return figure


def certified_figure(heads: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw certified steps beside the worst case's, for every head, forget set and target."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4 * len(heads) + 0.4, 3.9), layout="constrained")
        panels = figure.subplots(1, len(heads), squeeze=False)[0]
        for axes, (head, found) in zip(panels, heads.items(), strict=True):
            rows = [row for row in found["rows"] if row["steps_worst_case"] is not None]
            _steps_against_worst(axes, rows, title=head)
        entries: dict[str, Any] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        figure.supxlabel("certified steps, worst case", fontsize=9)
        figure.supylabel("certified steps, per-instance caps", fontsize=9)
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=4)
    return figure


def _steps_against_worst(axes: Any, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw one head's plans, a marker for each kind of forget set."""
    names = list(dict.fromkeys((row["set"], row["size"]) for row in rows))
    for number, (name, size) in enumerate(names):
        chosen = [row for row in rows if (row["set"], row["size"]) == (name, size)]
        axes.plot(
            [row["steps_worst_case"] for row in chosen],
            [np.nan if row["steps"] is None else row["steps"] for row in chosen],
            color=COLOURS[number % 6], marker=MARKERS[number % 6], ls="none",
            label=f"{name}, {size}",
        )  # fmt: skip
    top = max((row["steps_worst_case"] for row in rows), default=1)
    axes.plot([0, top], [0, top], color="#777777", lw=1, ls="--", label="equal")
    axes.set_title(title, fontsize=9)


def _panels(entries: Sequence[Mapping[str, Any]]) -> tuple[Figure, list[Any]]:
    with matplotlib.rc_context(_STYLE):
        wide = 2 if len(entries) == 4 else min(len(entries), 3)
        tall = -(-len(entries) // wide)
        size = (max(3.1 * wide + 0.4, 6.5), max(2.6 * tall + 0.5, 4.0))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(tall, wide, squeeze=False).ravel().tolist()
    for spare in grid[len(entries) :]:
        spare.set_axis_off()
    return figure, grid[: len(entries)]


def _labels(figure: Figure, panels: Sequence[Any], ylabel: str) -> None:
    figure.supxlabel("mean log privacy loss of the forget set (estimate)", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=2)


def _draw_line(
    axes: Any, entry: Mapping[str, Any], line: Mapping[str, Any], scale: float, *, high: float
) -> None:
    """Draw a fitted line over the range of the sets it is about."""
    if line["slope"] is None:
        return
    x = [one["log_privacy_loss"] for one in _sets(entry) if one["kind"] != "top"]
    ends = np.linspace(min(x), max(x), 50)
    y = scale * (line["intercept"] + line["slope"] * ends)
    inside = (y >= 0) & (y <= high)
    label = "line, tops left out"
    axes.plot(ends[inside], y[inside], color="#555555", lw=1, label=label)
