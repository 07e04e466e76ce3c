"""Difficulty scores of every instance, collected in the training loop at no extra pass.

Knows outputs, rows and gradient norms of the batches that training looks at anyway, and full passes
that somebody made. It reads only: training with and without it is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from ..capture.norms import RecordingPerLayerOptimizer
from ..capture.recorder import Recorder
from ..capture.sweep import Sweep
from .class_outputs import ClassOutputs
from .visits import DIFFICULTY_SCORES, Visits, mean


class DifficultyTracker:
    """Accumulates, per instance, what the scores of `DIFFICULTY_SCORES` are made of.

    A *visit* is one time an instance was looked at: in a batch (`update`), or in a full pass
    (`observe`). Under Poisson sampling an instance is drawn q·T times on average, at random, and
    perhaps never. Costs time linear in the batch, and about 90 bytes per instance.

    Args:
        num_instances: Size of the training set, >= 1.
        early_steps: Number of first steps whose visits count for GraNd and EL2N, >= 0. A full pass
            before the first step counts too, if early_steps >= 1.
        traces: Keep the loss of every visit, for its interquartile range: 16 bytes a visit, memory
            that grows with the training.

    Attributes:
        visits: Shape (instances,), visits with outputs.
        gradient_visits: Shape (instances,), visits with a gradient norm.
        steps: Steps seen.
        unattributed: Batches whose rows nobody knew, which count for no instance.

    Privacy: everything here depends on private data; it is not private to release.

    >>> tracker = DifficultyTracker(3, early_steps=1)
    >>> tracker.update([[2.0, 0.0], [0.0, 1.0]], [0, 0], indices=[2, 0])
    >>> tracker.visits
    array([1, 0, 1])
    """

    def __init__(self, num_instances: int, *, early_steps: int, traces: bool = False) -> None:
        size = check.integer("num_instances", num_instances, low=1)
        self.early_steps = check.integer("early_steps", early_steps, low=0)
        self.steps = 0
        self.unattributed = 0
        self._visits = Visits(size, traces=bool(traces))
        self._recorder: Recorder | None = None

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self._visits)

    @property
    def visits(self) -> IntArray:
        """Visits with outputs, shape (instances,)."""
        return self._visits.counts["visits"].copy()

    @property
    def gradient_visits(self) -> IntArray:
        """Visits with a gradient norm, shape (instances,)."""
        return self._visits.counts["gradient_visits"].copy()

    # --- a training of PerInstancePrivacyEngine -------------------------------------------------

    def watch(self, optimizer: Any) -> None:
        """Take rows and unclipped gradient norms from an optimizer that make_private returned.

        From now on a step is a noisy step of this optimizer, and `update` needs no indices.

        Args:
            optimizer: What `PerInstancePrivacyEngine.make_private` returned, or was attached to.

        Raises:
            TypeError: An optimizer that records nothing.
            ValueError: This tracker watches one already.

        Edge cases:
            clipping="per_layer"   its recorded norms are clipped ones: not taken
        """
        recorder = getattr(optimizer, "recorder", None)
        if not isinstance(recorder, Recorder):
            raise TypeError(
                check.expected(
                    "optimizer", "to be what PerInstancePrivacyEngine.make_private returned",
                    type(optimizer).__name__, "Or pass indices= to update.",
                )
            )  # fmt: skip
        if self._recorder is not None:
            raise ValueError("Expected a tracker that watches nothing yet, got one that does.")
        self._recorder = recorder
        clipped = isinstance(optimizer, RecordingPerLayerOptimizer)
        recorder.listeners.append(self._step_without_norms if clipped else self._step)

    def _step_without_norms(self, rows: IntArray | None, norms: FloatArray) -> None:
        self.steps += 1

    def _step(self, rows: IntArray | None, norms: FloatArray) -> None:
        """One noisy step: whose gradients it summed, and their norms before clipping."""
        if rows is not None:
            known = np.isfinite(norms)  # only rows that a cap left out may lack one
            self._visits.add_norms(rows[known], norms[known], early=self._early)
        self.steps += 1

    # --- what was seen --------------------------------------------------------------------------

    def update(
        self,
        outputs: Any,
        targets: Any,
        *,
        indices: npt.ArrayLike | None = None,
        norms: npt.ArrayLike | None = None,
    ) -> None:
        """Take a batch's outputs, between its forward pass and `optimizer.step()`.

        Args:
            outputs: Logits, shape (batch, classes), or (batch,) or (batch, 1) for one logit.
            targets: Shape (batch,), class numbers, 0 and 1 for one logit.
            indices: Shape (batch,), rows of the data set, each once. None: those of the batch in
                hand, from the optimizer watched.
            norms: Shape (batch,), unclipped per-sample gradient norms, for a training that is not
                watched. Each call is then one step.

        Raises:
            TypeError, ValueError: Shapes that do not fit, values that are not finite (the first row
                is named), rows out of range; no indices and no batch in hand: `update` came after
                the step, or nothing is watched. The tracker is left as it was.

        Edge cases (first match wins):
            empty draw                        nothing is seen
            rows unknown (Opacus's own
            BatchMemoryManager, prefetching)  nothing is seen, `unattributed` counts it
        """
        rows = None if indices is None else check.index_array("indices", indices, size=len(self))
        if norms is not None and (rows is None or self._recorder is not None):
            raise ValueError(
                "Expected norms with indices and from one source, got norms without indices or "
                "from a training that is watched. Leave norms out there."
            )
        if rows is None:
            rows = self._rows_in_hand()
            if rows is None:
                self.unattributed += 1
                return
            if not len(rows):  # Opacus may have put one random row in place of an empty draw
                return
        seen = ClassOutputs.of(outputs, targets)
        check.same_length("indices", rows, "outputs", len(seen.classes))
        sizes = None if norms is None else _norms(norms, len(rows))
        self._visits.add_outputs(rows, seen, early=self._early)
        if sizes is not None:
            self._visits.add_norms(rows, sizes, early=self._early)
        if self._recorder is None:
            self.steps += 1

    def _rows_in_hand(self) -> IntArray | None:
        if self._recorder is None:
            raise ValueError("Expected indices, got none. Pass indices=, or watch(optimizer).")
        tracker = self._recorder.tracker
        if not tracker.in_hand:
            raise ValueError(
                "Expected a batch in hand that no step has used, got none. Call update between the "
                "forward pass and optimizer.step(), or pass indices=."
            )
        return tracker.current()

    def observe(self, found: Sweep, *, targets: Any = None) -> None:
        """Take a full pass: one more visit for each of its instances, at no step of its own.

        Args:
            found: Of `capture.sweep(..., keep_outputs=True)`, with norms; or of
                `engine.refresh_norms()`, which has no outputs and gives norms alone.
            targets: Shape (n,), of the rows `found.indices`; needed for the outputs.

        Raises:
            ValueError: Outputs without targets or targets without outputs, rows out of range,
                shapes that do not fit. The tracker is left as it was.
        """
        rows = check.index_array("indices", found.indices, size=len(self))
        if (found.outputs is None) != (targets is None):
            raise ValueError(
                "Expected outputs and targets together, got one of them. Use "
                "sweep(..., keep_outputs=True) with targets, or neither."
            )
        sizes = _norms(found.norms, len(rows))
        if found.outputs is not None:
            seen = ClassOutputs.of(found.outputs, targets)
            check.same_length("indices", rows, "outputs", len(seen.classes))
            self._visits.add_outputs(rows, seen, early=self._early)
        self._visits.add_norms(rows, sizes, early=self._early)

    @property
    def _early(self) -> bool:
        return self.steps < self.early_steps

    # --- reading and saving ---------------------------------------------------------------------

    def scores(self) -> dict[str, FloatArray]:
        """Return every score this run collects, see `difficulty_scores`."""
        return self._visits.scores()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: arrays and whole numbers."""
        return {
            "early_steps": self.early_steps,
            "steps": self.steps,
            "unattributed": self.unattributed,
            **self._visits.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what is watched stays watched.

        Args:
            state: Of `state_dict`, of a tracker of the same instances and early window, with
                traces if this one keeps them.

        Raises:
            ValueError: A state of other instances, of another early window, or without the traces
                that this tracker keeps. The tracker is left as it was.
        """
        same = state["early_steps"] == self.early_steps and len(state["last"]) == len(self)
        if not same:
            raise ValueError(
                f"Expected a state of {len(self)} instances and early_steps={self.early_steps}, "
                f"got {len(state['last'])} and {state['early_steps']}. Construct the tracker alike."
            )
        if self._visits.traces is not None and state.get("traces") is None:
            raise ValueError(
                "Expected a state with traces, got one without: its visits' losses are lost. "
                "Construct the tracker with traces=False."
            )
        self.steps, self.unattributed = int(state["steps"]), int(state["unattributed"])
        self._visits.load_state_dict(state)


def difficulty_scores(
    trackers: DifficultyTracker | Sequence[DifficultyTracker],
) -> dict[str, FloatArray]:
    """Return the difficulty scores of trackers, aligned so that higher means harder.

    The names and what they are means of are in `DIFFICULTY_SCORES`; a score with sign −1 there is
    the negative of the quantity it is named after (multiply by the sign to undo it). Of that table
    a tracker has all but `leverage` and `held_out_loss`, which `last_layer_leverage` and
    `mean_held_out` give, and `loss_trace_iqr` if it keeps traces.

    Args:
        trackers: One run, or several independent runs over the same instances, whose scores are
            averaged (EL2N and GraNd are defined as averages over some ten initialisations).

    Returns:
        Name -> shape (instances,). With several runs: the scores that all of them have, the mean
        over those in which the instance has the score.

    Raises:
        ValueError: No tracker, or trackers of different numbers of instances.

    Edge cases (first match wins):
        never visited (under Poisson: never drawn)   NaN, never 0; see `tracker.visits`
        no visit in the early window                 el2n, grand NaN: make a full pass early
        fewer than two visits                        forgetting_events, loss_trace_iqr NaN
        never correct on any visit                   forgetting_events +inf: never learned
        few visits                                   max_gradient_norm is smaller the fewer there
                                                     are, forgetting_events misses events

    Source: GraNd, EL2N: Paul et al. (2021), arXiv:2107.07075. Forgetting events, never learned as
        infinitely many: Toneva et al. (2019), arXiv:1812.05159. Area under the margin: Pleiss et
        al. (2020), arXiv:2001.10528. C-score proxy, mean correctness over training: Jiang et al.
        (2021), arXiv:2002.03206. Interquartile range of the loss: Pollock et al. (2024),
        arXiv:2411.05743. Ours: visits are the batches an instance was drawn into and full passes,
        where the papers have epochs; EL2N and GraNd are averaged over the early window.
    Privacy: scores depend on private data; they are themselves not private to release.
    """
    runs = [trackers] if isinstance(trackers, DifficultyTracker) else list(trackers)
    if not runs or len({len(run) for run in runs}) != 1:
        raise ValueError(
            f"Expected trackers of the same instances, at least one, got sizes "
            f"{[len(run) for run in runs]}. Pass runs over one data set."
        )
    found = [run.scores() for run in runs]
    return {
        name: _mean_of_runs([scores[name] for scores in found])
        for name in DIFFICULTY_SCORES
        if all(name in scores for scores in found)
    }


def _mean_of_runs(values: list[FloatArray]) -> FloatArray:
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    return mean(np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0))


def _norms(norms: npt.ArrayLike, count: int) -> FloatArray:
    values = check.real_array("norms", norms, low=0.0, cure="Pass unclipped gradient norms.")
    check.same_length("norms", values, "indices", count)
    return values
