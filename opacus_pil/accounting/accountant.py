"""PerInstanceAccountant: the account of every training instance, under its public names.

Meets training only through arrays (indices, sensitivities); knows no model and no optimizer. It
holds one state (`account_state`); what changes it is `charging`, what can be read is `readings`.
Longer than most files because every public name of an account is told or named here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray
from . import charging, readings
from .account_state import AccountState
from .charge_checks import checked_caps, checked_grid, checked_ids
from .filter import PrivacyFilter
from .ledger import Ledger
from .ledger_rows import Columns, ledger_chunks, write_ledger
from .rdp import DEFAULT_ORDERS

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
R = TypeVar("R")


def on_state(
    function: Callable[Concatenate[AccountState, P], R],
) -> Callable[Concatenate[PerInstanceAccountant, P], R]:
    """Return a function of a state as the method of the accountant that holds the state."""

    @wraps(function)
    def method(self: PerInstanceAccountant, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self._state, *args, **kwargs)

    method.__module__, method.__qualname__ = __name__, f"PerInstanceAccountant.{function.__name__}"
    told = signature(function)
    _, *others = told.parameters.values()
    holder = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = told.replace(parameters=[holder, *others])  # type: ignore[attr-defined]
    return method


class PerInstanceAccountant:
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

    @check.known_keywords
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
        grid = checked_grid(levels, max_sensitivity, orders)
        privacy_filter = None
        if budget is not None:
            privacy_filter = PrivacyFilter.from_budget(budget, size=size, orders=grid.orders)
            caps = np.full(size, grid.sensitivities[-1]) if caps is None else caps
        self._state = AccountState.unspent(
            grid,
            instance_ids=checked_ids(instance_ids, size),
            privacy_filter=privacy_filter,
            history=bool(history),
            folder=memory_map,
        )
        if caps is not None:
            self._state.set_caps(checked_caps(self._state, caps))

    # --- charging -----------------------------------------------------------------------------

    step = on_state(charging.step)
    participate = on_state(charging.participate)
    caps_for = on_state(charging.caps_for)
    observe_all = on_state(charging.observe_all)
    set_caps = on_state(charging.set_caps)
    forget = on_state(charging.forget)
    weaken = on_state(charging.weaken)
    lose_everything = on_state(charging.lose_everything)

    # --- what it is ---------------------------------------------------------------------------

    @property
    def num_instances(self) -> int:
        """Number of instances, forgotten ones included."""
        return self._state.size

    @property
    def orders(self) -> FloatArray:
        """Rényi orders, shape (orders,)."""
        return self._state.grid.orders.copy()

    @property
    def levels(self) -> FloatArray:
        """Sensitivities on the grid, ascending, shape (levels,)."""
        return self._state.grid.sensitivities.copy()

    @property
    def instance_ids(self) -> npt.NDArray[Any]:
        """Stable id of each instance, shape (instances,)."""
        return self._state.instance_ids.copy()

    @property
    def steps(self) -> int:
        """Number of steps charged."""
        return self._state.steps

    @property
    def unattributed_steps(self) -> int:
        """Number of steps in which everyone was charged the worst case, for want of indices."""
        return self._state.unattributed

    @property
    def guarantee(self) -> str:
        """What the numbers may claim: the weakest label of any step so far."""
        return self._state.guarantee

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the label is not a stronger one, a sentence each, with the number of steps.

        Of "bound" what it takes for granted without a check; empty if that is nothing.
        """
        return readings.reasons(self._state)

    @property
    def realised_guarantee(self) -> str:
        """What a sum along the run that happened may claim: `spent_rdp`, `tight_epsilon`, a set's.

        That is `guarantee`, and under a budget "output_specific" at most: a filter holds everyone
        to the budget, not to what happens to be spent of it.
        """
        return readings.realised_guarantee(self._state)

    @property
    def budgeted(self) -> bool:
        """Whether a filter holds every instance to a budget."""
        return self._state.privacy_filter is not None

    @property
    def caps(self) -> FloatArray | None:
        """Enforced clipping bounds in units of max_grad_norm, shape (instances,), or None.

        Under a budget those of a step like the last one: 0 for whoever has none left for it.
        """
        return readings.caps(self._state)

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,): False once forgotten, or out of budget for a step like the last."""
        return readings.active(self._state)

    @property
    def keeps_history(self) -> bool:
        """Whether levels are logged, so that `group_rdp` can be read."""
        return self._state.history is not None

    @property
    def forgotten(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,): True for tombstones, whose losses stand still since they left.

        What is read for them is what the model had given away until then, not what an unlearned
        model still does: that is what a certificate says.
        """
        return ~self._state.present

    @property
    def num_forgotten(self) -> int:
        """Number of tombstones, known without counting."""
        return self._state.size - self._state.num_present

    @property
    def sensitivities(self) -> FloatArray:
        """Sensitivity each instance is charged at now, rounded up, shape (instances,).

        0 for the forgotten: they pay nothing more. What they paid is not 0.
        """
        return readings.sensitivities(self._state)

    # --- reading ------------------------------------------------------------------------------

    rdp = on_state(readings.rdp)
    spent_rdp = on_state(readings.spent_rdp)
    worst_case_rdp = on_state(readings.worst_case_rdp)
    get_epsilon = on_state(readings.get_epsilon)
    worst_case_epsilon = on_state(readings.worst_case_epsilon)
    group_rdp = on_state(readings.group_rdp)
    tight_epsilon = on_state(readings.tight_epsilon)

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

    def __repr__(self) -> str:
        """Say in a line what the ledger holds."""
        gone = f", {self.num_forgotten:,} forgotten" if self.num_forgotten else ""
        return (
            f"{type(self).__name__}({self.num_instances:,} instances, {self.steps:,} steps, label "
            f"{self.guarantee!r}{gone})"
        )

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
        self._state.instance_ids = instance_ids.copy()

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger: numpy arrays and plain values, safe to save and to load."""
        return self._state.to_ledger().to_dict()

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
        self._state.to_ledger().require_same_instances(ledger)
        self._state.adopt(ledger)

    def merge(self, other: PerInstanceAccountant) -> None:
        """Take in the instances of another accountant that was charged the same steps.

        For shards of distinct instances (distributed ranks). Instances end up ordered by id. A step
        whose rows one shard did not know charges that shard the worst case and the other nothing
        more; with a history both must know the same.

        Raises:
            LedgerError: Ids in common, other orders or levels, or other steps (noise, sample rate
                or their number). The accountant is left as it was.
        """
        self._state.merge(other._state)
