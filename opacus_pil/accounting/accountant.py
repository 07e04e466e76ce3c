"""PerInstanceAccountant: who is charged how much at a step, for every training instance.

Meets training only through arrays (indices, sensitivities); knows no model and no optimizer. What
can be read afterwards, and the saved form, is `privacy_losses.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .balances import Kernel
from .filter import PrivacyFilter
from .guarantee import weakest
from .instance_ids import InstanceIds
from .ledger import STRONGEST_LABEL
from .levels import LevelGrid
from .privacy_losses import MOST_REASONS, PrivacyLosses
from .rdp import DEFAULT_ORDERS


class PerInstanceAccountant(PrivacyLosses):
    """Rényi privacy loss of every instance of a training set, step by step.

    Guarantee: `rdp()[i]` is at least the sum over steps of the divergence of each step at the level
        instance i stood on, for adding or removing instance i, whichever direction is larger. What
        that sum may claim is the `guarantee` that comes with it: the weakest label of any step.
        With a budget `rdp()[i]` is i's budget: i is left out of every step that could exceed it.
    Before anything is known an instance stands on the highest level: the worst case.

    Args:
        num_instances: Size of the training set, >= 1.
        orders: Rényi orders, each > 1.
        levels: Number of sensitivities on the grid, >= 2. More levels round up by less.
        max_sensitivity: Top of the grid, in units of max_grad_norm, >= 1. Raise it when one
            instance can enter a step more than once, or when the clip bound in force exceeds the
            one that the noise was scaled to.
        caps: Shape (num_instances,), enforced clipping bounds in units of max_grad_norm, fixed
            before the run from public data and the instance's own record only. None: no caps.
        budget: The tuple (epsilon, delta), epsilon a number or of shape (num_instances,); or RDP in
            nats of shape (orders,) or (num_instances, orders), inf where not enforced. Without
            `caps` everyone's cap is `max_sensitivity`. With a budget caps may change between steps
            as functions of the released past and the instance's own record, and a step costs time
            that grows with the number of instances. An (ε, δ) is enforced at one order per
            instance, where it bears the most steps like the first one.
        history: Keep a log of who stood on which level at which step, for `group_rdp` and
            `tight_epsilon`. It grows by 12 bytes per move.
        instance_ids: Shape (num_instances,), stable ids (integers or strings). Default 0 … N-1.
        memory_map: Folder for a nameless file (mode 0600) that holds the 8 bytes per instance and
            order, for more instances than fit in memory; a step takes some ms longer. It vanishes
            with the accountant, it is no saved form, and a fork cannot use it. None: in memory.
            For millions of instances see also `COMPACT_ORDERS`.

    Raises:
        TypeError, ValueError: An argument outside its domain; the first bad row is named.
        OSError: The folder of `memory_map` is missing, not writable or too full.

    Source: Feldman, Zrnic (2021), arXiv:2008.11193, individual Rényi accounting; Yu et al. (2023),
        arXiv:2206.02617, output-specific reading. The level grid and prefix sums are ours.

    >>> accountant = PerInstanceAccountant(3, orders=[2.0, 8.0])
    >>> accountant.step(indices=[0], sensitivities=[0.1], noise_multiplier=1.0, sample_rate=1.0)
    >>> bool(accountant.rdp()[0, 0] < accountant.rdp()[1, 0])
    True
    >>> filtered = PerInstanceAccountant(2, caps=[1.0, 0.1], budget=(2.0, 1e-5))
    >>> for _ in range(100):
    ...     filtered.step(
    ...         indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=0.05,
    ...         guarantee="bound",
    ...     )
    >>> filtered.active, filtered.get_epsilon(1e-5).epsilon.round(6), filtered.guarantee
    (array([False,  True]), array([2., 2.]), 'bound')
    """

    def __init__(
        self,
        num_instances: int,
        *,
        orders: Sequence[float] = DEFAULT_ORDERS,
        levels: int = 1024,
        max_sensitivity: float = 1.0,
        caps: npt.ArrayLike | None = None,
        budget: Any = None,
        history: bool = False,
        instance_ids: npt.ArrayLike | None = None,
        memory_map: str | os.PathLike[str] | None = None,
    ) -> None:
        size = check.integer("num_instances", num_instances, low=1)
        count = check.integer("levels", levels, low=2, high=60_000)
        top = check.real(
            "max_sensitivity", max_sensitivity, low=1.0, cure="1 is the clipping bound itself."
        )
        if top > 1.0 and count < 3:
            raise ValueError(
                check.expected("levels", "to be >= 3 with max_sensitivity > 1", levels)
            )
        grid = LevelGrid(count, max_sensitivity=top, orders=check.orders(orders))
        if budget is None:
            privacy_filter = None
        else:
            privacy_filter = PrivacyFilter.from_budget(budget, size=size, orders=grid.orders)
            caps = np.full(size, top) if caps is None else caps
        super().__init__(
            grid,
            instance_ids=_checked_ids(instance_ids, size),
            privacy_filter=privacy_filter,
            history=bool(history),
            memory_map=memory_map,
        )
        if caps is not None:
            self._set_caps(self._checked_caps(caps))

    # --- charging -----------------------------------------------------------------------------

    def step(
        self,
        *,
        indices: npt.ArrayLike | None,
        sensitivities: npt.ArrayLike | None,
        noise_multiplier: float,
        sample_rate: float,
        guarantee: str = "estimate",
        reasons: Sequence[str] = (),
    ) -> None:
        """Charge every instance for one step of the Poisson-sampled Gaussian mechanism.

        The levels of `indices` are first rounded up from `sensitivities`; then every instance is
        charged at its level, drawn or not. Caps are never moved by a step's own rows. With a budget
        whoever cannot bear this step is left out first, for good: cap 0, charge 0.

        Args:
            indices: Shape (batch,), each instance once. None: nobody knows who was in the batch;
                everyone is charged `max_sensitivity`, levels stay.
            sensitivities: Shape (batch,), min(norm, clip bound) / max_grad_norm. Ignored (pass
                None) when `indices` is None.
            noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
            sample_rate: Probability that an instance is drawn. In [0, 1].
            guarantee: What the caller can vouch for: "bound" (levels are constants or caps fixed
                before the run), "output_specific" (every level was measured at this step) or
                "estimate".
            reasons: Why it is no stronger label, a sentence each; of "bound" what it takes for
                granted. They are counted and come with every result.

        Raises:
            TypeError, ValueError: A value outside its domain, a repeated or forgotten instance, a
                sensitivity above `max_sensitivity` or above an enforced cap (0 for whoever the
                budget leaves out, see `caps_for`), a label stronger than what the levels allow,
                unknown rows under a budget. The accountant is left as it was.
        """
        noise, rate = _checked_kernel(noise_multiplier, sample_rate)
        table = self._grid.rdp(noise_multiplier=noise, sample_rate=rate)
        privacy_filter, caps = self._allowed(table)
        rows, levels = self._checked_rows(indices, sensitivities, caps)
        label = self._checked_label(guarantee, rows)  # the last thing to fail

        if self._source == "absent":  # fixed batches came before: nothing is known about the others
            self._move_everyone(len(self._grid) - 1)
            self._source = "stale"
        if privacy_filter is not None and caps is not None:
            self._leave_out(privacy_filter, caps)
        if rows is not None and self._caps is None and len(rows):
            self._move(rows, levels)
            everyone = len(rows) >= self._num_present
            self._source = "measured" if everyone else "stale"
        self._charge(table, (noise, rate), attributed=rows is not None, label=label)
        self._note(label, reasons)
        if self._source == "measured":
            self._source = "stale"  # exact for this step only

    def participate(
        self,
        *,
        indices: npt.ArrayLike | None,
        sensitivities: npt.ArrayLike | None,
        noise_multiplier: float,
        guarantee: str = "output_specific",
        reasons: Sequence[str] = (),
    ) -> None:
        """Charge only the instances in a batch that was not drawn by independent coins.

        For fixed or shuffled batches: the full Gaussian mechanism for whoever is in the batch,
        nothing for the others, no amplification by sampling.

        Guarantee: as `step`, under *zero-out* adjacency (the instance's slot stays empty) and with
            the schedule of batches taken as public: "output_specific" at most.

        Args:
            indices: Shape (batch,), each instance once. None: everyone is charged
                `max_sensitivity`.
            sensitivities: Shape (batch,), min(norm, clip bound) / max_grad_norm.
            noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
            guarantee: "output_specific" or "estimate".
            reasons: As in `step`.

        Raises:
            TypeError, ValueError: As in `step`; or caps or budgets are in force, which are meant
                for sampled batches. The accountant is left as it was.

        Source: Mironov (2017), arXiv:1702.07476, Gaussian mechanism. Under add/remove adjacency
            another instance would move into the slot, and the shift could be larger by 1.
        """
        noise, _ = _checked_kernel(noise_multiplier, 1.0)
        label = check.choice("guarantee", guarantee, ("output_specific", "estimate"))
        if self._caps is not None:
            raise ValueError(
                "Expected an accountant without caps or budget for fixed batches, got one with. "
                "Call step, or construct it without."
            )
        table = self._grid.rdp(noise_multiplier=noise, sample_rate=1.0)
        rows, levels = self._checked_rows(indices, sensitivities, None)

        if self._source != "absent":
            self._move_everyone(0)
            self._source = "absent"
        if rows is not None:
            self._move(rows, levels)
        self._charge(table, (noise, 1.0), attributed=rows is not None, label=label)
        self._note(label, reasons)
        if rows is not None:
            self._move(rows, np.zeros(len(rows), dtype=np.int64))

    def caps_for(self, *, noise_multiplier: float, sample_rate: float) -> FloatArray:
        """Return the bounds to clip the coming step to, in units of max_grad_norm.

        Args:
            noise_multiplier: As the coming `step` will be charged. >= 0.
            sample_rate: As the coming `step` will be charged. In [0, 1].

        Returns:
            Shape (instances,): the caps (`max_sensitivity` without caps), 0 for whoever was
            forgotten or has no budget left for such a step. Nothing is changed.
        """
        noise, rate = _checked_kernel(noise_multiplier, sample_rate)
        _, caps = self._allowed(self._grid.rdp(noise_multiplier=noise, sample_rate=rate))
        if caps is None:
            caps = np.full(self.num_instances, self._grid.sensitivities[-1])
        return np.where(self._present(), caps, 0.0)

    def observe_all(self, sensitivities: npt.ArrayLike) -> None:
        """Set every instance's level from a full pass at the current parameters.

        Args:
            sensitivities: Shape (instances,); entries of forgotten instances are ignored.

        Raises:
            ValueError: Wrong length, NaN or above `max_sensitivity`; or caps are in force.
        """
        values = self._checked_sensitivities(sensitivities)
        check.same_length("sensitivities", values, "instances", self.num_instances)
        if self._caps is not None:
            raise ValueError(
                "Expected no caps in force, got an accountant with caps. Call set_caps instead."
            )
        present = np.flatnonzero(self._present())
        self._move(present, self._grid.round_up(values[present]))
        self._source = "measured"

    def set_caps(self, caps: npt.ArrayLike) -> None:
        """Charge each instance at an enforced clipping bound from the next step on.

        Args:
            caps: Shape (instances,), in units of max_grad_norm, in [0, max_sensitivity]. Whoever
                was left out for want of budget stays out.

        Raises:
            ValueError: Not one finite cap per instance; or steps labelled "bound" were charged at
                other levels already, and caps chosen after them cannot be fixed before the run
                (a budget allows it).
        """
        checked = self._checked_caps(caps)
        if self._steps and self._guarantee == "bound" and self._filter is None:
            raise ValueError(
                f"Expected caps to be fixed before the run, got new caps after {self._steps} steps "
                "labelled 'bound'. Start a new accountant, set a budget, or charge with "
                "guarantee='output_specific' from the first step."
            )
        self._set_caps(checked)

    def forget(self, indices: npt.ArrayLike) -> None:
        """Stop charging instances that left the training set; their rows become tombstones.

        Their losses so far stay readable, marked by `forgotten`.

        Args:
            indices: Shape (n,), instances, each once.

        Raises:
            TypeError, ValueError: An index out of range, repeated, or forgotten before.
        """
        rows = check.index_array("indices", indices, size=self.num_instances)
        self._refuse_forgotten(rows)
        self._move(rows, np.full(len(rows), len(self._grid)))
        self._num_present -= len(rows)

    def weaken(self, guarantee: str, *, reason: str = "") -> None:
        """Lower the label of what was charged so far, where something outside voids it.

        Args:
            guarantee: "output_specific" or "estimate"; a stronger label than the present one
                changes nothing.
            reason: Why, in a sentence.
        """
        label = check.choice("guarantee", guarantee, ("output_specific", "estimate"))
        self._guarantee = weakest([self._guarantee, label])
        if reason:
            self._reasons.setdefault(reason, 0)

    def lose_everything(self, indices: npt.ArrayLike | None) -> None:
        """Charge instances infinitely: something without a bound was given away about them.

        Args:
            indices: Shape (n,), instances, each once. None: everyone.

        Raises:
            TypeError, ValueError: An index out of range or repeated; or a budget, which nobody may
                exceed. The accountant is left as it was.
        """
        if self._filter is not None:
            raise ValueError(
                "Expected an accountant without budgets, got one with: nobody may exceed a budget. "
                "Leave such an instance out before the step."
            )
        size = self.num_instances
        rows = np.arange(size) if indices is None else indices
        self._balances.infinite[check.index_array("indices", rows, size=size)] = True

    # --- inside -------------------------------------------------------------------------------

    def _charge(self, table: FloatArray, kernel: Kernel, *, attributed: bool, label: str) -> None:
        """Charge one step: each level its row of `table`, or everyone the highest level's."""
        if attributed:
            self._balances.charge(table, kernel)
        else:
            self._balances.charge_everyone(table[-1])
            self._unattributed += 1
        if self._history is not None:
            self._history.charge(*kernel, attributed=attributed)
        self._guarantee = weakest([self._guarantee, label])
        self._steps += 1

    def _note(self, label: str, reasons: Sequence[str]) -> None:
        """Count the reasons of a step's label; a label without any has the caller's word."""
        if not reasons and label != "bound":
            reasons = (f"the caller vouched for {label!r} only",)
        for reason in dict.fromkeys(reasons):
            if reason in self._reasons or len(self._reasons) < MOST_REASONS:
                self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def _move(self, rows: IntArray, levels: IntArray) -> None:
        """Put `rows` on other levels from the next step on."""
        if self._history is not None:
            changed = self._balances.level[rows] != levels
            self._history.move(rows[changed], levels[changed])
        self._balances.move(rows, levels)

    def _move_everyone(self, level: int) -> None:
        present = np.flatnonzero(self._present())
        self._move(present, np.full(len(present), level))

    def _set_caps(self, caps: FloatArray) -> None:
        if self._filter is not None:
            caps = np.where(self._filter.dropped, 0.0, caps)
        present = np.flatnonzero(self._present())
        self._move(present, self._grid.round_up(caps[present]))
        self._caps = caps
        self._source = "enforced" if self._steps else "fixed"

    def _allowed(self, table: FloatArray) -> tuple[PrivacyFilter | None, FloatArray | None]:
        """Return the filter and the caps in force for a step with RDP `table`."""
        if self._filter is None or self._caps is None:
            return None, self._caps
        settled = self._filter.settled_for(table, self._balances.level, self._grid.orders)
        return settled, np.where(settled.affords(self._balances, table), self._caps, 0.0)

    def _leave_out(self, settled: PrivacyFilter, caps: FloatArray) -> None:
        """Take whoever pays something but has no cap in this step out of it and all later ones."""
        level = self._balances.level
        rows = np.flatnonzero((caps == 0.0) & (level > 0) & self._present())
        self._filter, self._caps = settled, caps
        settled.dropped[rows] = True
        self._move(rows, np.zeros(len(rows), dtype=np.int64))

    def _checked_caps(self, caps: npt.ArrayLike) -> FloatArray:
        checked = check.real_array(
            "caps", caps, low=0.0, high=float(self._grid.sensitivities[-1]),
            cure="A cap is a clipping bound divided by max_grad_norm.",
        ).copy()  # fmt: skip
        check.same_length("caps", checked, "instances", self.num_instances)
        return checked

    def _checked_sensitivities(self, sensitivities: npt.ArrayLike | None) -> FloatArray:
        return check.real_array(
            "sensitivities", sensitivities, low=0.0, high=float(self._grid.sensitivities[-1]),
            cure="Pass min(norm, clip bound) / max_grad_norm, or raise max_sensitivity.",
        )  # fmt: skip

    def _checked_rows(
        self,
        indices: npt.ArrayLike | None,
        sensitivities: npt.ArrayLike | None,
        caps: FloatArray | None,
    ) -> tuple[IntArray | None, IntArray]:
        """Return the batch's rows and the levels they round up to."""
        if indices is None:
            if self._filter is not None:
                raise ValueError(
                    "Expected indices under a budget, got None. Nobody knows whose cap was in "
                    "force: skip the batch, or train with a loader whose rows are known."
                )
            return None, np.empty(0, dtype=np.int64)
        cure = "An instance drawn twice has one sensitivity: the norm of the sum."
        rows = check.index_array("indices", indices, size=self.num_instances, cure=cure)
        values = self._checked_sensitivities(sensitivities)
        check.same_length("sensitivities", values, "indices", len(rows))
        self._refuse_forgotten(rows)
        if caps is not None:
            above = np.flatnonzero(values > caps[rows])
            if len(above):
                row = int(rows[above[0]])
                raise ValueError(
                    f"Expected sensitivities within the enforced caps, got {len(above)} of "
                    f"{len(rows)} above (first: instance {row}, sensitivity {values[above[0]]:g}, "
                    f"cap {caps[row]:g}). Clip each instance to its cap before the step; "
                    "under a budget to caps_for(noise_multiplier=…, sample_rate=…)."
                )
        return rows, self._grid.round_up(values)

    def _refuse_forgotten(self, rows: IntArray) -> None:
        gone = rows[self._balances.level[rows] == len(self._grid)]
        if len(gone):
            raise ValueError(
                f"Expected instances that are still in the training set, got {len(gone)} of "
                f"{len(rows)} forgotten (first: instance {int(gone[0])}). Leave them out."
            )

    def _checked_label(self, guarantee: str, rows: IntArray | None) -> str:
        """Return the caller's label if the levels can carry it."""
        label = check.choice("guarantee", guarantee, ("bound", "output_specific", "estimate"))
        strongest = STRONGEST_LABEL[self._source]
        if self._filter is not None:
            strongest = "bound"  # caps only need to be known before each step
        elif rows is None:
            fixed = self._source == "fixed" and self._caps is None
            strongest = "bound" if fixed else "output_specific"
        elif len(rows) and self._caps is None and self._source != "measured":
            everyone = len(rows) == self._num_present
            strongest = "output_specific" if everyone else "estimate"
        if weakest([label, strongest]) != label:
            raise ValueError(
                f"Expected guarantee to be at most {strongest!r} at this step, got "
                f"guarantee={label!r}. Only constants and caps fixed before the run give a bound; "
                "only a full pass at this step is output-specific."
            )
        return label


def _checked_ids(instance_ids: npt.ArrayLike | None, size: int) -> npt.NDArray[Any]:
    ids = InstanceIds(instance_ids)
    ids.require_size(size)
    return np.arange(size) if ids.array is None else ids.array


def _checked_kernel(noise_multiplier: float, sample_rate: float) -> tuple[float, float]:
    noise = check.real(
        "noise_multiplier", noise_multiplier, low=0.0,
        cure="Pass the noise std on the gradient sum divided by max_grad_norm.",
    )  # fmt: skip
    rate = check.probability("sample_rate", sample_rate, "Pass batch_size / len(dataset).")
    return noise, rate
