"""What was seen of every instance: sums and counts, and the difficulty scores that they give.

Arrays of one entry per instance; knows no batches, optimizers or steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from .class_outputs import ClassOutputs
from .loss_traces import LossTraces

# Sign with which each quantity enters its score, so that higher is harder.
DIFFICULTY_SCORES: Mapping[str, int] = {
    "mean_gradient_norm": 1,  # mean over visits of the unclipped per-sample gradient norm
    "max_gradient_norm": 1,  # the largest of them
    "grand": 1,  # the mean over visits in the early window
    "el2n": 1,  # mean of ‖softmax − onehot‖₂ over visits in the early window
    "forgetting_events": 1,  # times that an incorrect visit followed a correct one
    "margin": -1,  # mean of p_y − max_{j≠y} p_j
    "c_score": -1,  # mean correctness: a proxy of the C-score
    "area_under_margin": -1,  # mean of z_y − max_{j≠y} z_j
    "loss": 1,  # mean cross-entropy
    "loss_trace_iqr": 1,  # interquartile range of the cross-entropies: needs traces=True
    "leverage": 1,  # of the last layer's features: `last_layer_leverage`
    "held_out_loss": 1,  # mean loss under models trained without it: `mean_held_out`
}
_SUMMED = ("margin", "c_score", "area_under_margin", "loss")
_COUNTED = ("visits", "early", "gradient_visits", "early_gradient", "forgotten")
_NEVER, _WRONG, _RIGHT = -1, 0, 1


class Visits:
    """Sums over the visits of every instance, about 90 bytes each.

    Args:
        size: Number of instances.
        traces: Also keep the loss of every visit, 16 bytes each.
    """

    def __init__(self, size: int, *, traces: bool = False) -> None:
        self.traces = LossTraces(size) if traces else None
        self.counts = {name: np.zeros(size, dtype=np.int64) for name in _COUNTED}
        self._sums = {name: np.zeros(size) for name in (*_SUMMED, "el2n", "norm", "grand")}
        self._largest = np.full(size, -np.inf)
        self._last = np.full(size, _NEVER, dtype=np.int8)
        self._learned = np.zeros(size, dtype=bool)

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self._last)

    def add_outputs(self, rows: IntArray, seen: ClassOutputs, *, early: bool) -> None:
        """Count one visit with outputs for each of `rows`, which are different."""
        correct = seen.correct
        values = (seen.margin, correct, seen.logit_margin, seen.loss)
        for name, value in zip(_SUMMED, values, strict=True):
            self._sums[name][rows] += value
        if self.traces is not None:
            self.traces.add(rows, seen.loss)
        self.counts["visits"][rows] += 1
        if early:
            self._sums["el2n"][rows] += seen.error_norm
            self.counts["early"][rows] += 1
        self.counts["forgotten"][rows] += (self._last[rows] == _RIGHT) & (correct == 0)
        self._last[rows] = np.where(correct == 1, _RIGHT, _WRONG)
        self._learned[rows] |= correct == 1

    def add_norms(self, rows: IntArray, norms: FloatArray, *, early: bool) -> None:
        """Count one visit with a gradient norm for each of `rows`, which are different."""
        self._sums["norm"][rows] += norms
        self.counts["gradient_visits"][rows] += 1
        self._largest[rows] = np.maximum(self._largest[rows], norms)
        if early:
            self._sums["grand"][rows] += norms
            self.counts["early_gradient"][rows] += 1

    def scores(self) -> dict[str, FloatArray]:
        """Return every score, higher is harder, NaN where there was nothing to see."""
        counts, sums = self.counts, self._sums
        natural = {
            "mean_gradient_norm": mean(sums["norm"], counts["gradient_visits"]),
            "max_gradient_norm": np.where(counts["gradient_visits"] > 0, self._largest, np.nan),
            "grand": mean(sums["grand"], counts["early_gradient"]),
            "el2n": mean(sums["el2n"], counts["early"]),
            "forgetting_events": np.where(
                counts["visits"] < 2, np.nan, np.where(self._learned, counts["forgotten"], np.inf)
            ),
            **{name: mean(sums[name], counts["visits"]) for name in _SUMMED},
        }
        if self.traces is not None:
            natural["loss_trace_iqr"] = self.traces.interquartile_range()
        return {
            name: sign * natural[name]
            for name, sign in DIFFICULTY_SCORES.items()
            if name in natural
        }

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all arrays."""
        return {
            "largest": self._largest.copy(),
            "last": self._last.copy(),
            "learned": self._learned.copy(),
            "counts": {name: value.copy() for name, value in self.counts.items()},
            "sums": {name: value.copy() for name, value in self._sums.items()},
            "traces": None if self.traces is None else self.traces.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of saved arrays of as many instances."""
        self._largest, self._last = state["largest"].copy(), state["last"].copy()
        self._learned = state["learned"].copy()
        self.counts = {name: state["counts"][name].copy() for name in self.counts}
        self._sums = {name: state["sums"][name].copy() for name in self._sums}
        if self.traces is not None:
            self.traces.load_state_dict(state["traces"])


def mean(sums: FloatArray, counts: IntArray) -> FloatArray:
    """Return sums / counts, NaN where there is nothing."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.asarray(sums / counts)
