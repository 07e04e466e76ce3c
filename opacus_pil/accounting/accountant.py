"""PerInstanceAccountant: who has been charged how much, for every training instance.

Meets training only through arrays (indices, sensitivities); knows no model and no optimizer.
How charges are kept is `balances.py`; its saved form is the ledger (`ledger.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .balances import CHUNK, Balances, Pending
from .guarantee import GUARANTEES, PerInstanceEpsilon, weakest
from .ledger import STRONGEST_LABEL, Ledger
from .levels import LevelGrid
from .rdp import DEFAULT_ORDERS, rdp_to_epsilon

if TYPE_CHECKING:
    import pandas as pd


class PerInstanceAccountant:
    """Rényi privacy loss of every instance of a training set, step by step.

    Guarantee: `rdp()[i]` is at least the sum over steps of the divergence of each step at the level
        instance i stood on, for adding or removing instance i, whichever direction is larger. What
        that sum may claim is the `guarantee` that comes with it: the weakest label of any step.
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
        instance_ids: Shape (num_instances,), stable ids (integers or strings). Default 0 … N-1.

    Raises:
        TypeError, ValueError: An argument outside its domain; the first bad row is named.

    Source: Feldman, Zrnic (2021), arXiv:2008.11193, individual Rényi accounting; Yu et al. (2023),
        arXiv:2206.02617, output-specific reading. The level grid and prefix sums are ours.

    >>> accountant = PerInstanceAccountant(3, orders=[2.0, 8.0])
    >>> accountant.step(indices=[0], sensitivities=[0.1], noise_multiplier=1.0, sample_rate=1.0)
    >>> bool(accountant.rdp()[0, 0] < accountant.rdp()[1, 0])
    True
    """

    def __init__(
        self,
        num_instances: int,
        *,
        orders: Sequence[float] = DEFAULT_ORDERS,
        levels: int = 1024,
        max_sensitivity: float = 1.0,
        caps: npt.ArrayLike | None = None,
        instance_ids: npt.ArrayLike | None = None,
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
        self._grid = LevelGrid(count, max_sensitivity=top, orders=check.orders(orders))
        self._ids = _checked_ids(instance_ids, size)
        checked_caps = None if caps is None else self._checked_caps(caps, size)
        self._balances = Balances(size, levels=count, orders=len(self._grid.orders))
        self._num_active = size  # kept, because counting would cost a step time that grows with N
        self._caps: FloatArray | None = None
        self._source = "fixed"
        self._steps = 0
        self._unattributed = 0
        self._guarantee = GUARANTEES[0]
        if checked_caps is not None:
            self._set_caps(checked_caps)

    # --- what it is ---------------------------------------------------------------------------

    @property
    def num_instances(self) -> int:
        """Number of instances, forgotten ones included."""
        return len(self._balances.level)

    @property
    def orders(self) -> FloatArray:
        """Rényi orders, shape (orders,)."""
        return self._grid.orders.copy()

    @property
    def levels(self) -> FloatArray:
        """Sensitivities on the grid, ascending, shape (levels,)."""
        return self._grid.sensitivities.copy()

    @property
    def instance_ids(self) -> npt.NDArray[Any]:
        """Stable id of each instance, shape (instances,)."""
        return self._ids.copy()

    @property
    def steps(self) -> int:
        """Number of steps charged."""
        return self._steps

    @property
    def unattributed_steps(self) -> int:
        """Number of steps in which everyone was charged the worst case, for want of indices."""
        return self._unattributed

    @property
    def guarantee(self) -> str:
        """What the numbers may claim: the weakest label of any step so far."""
        return self._guarantee

    @property
    def caps(self) -> FloatArray | None:
        """Enforced clipping bounds in units of max_grad_norm, shape (instances,), or None."""
        return None if self._caps is None else self._caps.copy()

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,): False once an instance has been forgotten."""
        return self._balances.level != len(self._grid)

    @property
    def sensitivities(self) -> FloatArray:
        """Sensitivity each instance is charged at now, rounded up, shape (instances,)."""
        return np.append(self._grid.sensitivities, 0.0)[self._balances.level]

    # --- charging -----------------------------------------------------------------------------

    def step(
        self,
        *,
        indices: npt.ArrayLike | None,
        sensitivities: npt.ArrayLike | None,
        noise_multiplier: float,
        sample_rate: float,
        guarantee: str = "estimate",
    ) -> None:
        """Charge every instance for one step of the Poisson-sampled Gaussian mechanism.

        The levels of `indices` are first rounded up from `sensitivities`; then every instance is
        charged at its level, drawn or not. Caps are never moved by a step's own rows.

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

        Raises:
            TypeError, ValueError: A value outside its domain, a repeated or forgotten instance, a
                sensitivity above `max_sensitivity` or above an enforced cap, a label stronger than
                what the levels allow. The accountant is left as it was.
        """
        noise = check.real(
            "noise_multiplier", noise_multiplier, low=0.0,
            cure="Pass the noise std on the gradient sum divided by max_grad_norm.",
        )  # fmt: skip
        rate = check.probability("sample_rate", sample_rate, "Pass batch_size / len(dataset).")
        rows, levels = self._checked_rows(indices, sensitivities)
        label = self._checked_label(guarantee, rows)
        table = self._grid.rdp(noise_multiplier=noise, sample_rate=rate)  # the last thing to fail

        if rows is not None and self._caps is None and len(rows):
            self._balances.move(rows, levels)
            everyone = len(rows) >= self._num_active
            self._source = "measured" if everyone else "stale"
        if rows is None:
            self._balances.charge_everyone(table[-1])
            self._unattributed += 1
        else:
            self._balances.charge(table, (noise, rate))
        if self._source == "measured":
            self._source = "stale"  # exact for this step only
        self._guarantee = weakest([self._guarantee, label])
        self._steps += 1

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
        active = np.flatnonzero(self.active)
        self._balances.move(active, self._grid.round_up(values[active]))
        self._source = "measured"

    def set_caps(self, caps: npt.ArrayLike) -> None:
        """Charge each instance at an enforced clipping bound from the next step on.

        Args:
            caps: Shape (instances,), in units of max_grad_norm, in [0, max_sensitivity].

        Raises:
            ValueError: Not one finite cap per instance; or steps labelled "bound" were charged at
                other levels already, and caps chosen after them cannot be fixed before the run.
        """
        checked = self._checked_caps(caps, self.num_instances)
        if self._steps and self._guarantee == "bound":
            raise ValueError(
                f"Expected caps to be fixed before the run, got new caps after {self._steps} steps "
                "labelled 'bound'. Start a new accountant, or charge with "
                "guarantee='output_specific' from the first step."
            )
        self._set_caps(checked)

    def forget(self, indices: npt.ArrayLike) -> None:
        """Stop charging instances that left the training set; their losses so far stay readable.

        Raises:
            TypeError, ValueError: An index out of range, repeated, or forgotten before.
        """
        rows = check.index_array("indices", indices, size=self.num_instances)
        self._refuse_forgotten(rows)
        self._balances.move(rows, np.full(len(rows), len(self._grid)))
        self._num_active -= len(rows)

    # --- reading ------------------------------------------------------------------------------

    def rdp(self, indices: npt.ArrayLike | None = None) -> FloatArray:
        """Return the RDP of the instances asked for (default: all), shape (n, orders), in nats."""
        return self._balances.rdp(self._rows(indices))

    def worst_case_rdp(self) -> FloatArray:
        """Return the RDP of an instance at `max_sensitivity` in every step, shape (orders,)."""
        return self._balances.worst()

    def get_epsilon(
        self, delta: float, *, indices: npt.ArrayLike | None = None
    ) -> PerInstanceEpsilon:
        """Return ε(δ) of the instances asked for (default: all), with its guarantee.

        Raises:
            TypeError, ValueError: δ outside (0, 1), or an index out of range.
        """
        target = check.delta(delta)
        rows = self._rows(indices)
        epsilon, order = np.empty(len(rows)), np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            epsilon[part], order[part] = rdp_to_epsilon(
                self.rdp(rows[part]), orders=self._grid.orders.tolist(), delta=target
            )
        return PerInstanceEpsilon(epsilon, order, target, self._guarantee)

    def worst_case_epsilon(self, delta: float) -> float:
        """Return ε(δ) of an instance at `max_sensitivity` in every step, on the same orders."""
        epsilon, _ = rdp_to_epsilon(
            self.worst_case_rdp(), orders=self._grid.orders.tolist(), delta=check.delta(delta)
        )
        return float(epsilon)

    def to_dataframe(self, *, delta: float | None = None) -> pd.DataFrame:
        """Return one row per instance: id, epsilon, order, sensitivity, active, delta, guarantee.

        Args:
            delta: δ of the epsilons. Default 1 / num_instances.

        Raises:
            ImportError: pandas is missing; install the extra `report`.
        """
        import pandas as pd  # an optional extra

        spent = self.get_epsilon(1.0 / self.num_instances if delta is None else delta)
        return pd.DataFrame(
            {
                "instance_id": self._ids,
                "epsilon": spent.epsilon,
                "order": spent.order,
                "sensitivity": self.sensitivities,
                "active": self.active,
                "delta": spent.delta,
                "guarantee": spent.guarantee,
            }
        )

    def copy(self) -> PerInstanceAccountant:
        """Return an independent accountant with the same state."""
        return copy.deepcopy(self)

    # --- saving and joining -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger: numpy arrays and plain values, safe to save and to load."""
        return self._ledger().to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ledger saved from an accountant of the same instances, orders and levels.

        Raises:
            LedgerError: Another number of instances, other ids, orders or levels, an unknown
                version or damaged values. The accountant is left as it was.
        """
        ledger = Ledger.from_dict(state)
        self._ledger().require_same_instances(ledger)
        self._adopt(ledger)

    def merge(self, other: PerInstanceAccountant) -> None:
        """Take in the instances of another accountant that was charged the same steps.

        For shards of distinct instances (distributed ranks). Instances end up ordered by id.

        Raises:
            LedgerError: Ids in common, other orders or levels, or other steps (noise, sample rate
                or their number). The accountant is left as it was.
        """
        self._adopt(self._ledger().merged(other._ledger()))

    # --- inside -------------------------------------------------------------------------------

    def _set_caps(self, caps: FloatArray) -> None:
        active = np.flatnonzero(self.active)
        self._balances.move(active, self._grid.round_up(caps[active]))
        self._caps = caps
        self._source = "enforced" if self._steps else "fixed"

    def _checked_caps(self, caps: npt.ArrayLike, size: int) -> FloatArray:
        checked = check.real_array(
            "caps", caps, low=0.0, high=float(self._grid.sensitivities[-1]),
            cure="A cap is a clipping bound divided by max_grad_norm.",
        ).copy()  # fmt: skip
        check.same_length("caps", checked, "instances", size)
        return checked

    def _checked_sensitivities(self, sensitivities: npt.ArrayLike | None) -> FloatArray:
        return check.real_array(
            "sensitivities", sensitivities, low=0.0, high=float(self._grid.sensitivities[-1]),
            cure="Pass min(norm, clip bound) / max_grad_norm, or raise max_sensitivity.",
        )  # fmt: skip

    def _checked_rows(
        self, indices: npt.ArrayLike | None, sensitivities: npt.ArrayLike | None
    ) -> tuple[IntArray | None, IntArray]:
        """Return the batch's rows and the levels they round up to."""
        if indices is None:
            return None, np.empty(0, dtype=np.int64)
        cure = "An instance drawn twice has one sensitivity: the norm of the sum."
        rows = check.index_array("indices", indices, size=self.num_instances, cure=cure)
        values = self._checked_sensitivities(sensitivities)
        check.same_length("sensitivities", values, "indices", len(rows))
        self._refuse_forgotten(rows)
        if self._caps is not None:
            above = np.flatnonzero(values > self._caps[rows])
            if len(above):
                row = int(rows[above[0]])
                raise ValueError(
                    f"Expected sensitivities within the enforced caps, got {len(above)} of "
                    f"{len(rows)} above (first: instance {row}, sensitivity {values[above[0]]:g}, "
                    f"cap {self._caps[row]:g}). Clip each instance to its cap before the step."
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
        if rows is None:
            fixed = self._source == "fixed" and self._caps is None
            strongest = "bound" if fixed else "output_specific"
        elif len(rows) and self._caps is None and self._source != "measured":
            everyone = len(rows) == self._num_active
            strongest = "output_specific" if everyone else "estimate"
        if weakest([label, strongest]) != label:
            raise ValueError(
                f"Expected guarantee to be at most {strongest!r} at this step, got "
                f"guarantee={label!r}. Only constants and caps fixed before the run give a bound; "
                "only a full pass at this step is output-specific."
            )
        return label

    def _rows(self, indices: npt.ArrayLike | None) -> IntArray:
        if indices is None:
            return np.arange(self.num_instances)
        return check.index_array("indices", indices, size=self.num_instances, unique=False)

    def _ledger(self) -> Ledger:
        held, pending = self._balances, self._balances.pending
        noise, rate = (0.0, 0.0) if pending is None else pending.kernel
        return Ledger(
            orders=self._grid.orders,
            sensitivities=self._grid.sensitivities,
            base=held.base,
            flushes=held.flushes,
            repeats=0 if pending is None else pending.repeats,
            noise_multiplier=noise,
            sample_rate=rate,
            level=held.level,
            offset=held.offset,
            infinite=held.infinite,
            worst_infinite=held.worst_infinite,
            caps=self._caps,
            source=self._source,
            steps=self._steps,
            unattributed=self._unattributed,
            guarantee=self._guarantee,
            instance_ids=self._ids,
        )

    def _adopt(self, ledger: Ledger) -> None:
        held = Balances(0, levels=len(self._grid), orders=len(self._grid.orders))
        if ledger.repeats:
            noise, rate = ledger.noise_multiplier, ledger.sample_rate
            table = self._grid.rdp(noise_multiplier=noise, sample_rate=rate)
            held.pending = Pending(table, (noise, rate), repeats=ledger.repeats)
        held.base, held.flushes = ledger.base, ledger.flushes
        held.level, held.offset = ledger.level, ledger.offset
        held.infinite, held.worst_infinite = ledger.infinite, ledger.worst_infinite
        self._balances = held
        self._num_active = int(np.count_nonzero(self.active))
        self._ids, self._caps, self._source = ledger.instance_ids, ledger.caps, ledger.source
        self._steps, self._unattributed = ledger.steps, ledger.unattributed
        self._guarantee = ledger.guarantee


def _checked_ids(instance_ids: npt.ArrayLike | None, size: int) -> npt.NDArray[Any]:
    if instance_ids is None:
        return np.arange(size)
    ids = np.array(instance_ids)
    if ids.dtype.kind not in "iuU":
        raise TypeError(check.expected("instance_ids", "to be integers or strings", instance_ids))
    check.same_length("instance_ids", ids, "instances", size)
    if len(np.unique(ids)) != size:
        raise ValueError("Expected instance_ids without repetition, got some twice.")
    return ids
