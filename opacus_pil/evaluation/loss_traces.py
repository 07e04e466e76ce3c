"""Every loss an instance was seen with, and how widely they spread.

Knows rows and losses in the order of the visits. Memory grows with the visits, 16 bytes each: it is
kept only where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray


class LossTraces:
    """The losses of all visits.

    Args:
        size: Number of instances.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: list[IntArray] = []
        self._losses: list[FloatArray] = []

    def add(self, rows: IntArray, losses: FloatArray) -> None:
        """Keep one visit's losses."""
        self._rows.append(np.array(rows))
        self._losses.append(np.array(losses))

    def interquartile_range(self) -> FloatArray:
        """Return the range of each instance's losses, shape (instances,); see `loss_trace_iqr`."""
        rows, losses = self._joined()
        order = np.lexsort((losses, rows))
        ordered = losses[order]
        counts = np.bincount(rows, minlength=self._size)
        starts = np.cumsum(counts) - counts
        result = np.full(self._size, np.nan)
        known = counts >= 2
        low, high = (
            _between(ordered, starts[known], counts=counts[known], share=share)
            for share in (0.25, 0.75)
        )
        result[known] = high - low
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that was kept."""
        rows, losses = self._joined()
        return {"rows": rows, "losses": losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state of as many instances."""
        self._rows, self._losses = [state["rows"].copy()], [state["losses"].copy()]

    def _joined(self) -> tuple[IntArray, FloatArray]:
        rows = np.concatenate([np.empty(0, dtype=np.int64), *self._rows])
        return rows, np.concatenate([np.empty(0), *self._losses])


def loss_trace_iqr(losses: npt.ArrayLike) -> FloatArray:
    """Return the interquartile range of every instance's losses over full passes.

    A loss that moves a lot while training goes on is that of an instance the model learns late or
    forgets again; unlike a sum, the range leaves out single peaks.

    Args:
        losses: Shape (passes, instances), each instance's own loss at each pass, finite.

    Returns:
        Shape (instances,), in the unit of the losses, >= 0; higher is harder. Quartiles are
        interpolated linearly between the order statistics.

    Raises:
        TypeError, ValueError: Another shape, or a loss that is not finite.

    Edge cases:
        fewer than two passes    NaN

    Source: Pollock et al. (2024), arXiv:2411.05743, where it foresees membership risk from one
        run. `DifficultyTracker(traces=True)` has the same over the visits of a training.
    Privacy: depends on private data; not private to release.

    >>> loss_trace_iqr([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    array([1., 0.])
    """
    measured = check.real_array("losses", losses)
    if measured.ndim != 2:
        raise ValueError(check.expected("losses", "of shape (passes, instances)", measured.shape))
    if len(measured) < 2:
        return np.full(measured.shape[1], np.nan)
    low, high = np.quantile(measured, [0.25, 0.75], axis=0)
    return np.asarray(high - low)


def _between(
    ordered: FloatArray, starts: IntArray, *, counts: IntArray, share: float
) -> FloatArray:
    """Return a quantile of each group of ascending values, interpolated between two of them."""
    places = share * (counts - 1.0)
    below = np.floor(places).astype(np.int64)
    part = places - below
    first = ordered[starts + below]
    last = ordered[starts + below + (part > 0.0)]
    return np.asarray(first + part * (last - first))
