"""Terms: what an account is kept by, before any instance is known; Ready: and once one is.

Knows arguments of an engine; no ledger's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray
from ..accounting.instance_ids import InstanceIds
from ..capture.shards import Shard
from .charger import Charger
from .policies import DEFAULT, NormPolicy, policy_of


@dataclass(frozen=True)
class Terms:
    """What an account is kept by, before any instance is known.

    Attributes:
        policy: How a step is charged.
        named: Whether the caller named it; else it follows the kind of batches.
        orders: Rényi orders of the per-instance ledger.
        levels: Number of sensitivities it tells apart.
        budget: As in PerInstanceAccountant; None: none.
        history: As in PerInstanceAccountant.
        ids: Of the data set's rows.
    """

    policy: NormPolicy
    named: bool
    orders: tuple[float, ...]
    levels: int
    budget: Any
    history: bool
    ids: InstanceIds

    @classmethod
    def checked(
        cls,
        norm_policy: str | None,
        *,
        refresh_every: int | None,
        orders: Sequence[float],
        levels: int,
        caps: npt.ArrayLike | None,
        budget: Any,
        history: bool,
        instance_ids: npt.ArrayLike | None,
    ) -> Self:
        """Return the terms that these arguments of an engine ask for.

        Raises:
            TypeError, ValueError: Arguments that do not fit each other.
        """
        ids = InstanceIds(instance_ids)
        policy = policy_of(
            DEFAULT if norm_policy is None else norm_policy,
            refresh_every=refresh_every, caps=caps, budget=budget,
        )  # fmt: skip
        return cls(
            policy, norm_policy is not None, tuple(check.orders(orders).tolist()),
            check.integer("levels", levels, low=2), budget, history, ids,
        )  # fmt: skip

    @property
    def shared(self) -> tuple[Any, ...]:
        """What ledgers must share to be joined, beside the charges."""
        budgeted = self.budget is not None
        return self.orders, self.levels, self.policy.refresh_every, self.history, budgeted


@dataclass(frozen=True)
class Ready:
    """What an account will charge a training by, once it has been made private.

    Attributes:
        charger: Charges the per-instance ledger.
        policy: Of the training.
        caps: What this process's instances are clipped to; None: not to caps.
        cap_rounding: Relative error by which charged caps are raised.
    """

    charger: Charger
    policy: NormPolicy
    caps: FloatArray | None
    cap_rounding: float


def shard_of_budget(budget: Any, shard: Shard) -> Any:
    """Return the part of a budget that belongs to a shard; one for everybody stays as it is."""
    target, delta = budget if isinstance(budget, tuple) else (budget, None)
    if target is None or np.ndim(target) == (0 if delta is not None else 1):
        return budget
    values = np.asarray(target)
    check.same_length("budget", values, "instances", shard.num_instances)
    return values[shard.rows] if delta is None else (values[shard.rows], delta)
