"""Per-person ε, where a person has several rows: the group bound of all of them together.

Knows accounts with history; no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..accounting import PerInstanceAccountant, group_rdp
from ..accounting.rdp import rdp_to_epsilon
from .per_instance_epsilon import PerInstanceEpsilon

_COLLINEAR = (
    "of a person with several rows the bound takes all their gradients as pointing one way: an ε "
    "of the group, not a sum of the rows' ε"
)


def of_persons(
    account: PerInstanceAccountant,
    *,
    delta: float,
    members: Mapping[Any, IntArray],
    kernels: Sequence[tuple[float, float, int]],
    norms: FloatArray | None,
) -> PerInstanceEpsilon:
    """Return each person's ε: of adding or removing all of their rows together.

    Guarantee: the account's label. A person with one row has that row's ε; with several, the bound
        of `PerInstanceAccountant.group_rdp`, never below any of their rows'.

    Args:
        account: With history.
        delta: In (0, 1).
        members: Person -> rows.
        kernels: Noise multiplier, sample rate and number of steps, for the worst case: as many rows
            as the largest of these persons has, all at the clip bound.
        norms: As in PerInstanceEpsilon, of rows; a person has the largest of theirs.
    """
    plain = account.get_epsilon(delta)  # checks δ; label and reasons are the account's
    found, known = [], dict[tuple[bytes, ...], FloatArray]()
    for rows in members.values():
        # Rows with the same loss at every order stood on the same levels: computed once.
        each = account.rdp(rows)
        key = tuple(sorted(one.tobytes() for one in each))
        if key not in known:
            known[key] = np.asarray(each[0] if len(rows) == 1 else account.group_rdp(rows))
        found.append(known[key])
    values = np.stack(found) if found else np.empty((0, len(account.orders)))
    epsilon, order = rdp_to_epsilon(values, orders=account.orders, delta=delta)
    most = max(map(len, members.values()), default=1)
    several = (_COLLINEAR,) if most > 1 else ()
    return PerInstanceEpsilon(
        np.asarray(epsilon), np.asarray(order), plain.delta, plain.guarantee,
        (*plain.reasons, *several), instance_ids=np.array(list(members)),
        worst_case=_worst_case(account, members=most, kernels=kernels, delta=delta),
        norms=None if norms is None else np.array([_largest(norms[r]) for r in members.values()]),
    )  # fmt: skip


def _largest(norms: FloatArray) -> float:
    """Return the largest norm that is known; inf where none is."""
    known = norms[np.isfinite(norms)]
    return float(known.max()) if len(known) else float("inf")


def _worst_case(
    account: PerInstanceAccountant, *, members: int, kernels: Sequence[tuple[float, float, int]],
    delta: float,
) -> float:  # fmt: skip
    """Return ε of so many rows at the clip bound, by the same bound."""
    if members == 1:
        total = account.worst_case_rdp()
    else:
        total = np.zeros(len(account.orders))
        for noise, rate, steps in kernels:
            if noise == 0.0:
                return float("inf")
            one = group_rdp(
                np.ones(members), noise_multiplier=noise, sample_rate=rate, orders=account.orders
            )
            total = total + steps * np.asarray(one)
    return float(rdp_to_epsilon(total, orders=account.orders, delta=delta)[0])
