"""PrivacyLosses: what every instance of a training set has lost so far, to be read and saved.

Charging is `accountant.py`; how charges are kept is `balances.py`; the saved form is `ledger.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from . import offsets
from .balances import CHUNK, Balances, Pending
from .filter import PrivacyFilter
from .forget_set import run_epsilon, run_rdp
from .guarantee import GUARANTEES, PerInstanceEpsilon, weakest
from .history import History, JointSteps
from .ledger import Ledger
from .ledger_rows import Columns, ledger_chunks, write_ledger
from .levels import LevelGrid
from .rdp import rdp_to_epsilon

if TYPE_CHECKING:
    import pandas as pd

MOST_REASONS = 64  # different ones are kept; a run that goes wrong in more ways needs no more


class PrivacyLosses:
    """State of a per-instance accountant, everything that can be asked of it, and its saved form.

    Args:
        grid: Sensitivities and orders that charges are made on.
        instance_ids: Shape (instances,), unique.
        privacy_filter: Budgets, or None.
        history: Whether to log who stood on which level at which step.
        memory_map: Folder for the offsets, None: in memory.
    """

    def __init__(
        self,
        grid: LevelGrid,
        *,
        instance_ids: npt.NDArray[Any],
        privacy_filter: PrivacyFilter | None,
        history: bool,
        memory_map: str | os.PathLike[str] | None = None,
    ) -> None:
        size = len(instance_ids)
        self._grid = grid
        self._ids = instance_ids
        self._balances = Balances(
            size, levels=len(grid), orders=len(grid.orders), folder=memory_map
        )
        self._num_present = size  # kept: counting would cost a step time that grows with N
        self._caps: FloatArray | None = None
        self._filter = privacy_filter
        self._history = History(size, num_levels=len(grid)) if history else None
        self._source = "fixed"
        self._steps = 0
        self._unattributed = 0
        self._guarantee = GUARANTEES[0]
        self._reasons: dict[str, int] = {}  # sentence -> number of steps; in order of appearance

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
    def reasons(self) -> tuple[str, ...]:
        """Why the label is not a stronger one, a sentence each, with the number of steps.

        Of "bound" what it takes for granted without a check; empty if that is nothing.
        """
        return tuple(
            f"{reason} ({count} of {self._steps} steps)" if 0 < count < self._steps else reason
            for reason, count in self._reasons.items()
        )

    @property
    def realised_guarantee(self) -> str:
        """What a sum along the run that happened may claim: `spent_rdp`, `tight_epsilon`, a set's.

        That is `guarantee`, and under a budget "output_specific" at most: a filter holds everyone
        to the budget, not to what happens to be spent of it.
        """
        filtered = [] if self._filter is None else ["output_specific"]
        return weakest([self._guarantee, *filtered])

    @property
    def _realised_reasons(self) -> tuple[str, ...]:
        if self._filter is None:
            return self.reasons
        return (*self.reasons, "a budget bounds each instance before the run, not what was spent")

    @property
    def budgeted(self) -> bool:
        """Whether a filter holds every instance to a budget."""
        return self._filter is not None

    @property
    def caps(self) -> FloatArray | None:
        """Enforced clipping bounds in units of max_grad_norm, shape (instances,), or None.

        Under a budget those of a step like the last one: 0 for whoever has none left for it.
        """
        if self._caps is None or self._filter is None:
            return None if self._caps is None else self._caps.copy()
        return np.where(self.active, self._caps, 0.0)

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,): False once forgotten, or out of budget for a step like the last."""
        present, pending = self._present(), self._balances.pending
        if self._filter is None or pending is None:
            return present
        noise, rate = pending.kernel
        table = self._grid.rdp(noise_multiplier=noise, sample_rate=rate)
        return present & self._filter.affords(self._balances, table)

    @property
    def keeps_history(self) -> bool:
        """Whether levels are logged, so that `group_rdp` can be read."""
        return self._history is not None

    @property
    def forgotten(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,): True for tombstones, whose losses stand still since they left.

        What is read for them is what the model had given away until then, not what an unlearned
        model still does: that is what a certificate says.
        """
        return ~self._present()

    @property
    def sensitivities(self) -> FloatArray:
        """Sensitivity each instance is charged at now, rounded up, shape (instances,).

        0 for the forgotten: they pay nothing more. What they paid is not 0.
        """
        return np.append(self._grid.sensitivities, 0.0)[self._balances.level]

    # --- reading ------------------------------------------------------------------------------

    def rdp(self, indices: npt.ArrayLike | None = None) -> FloatArray:
        """Return the RDP of the instances asked for (default: all), shape (n, orders), in nats.

        Under a budget this is the budget, whatever was spent of it: only that holds for the whole
        run before it begins. inf above the orders it is enforced at.

        Guarantee: adding or removing one instance, both directions, as `guarantee` says.

        Args:
            indices: Shape (n,), instances to read, in any order. None: all.

        Raises:
            TypeError, ValueError: An index out of range.

        Edge cases (first match wins):
            a budget             the budget
            a step without noise at a sensitivity > 0   inf
            no steps             0
        """
        rows = self._rows(indices)
        if self._filter is not None:
            return self._filter.budgets(rows, self._grid.orders)
        return self._balances.rdp(rows)

    def spent_rdp(self, indices: npt.ArrayLike | None = None) -> FloatArray:
        """Return the realised sum of all charges, shape (n, orders), in nats.

        Guarantee: `realised_guarantee`. Without a budget equal to `rdp`.

        Args:
            indices: Shape (n,), instances to read. None: all.
        """
        rows = self._rows(indices)
        spent = self._balances.rdp(rows)
        # Every step was tested against the limits with its charges rounded up.
        return spent if self._filter is None else self._filter.clipped(spent, rows)

    def worst_case_rdp(self) -> FloatArray:
        """Return the RDP of an instance at `max_sensitivity` in every step, shape (orders,)."""
        return self._balances.worst()

    def get_epsilon(
        self, delta: float, *, indices: npt.ArrayLike | None = None
    ) -> PerInstanceEpsilon:
        """Return ε(δ) of the instances asked for (default: all), with its guarantee.

        Under a budget this is the budget's ε: the one it was given as, at the δ it was given with.

        Args:
            delta: In (0, 1).
            indices: Shape (n,), instances to read. None: all.

        Returns:
            ε and order of shape (n,), with label and δ. Never above `worst_case_epsilon`, except
            that a budget may be more than what was spent so far.

        Raises:
            TypeError, ValueError: δ outside (0, 1), or an index out of range.
        """
        return self._epsilon(self.rdp, delta, indices, self._guarantee)

    def worst_case_epsilon(self, delta: float) -> float:
        """Return ε(delta) of an instance at `max_sensitivity` in every step, on the same orders."""
        epsilon, _ = rdp_to_epsilon(
            self.worst_case_rdp(), orders=self._grid.orders.tolist(), delta=check.delta(delta)
        )
        return float(epsilon)

    def group_rdp(self, indices: npt.ArrayLike) -> FloatArray:
        """Return the RDP of adding or removing all of `indices` together, shape (orders,), in nats.

        Guarantee: at least the sum over steps of the one-step bound for the set at the levels its
            members stood on, both directions. What that sum may claim is `guarantee`, and at most
            "output_specific" under a budget: a filter limits instances, not sets.

        How tight: from norms alone (gradients taken as collinear); runs with more than 128
        joint states per noise and sample rate are rounded up to 128, which costs about 10 % at 100
        members.

        Args:
            indices: Shape (members,), each once; no members: 0.

        Raises:
            ValueError: The accountant keeps no history; an index out of range or repeated.
        """
        runs = self._runs(indices)
        if self._balances.infinite[self._rows(indices)].any():
            return np.full(len(self._grid.orders), np.inf)
        return run_rdp(runs, orders=self._grid.orders)

    def tight_epsilon(self, indices: npt.ArrayLike, *, delta: float) -> PerInstanceEpsilon:
        """Return ε(δ) of adding or removing all of `indices` together, by loss distributions.

        Guarantee: at least the exact ε of the steps at the levels the members stood on; label as in
            `group_rdp`. For the few instances or sets that matter: it takes seconds.

        Args:
            indices: Shape (members,), each once.
            delta: In (0, 1).

        Returns:
            One ε, with order nan: it was read at no order.

        Raises:
            ImportError: dp-accounting is missing.
            ValueError: As in `group_rdp`, or δ outside (0, 1).
        """
        target = check.delta(delta)
        runs = self._runs(indices)
        infinite = self._balances.infinite[self._rows(indices)].any()
        epsilon = np.inf if infinite else run_epsilon(runs, delta=target)
        return PerInstanceEpsilon(
            np.array([epsilon]),
            np.array([np.nan]),
            target,
            self.realised_guarantee,
            self._realised_reasons,
        )

    def to_dataframe(self, *, delta: float | None = None) -> pd.DataFrame:
        """Return one row per instance, tombstones of forgotten ones included and marked.

        Columns: instance_id, epsilon, order, sensitivity, active, forgotten, delta, guarantee;
        under a budget also spent_epsilon, the realised sum's ε, with its own label spent_guarantee.
        The ε of a tombstone is what it had lost when it left; it has no sensitivity (NaN).

        Args:
            delta: δ of the epsilons. Default 1 / num_instances.

        Raises:
            ImportError: pandas is missing; install the extra `report`.
        """
        import pandas as pd  # an optional extra

        return pd.concat(map(pd.DataFrame, ledger_chunks(self, delta=delta)), ignore_index=True)

    def to_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        delta: float | None = None,
        columns: Columns | None = None,
    ) -> None:
        """Write the rows of `to_dataframe` to a Parquet file, for `ledger_table.LedgerTable`.

        RDP is formed a chunk of instances at a time, however many there are.

        Args:
            path: Target; its folder must exist. Created with mode 0600, whole or absent.
            delta: δ of the epsilons. Default 1 / num_instances.
            columns: More columns, name -> shape (instances,), for example {"label": labels}.

        Raises:
            ImportError: pyarrow is missing; install the extra `report`.
            OSError: The folder is missing or not writable.
            TypeError, ValueError: δ outside (0, 1); a column of another length, or with a name that
                is taken.

        Privacy: the rows depend on private data.
        """
        write_ledger(path, ledger_chunks(self, delta=delta, columns=columns))

    # --- copying, saving and joining ----------------------------------------------------------

    def copy(self) -> Self:
        """Return an independent accountant with the same state."""
        return copy.deepcopy(self)

    def rename(self, instance_ids: npt.NDArray[Any]) -> None:
        """Give the instances other ids, in their order.

        Args:
            instance_ids: Shape (instances,), unique.

        Raises:
            ValueError: Not one id per instance.
        """
        check.same_length("instance_ids", instance_ids, "instances", self.num_instances)
        self._ids = instance_ids.copy()

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger: numpy arrays and plain values, safe to save and to load."""
        return self._ledger().to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ledger saved from an accountant of the same instances, orders and levels.

        Caps, budgets and history are the ledger's from then on.

        Args:
            state: From `state_dict`; arrays may be CPU tensors or lists.

        Raises:
            LedgerError: Another number of instances, other ids, orders or levels, an unknown
                version or damaged values; or no history, where this accountant keeps one. The
                accountant is left as it was.
        """
        ledger = Ledger.from_dict(state)
        self._ledger().require_same_instances(ledger)
        self._adopt(ledger)

    def merge(self, other: PrivacyLosses) -> None:
        """Take in the instances of another accountant that was charged the same steps.

        For shards of distinct instances (distributed ranks). Instances end up ordered by id. A step
        whose rows one shard did not know charges that shard the worst case and the other nothing
        more; with a history both must know the same.

        Raises:
            LedgerError: Ids in common, other orders or levels, or other steps (noise, sample rate
                or their number). The accountant is left as it was.
        """
        mine, theirs = self._ledger(), other._ledger()
        if not mine.same_sums(theirs):
            mine, theirs = self._settled(), other._settled()
        self._adopt(mine.merged(theirs))

    # --- inside -------------------------------------------------------------------------------

    def _present(self) -> npt.NDArray[np.bool_]:
        return self._balances.level != len(self._grid)

    def _rows(self, indices: npt.ArrayLike | None) -> IntArray:
        if indices is None:
            return np.arange(self.num_instances)
        return check.index_array("indices", indices, size=self.num_instances, unique=False)

    def _epsilon(
        self, curve: Callable[[IntArray], FloatArray], delta: float, indices: Any, guarantee: str
    ) -> PerInstanceEpsilon:
        """Convert `curve` of the rows asked for, a chunk at a time."""
        target = check.delta(delta)
        rows = self._rows(indices)
        epsilon, order = np.empty(len(rows)), np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            epsilon[part], order[part] = rdp_to_epsilon(
                curve(rows[part]), orders=self._grid.orders.tolist(), delta=target
            )
        return PerInstanceEpsilon(epsilon, order, target, guarantee, self.reasons)

    def _runs(self, indices: npt.ArrayLike) -> list[JointSteps]:
        rows = check.index_array("indices", indices, size=self.num_instances)
        if self._history is None:
            raise ValueError(
                "Expected an accountant that keeps the history of its levels, got one without. "
                "Construct it with history=True: single balances do not tell what a set lost."
            )
        return self._history.runs(rows, sensitivities=self._grid.sensitivities)

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
            reasons=dict(self._reasons),
            instance_ids=self._ids,
            privacy_filter=self._filter,
            history=self._history,
        )

    def _settled(self) -> Ledger:
        ledger, pending = self._ledger(), self._balances.pending
        return ledger if pending is None else ledger.settled(pending.table)

    def _adopt(self, ledger: Ledger) -> None:
        folder = self._balances.folder
        held = Balances(0, levels=len(self._grid), orders=len(self._grid.orders), folder=folder)
        if ledger.repeats:
            noise, rate = ledger.noise_multiplier, ledger.sample_rate
            table = self._grid.rdp(noise_multiplier=noise, sample_rate=rate)
            held.pending = Pending(table, (noise, rate), repeats=ledger.repeats)
        held.base, held.flushes = ledger.base, ledger.flushes
        held.level, held.offset = ledger.level, offsets.placed(ledger.offset, folder=folder)
        held.infinite, held.worst_infinite = ledger.infinite, ledger.worst_infinite
        self._balances = held
        self._num_present = int(np.count_nonzero(held.level != len(self._grid)))
        self._ids, self._caps, self._source = ledger.instance_ids, ledger.caps, ledger.source
        self._steps, self._unattributed = ledger.steps, ledger.unattributed
        self._guarantee, self._reasons = ledger.guarantee, dict(ledger.reasons)
        self._filter, self._history = ledger.privacy_filter, ledger.history
