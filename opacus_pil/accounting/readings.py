"""What can be read from an account: losses, ε and labels, of everyone, of some, of a set.

Pure functions of the state: none changes it, none knows how it came about. Those with `Args` are
the methods of `PerInstanceAccountant` of the same names, the others its properties.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .account_state import AccountState
from .balances import CHUNK
from .forget_set import run_epsilon, run_rdp
from .guarantee import PerInstanceEpsilon, weakest
from .history import JointSteps
from .rdp import rdp_to_epsilon

# --- losses and ε ---------------------------------------------------------------------------------


def rdp(state: AccountState, indices: npt.ArrayLike | None = None) -> FloatArray:
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
    rows = _rows(state, indices)
    if state.privacy_filter is not None:
        return state.privacy_filter.budgets(rows, state.grid.orders)
    return state.balances.rdp(rows)


def spent_rdp(state: AccountState, indices: npt.ArrayLike | None = None) -> FloatArray:
    """Return the realised sum of all charges, shape (n, orders), in nats.

    Guarantee: `realised_guarantee`. Without a budget equal to `rdp`.

    Args:
        indices: Shape (n,), instances to read. None: all.
    """
    rows = _rows(state, indices)
    spent = state.balances.rdp(rows)
    # Every step was tested against the limits with its charges rounded up.
    return spent if state.privacy_filter is None else state.privacy_filter.clipped(spent, rows)


def worst_case_rdp(state: AccountState) -> FloatArray:
    """Return the RDP of an instance at `max_sensitivity` in every step, shape (orders,)."""
    return state.balances.worst()


def get_epsilon(
    state: AccountState, delta: float, *, indices: npt.ArrayLike | None = None
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
    target = check.delta(delta)
    rows = _rows(state, indices)
    epsilon, order = np.empty(len(rows)), np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        epsilon[part], order[part] = rdp_to_epsilon(
            rdp(state, rows[part]), orders=state.grid.orders.tolist(), delta=target
        )
    return PerInstanceEpsilon(epsilon, order, target, state.guarantee, reasons(state))


def worst_case_epsilon(state: AccountState, delta: float) -> float:
    """Return ε(delta) of an instance at `max_sensitivity` in every step, on the same orders."""
    epsilon, _ = rdp_to_epsilon(
        worst_case_rdp(state), orders=state.grid.orders.tolist(), delta=check.delta(delta)
    )
    return float(epsilon)


def group_rdp(state: AccountState, indices: npt.ArrayLike) -> FloatArray:
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
    runs = _runs(state, indices)
    if state.balances.infinite[_rows(state, indices)].any():
        return np.full(len(state.grid.orders), np.inf)
    return run_rdp(runs, orders=state.grid.orders)


def tight_epsilon(
    state: AccountState, indices: npt.ArrayLike, *, delta: float
) -> PerInstanceEpsilon:
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
    runs = _runs(state, indices)
    infinite = state.balances.infinite[_rows(state, indices)].any()
    epsilon = np.inf if infinite else run_epsilon(runs, delta=target)
    return PerInstanceEpsilon(
        np.array([epsilon]),
        np.array([np.nan]),
        target,
        realised_guarantee(state),
        _realised_reasons(state),
    )


# --- labels ---------------------------------------------------------------------------------------


def reasons(state: AccountState) -> tuple[str, ...]:
    """Return why the label is not a stronger one, a sentence each, with the number of steps."""
    return tuple(
        f"{reason} ({count} of {state.steps} steps)" if 0 < count < state.steps else reason
        for reason, count in state.reasons.items()
    )


def realised_guarantee(state: AccountState) -> str:
    """Return what a sum along the run that happened may claim."""
    filtered = [] if state.privacy_filter is None else ["output_specific"]
    return weakest([state.guarantee, *filtered])


def _realised_reasons(state: AccountState) -> tuple[str, ...]:
    if state.privacy_filter is None:
        return reasons(state)
    return (*reasons(state), "a budget bounds each instance before the run, not what was spent")


# --- where everyone stands ------------------------------------------------------------------------


def caps(state: AccountState) -> FloatArray | None:
    """Return the enforced bounds, shape (instances,), of a step like the last one, or None."""
    if state.caps is None or state.privacy_filter is None:
        return None if state.caps is None else state.caps.copy()
    return np.where(active(state), state.caps, 0.0)


def active(state: AccountState) -> npt.NDArray[np.bool_]:
    """Return who takes part in a step like the last one, shape (instances,)."""
    present, pending = state.present, state.balances.pending
    if state.privacy_filter is None or pending is None:
        return present
    noise, rate = pending.kernel
    table = state.grid.rdp(noise_multiplier=noise, sample_rate=rate)
    return present & state.privacy_filter.affords(state.balances, table)


def sensitivities(state: AccountState) -> FloatArray:
    """Return what each instance is charged at now, shape (instances,); 0 for the forgotten."""
    return np.append(state.grid.sensitivities, 0.0)[state.balances.level]


# --- inside ---------------------------------------------------------------------------------------


def _rows(state: AccountState, indices: npt.ArrayLike | None) -> IntArray:
    if indices is None:
        return np.arange(state.size)
    return check.index_array("indices", indices, size=state.size, unique=False)


def _runs(state: AccountState, indices: npt.ArrayLike) -> list[JointSteps]:
    rows = check.index_array("indices", indices, size=state.size)
    if state.history is None:
        raise ValueError(
            "Expected an accountant that keeps the history of its levels, got one without. "
            "Construct it with history=True: single balances do not tell what a set lost."
        )
    return state.history.runs(rows, sensitivities=state.grid.sensitivities)
