"""Charging an account: who pays how much at a step, and what else changes an account by a call.

Every function checks first and then acts on the state, so that a call that fails has changed
nothing. They are the methods of `PerInstanceAccountant` of the same names. What the checks say is
`charge_checks`; how a charge is kept, `account_state`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray
from .account_state import AccountState
from .charge_checks import (
    checked_batch,
    checked_caps,
    checked_kernel,
    checked_label,
    checked_sensitivities,
    refuse_forgotten,
)
from .filter import PrivacyFilter


def step(
    state: AccountState,
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
    noise, rate = checked_kernel(noise_multiplier, sample_rate)
    table = state.grid.rdp(noise_multiplier=noise, sample_rate=rate)
    privacy_filter, caps = _in_force(state, table)
    rows, levels = checked_batch(state, indices, sensitivities, caps)
    label = checked_label(state, guarantee, rows)  # the last thing to fail

    if state.source == "absent":  # fixed batches came before: nothing is known about the others
        state.move_everyone(len(state.grid) - 1)
        state.source = "stale"
    if privacy_filter is not None and caps is not None:
        state.leave_out(privacy_filter, caps)
    if rows is not None and state.caps is None and len(rows):
        state.move(rows, levels)
        everyone = len(rows) >= state.num_present
        state.source = "measured" if everyone else "stale"
    state.charge(table, (noise, rate), attributed=rows is not None)
    _label(state, label, reasons)
    if state.source == "measured":
        state.source = "stale"  # exact for this step only


def participate(
    state: AccountState,
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
    noise, _ = checked_kernel(noise_multiplier, 1.0)
    label = check.choice("guarantee", guarantee, ("output_specific", "estimate"))
    if state.caps is not None:
        raise ValueError(
            "Expected an accountant without caps or budget for fixed batches, got one with. "
            "Call step, or construct it without."
        )
    table = state.grid.rdp(noise_multiplier=noise, sample_rate=1.0)
    rows, levels = checked_batch(state, indices, sensitivities, None)

    if state.source != "absent":
        state.move_everyone(0)
        state.source = "absent"
    if rows is not None:
        state.move(rows, levels)
    state.charge(table, (noise, 1.0), attributed=rows is not None)
    _label(state, label, reasons)
    if rows is not None:
        state.move_to(rows, 0)


def caps_for(state: AccountState, *, noise_multiplier: float, sample_rate: float) -> FloatArray:
    """Return the bounds to clip the coming step to, in units of max_grad_norm.

    Args:
        noise_multiplier: As the coming `step` will be charged. >= 0.
        sample_rate: As the coming `step` will be charged. In [0, 1].

    Returns:
        Shape (instances,): the caps (`max_sensitivity` without caps), 0 for whoever was
        forgotten or has no budget left for such a step. Nothing is changed.
    """
    noise, rate = checked_kernel(noise_multiplier, sample_rate)
    _, caps = _in_force(state, state.grid.rdp(noise_multiplier=noise, sample_rate=rate))
    if caps is None:
        caps = np.full(state.size, state.grid.sensitivities[-1])
    return np.where(state.present, caps, 0.0)


def observe_all(state: AccountState, sensitivities: npt.ArrayLike) -> None:
    """Set every instance's level from a full pass at the current parameters.

    Args:
        sensitivities: Shape (instances,); entries of forgotten instances are ignored.

    Raises:
        ValueError: Wrong length, NaN or above `max_sensitivity`; or caps are in force.
    """
    values = checked_sensitivities(state, sensitivities)
    check.same_length("sensitivities", values, "instances", state.size)
    if state.caps is not None:
        raise ValueError(
            "Expected no caps in force, got an accountant with caps. Call set_caps instead."
        )
    state.observe(values)
    state.source = "measured"


def set_caps(state: AccountState, caps: npt.ArrayLike) -> None:
    """Charge each instance at an enforced clipping bound from the next step on.

    Args:
        caps: Shape (instances,), in units of max_grad_norm, in [0, max_sensitivity]. Whoever
            was left out for want of budget stays out.

    Raises:
        ValueError: Not one finite cap per instance; or steps labelled "bound" were charged at
            other levels already, and caps chosen after them cannot be fixed before the run
            (a budget allows it).
    """
    checked = checked_caps(state, caps)
    if state.steps and state.guarantee == "bound" and state.privacy_filter is None:
        raise ValueError(
            f"Expected caps to be fixed before the run, got new caps after {state.steps} steps "
            "labelled 'bound'. Start a new accountant, set a budget, or charge with "
            "guarantee='output_specific' from the first step."
        )
    state.set_caps(checked)


def forget(state: AccountState, indices: npt.ArrayLike) -> None:
    """Stop charging instances that left the training set; their rows become tombstones.

    Their losses so far stay readable, marked by `forgotten`.

    Args:
        indices: Shape (n,), instances, each once.

    Raises:
        TypeError, ValueError: An index out of range, repeated, or forgotten before.
    """
    rows = check.index_array("indices", indices, size=state.size)
    refuse_forgotten(state, rows)
    state.forget(rows)


def weaken(state: AccountState, guarantee: str, *, reason: str = "") -> None:
    """Lower the label of what was charged so far, where something outside voids it.

    Args:
        guarantee: "output_specific" or "estimate"; a stronger label than the present one
            changes nothing.
        reason: Why, in a sentence.
    """
    label = check.choice("guarantee", guarantee, ("output_specific", "estimate"))
    state.weaken(label)
    if reason:
        state.reasons.setdefault(reason, 0)


def lose_everything(state: AccountState, indices: npt.ArrayLike | None) -> None:
    """Charge instances infinitely: something without a bound was given away about them.

    Args:
        indices: Shape (n,), instances, each once. None: everyone.

    Raises:
        TypeError, ValueError: An index out of range or repeated; or a budget, which nobody may
            exceed. The accountant is left as it was.
    """
    if state.privacy_filter is not None:
        raise ValueError(
            "Expected an accountant without budgets, got one with: nobody may exceed a budget. "
            "Leave such an instance out before the step."
        )
    rows = np.arange(state.size) if indices is None else indices
    state.balances.infinite[check.index_array("indices", rows, size=state.size)] = True


def _in_force(
    state: AccountState, table: FloatArray
) -> tuple[PrivacyFilter | None, FloatArray | None]:
    """Return the filter and the caps in force for a step with RDP `table`."""
    if state.privacy_filter is None or state.caps is None:
        return None, state.caps
    settled = state.privacy_filter.settled_for(table, state.balances.level, state.grid.orders)
    return settled, np.where(settled.affords(state.balances, table), state.caps, 0.0)


def _label(state: AccountState, label: str, reasons: Sequence[str]) -> None:
    """Label a step, with its reasons; a label without any has the caller's word."""
    state.weaken(label)
    if not reasons and label != "bound":
        reasons = (f"the caller vouched for {label!r} only",)
    state.count_reasons(reasons)
