"""The instances that a training gave away most of, with a tight ε beside their Rényi one.

Knows accounts; no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..accounting import PerInstanceAccountant, PerInstanceEpsilon


@dataclass(frozen=True)
class Exposed:
    """One of the most exposed instances.

    Attributes:
        row: Of the data set.
        instance_id: The caller's id of it.
        epsilon: By the account, in nats.
        tight_epsilon: By privacy loss distributions, never above; None: the account keeps no
            levels, or the composed steps are too many to be worth it.
        tied: How many instances have the same ε, itself included.
    """

    row: int
    instance_id: Any
    epsilon: float
    tight_epsilon: float | None
    tied: int


def most_exposed(
    account: PerInstanceAccountant, spent: PerInstanceEpsilon, *, count: int
) -> tuple[Exposed, ...]:
    """Return the instances with the largest ε, ties by row.

    Both numbers have the label of the account: a tight ε of estimated norms is an estimate.

    Args:
        account: With history, for the tight ε.
        spent: Everyone's ε by the account.
        count: How many.

    Raises:
        ImportError: dp-accounting is missing and the account keeps levels.
    """
    order = np.argsort(-spent.epsilon, kind="stable")[:count]
    found, tight = [], dict[bytes, float]()
    for row in order.tolist():
        value = None
        if account.keeps_history:
            key = account.rdp([row]).tobytes()  # equal levels at every step cost once
            if key not in tight:
                tight[key] = float(account.tight_epsilon([row], delta=spent.delta).epsilon[0])
            value = tight[key]
        epsilon = float(spent.epsilon[row])
        found.append(
            Exposed(
                row=int(row), instance_id=account.instance_ids[row].item(), epsilon=epsilon,
                tight_epsilon=value, tied=int((spent.epsilon == epsilon).sum()),
            )
        )  # fmt: skip
    return tuple(found)
