"""What is refused before an account is charged: values, rows, caps and labels that cannot be right.

Every check returns the value it has read, or raises and has changed nothing. Knows the state of an
account; changes none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .account_state import AccountState
from .balances import Kernel
from .guarantee import STRONGEST_LABEL, weakest
from .instance_ids import InstanceIds
from .levels import LevelGrid


def checked_grid(levels: int, max_sensitivity: float, orders: Sequence[float]) -> LevelGrid:
    """Return the grid of an accountant's arguments."""
    count = check.integer("levels", levels, low=2, high=60_000)
    top = check.real(
        "max_sensitivity", max_sensitivity, low=1.0, cure="1 is the clipping bound itself."
    )
    if top > 1.0 and count < 3:
        raise ValueError(check.expected("levels", "to be >= 3 with max_sensitivity > 1", levels))
    return LevelGrid(count, max_sensitivity=top, orders=check.orders(orders))


def checked_ids(instance_ids: npt.ArrayLike | None, size: int) -> npt.NDArray[Any]:
    """Return one id per instance; without any the rows are the ids."""
    ids = InstanceIds(instance_ids)
    ids.require_size(size)
    return np.arange(size) if ids.array is None else ids.array


def checked_kernel(noise_multiplier: float, sample_rate: float) -> Kernel:
    """Return noise and sample rate of a step."""
    return check.noise_multiplier(noise_multiplier), check.sample_rate(sample_rate)


def checked_caps(state: AccountState, caps: npt.ArrayLike) -> FloatArray:
    """Return a copy of one cap per instance."""
    checked = check.real_array(
        "caps", caps, low=0.0, high=float(state.grid.sensitivities[-1]),
        cure="A cap is a clipping bound divided by max_grad_norm.",
    ).copy()  # fmt: skip
    check.same_length("caps", checked, "instances", state.size)
    return checked


def checked_sensitivities(state: AccountState, sensitivities: npt.ArrayLike | None) -> FloatArray:
    """Return sensitivities within the grid."""
    return check.real_array(
        "sensitivities", sensitivities, low=0.0, high=float(state.grid.sensitivities[-1]),
        cure="Pass min(norm, clip bound) / max_grad_norm, or raise max_sensitivity.",
    )  # fmt: skip


def checked_batch(
    state: AccountState,
    indices: npt.ArrayLike | None,
    sensitivities: npt.ArrayLike | None,
    caps: FloatArray | None,
) -> tuple[IntArray | None, IntArray]:
    """Return the batch's rows, None if nobody knows them, and the levels they round up to."""
    if indices is None:
        if state.privacy_filter is not None:
            raise ValueError(
                "Expected indices under a budget, got None. Nobody knows whose cap was in "
                "force: skip the batch, or train with a loader whose rows are known."
            )
        return None, np.empty(0, dtype=np.int64)
    cure = "An instance drawn twice has one sensitivity: the norm of the sum."
    rows = check.index_array("indices", indices, size=state.size, cure=cure)
    values = checked_sensitivities(state, sensitivities)
    check.same_length("sensitivities", values, "indices", len(rows))
    refuse_forgotten(state, rows)
    if caps is not None:
        _refuse_above_caps(rows, values, caps)
    return rows, state.grid.round_up(values)


def refuse_forgotten(state: AccountState, rows: IntArray) -> None:
    """Raise if one of `rows` has left the training set."""
    gone = rows[state.balances.level[rows] == len(state.grid)]
    if len(gone):
        raise ValueError(
            f"Expected instances that are still in the training set, got {len(gone)} of "
            f"{len(rows)} forgotten (first: instance {int(gone[0])}). Leave them out."
        )


def _refuse_above_caps(rows: IntArray, values: FloatArray, caps: FloatArray) -> None:
    above = np.flatnonzero(values > caps[rows])
    if len(above):
        row = int(rows[above[0]])
        raise ValueError(
            f"Expected sensitivities within the enforced caps, got {len(above)} of "
            f"{len(rows)} above (first: instance {row}, sensitivity {values[above[0]]:g}, "
            f"cap {caps[row]:g}). Clip each instance to its cap before the step; "
            "under a budget to caps_for(noise_multiplier=…, sample_rate=…)."
        )


def checked_label(state: AccountState, guarantee: str, rows: IntArray | None) -> str:
    """Return the caller's label if the levels can carry it at a step of `rows`."""
    label = check.choice("guarantee", guarantee, ("bound", "output_specific", "estimate"))
    strongest = _strongest_label(state, rows)
    if weakest([label, strongest]) != label:
        raise ValueError(
            f"Expected guarantee to be at most {strongest!r} at this step, got "
            f"guarantee={label!r}. Only constants and caps fixed before the run give a bound; "
            "only a full pass at this step is output-specific."
        )
    return label


def _strongest_label(state: AccountState, rows: IntArray | None) -> str:
    """Return the strongest label that a step of `rows` can carry."""
    if state.privacy_filter is not None:
        return "bound"  # caps only need to be known before each step
    if rows is None:
        fixed = state.source == "fixed" and state.caps is None
        return "bound" if fixed else "output_specific"
    if len(rows) and state.caps is None and state.source != "measured":
        everyone = len(rows) == state.num_present
        return "output_specific" if everyone else "estimate"
    return STRONGEST_LABEL[state.source]
