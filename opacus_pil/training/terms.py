"""Terms: what an account is kept by, before any instance is known; Ready: and once one is.

Knows arguments of an engine; no ledger's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from ..accounting import PerInstanceAccountant
from ..accounting.filter import checked_budget
from ..accounting.instance_ids import InstanceIds
from ..capture.shards import Shard
from .charger import Charger
from .enforced_caps import EnforcedCaps
from .policies import DEFAULT, NormPolicy, policy_of
from .support import Asked

_FLOAT32 = float(np.finfo(np.float32).eps)


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
        groups: npt.ArrayLike | None = None,
    ) -> Self:
        """Return the terms that these arguments of an engine ask for.

        Raises:
            TypeError, ValueError: Arguments that do not fit each other.
        """
        ids = InstanceIds(instance_ids, groups=groups)
        if groups is not None and budget is not None:
            raise ValueError(
                "Expected groups or budget, got both. A budget limits rows, and a person's rows "
                "together may exceed it: leave one out."
            )
        if budget is not None:
            checked_budget(budget)
        policy = policy_of(
            DEFAULT if norm_policy is None else norm_policy,
            refresh_every=refresh_every, caps=caps, budget=budget,
        )  # fmt: skip
        return cls(
            policy, norm_policy is not None, tuple(check.orders(orders).tolist()),
            check.integer("levels", levels, low=2), budget, history or groups is not None, ids,
        )  # fmt: skip

    @property
    def shared(self) -> tuple[Any, ...]:
        """What ledgers must share to be joined, beside the charges."""
        budgeted = self.budget is not None
        return self.orders, self.levels, self.policy.refresh_every, self.history, budgeted

    def opened(
        self,
        asked: Asked,
        *,
        instances: int,
        shard: Shard | None,
        policy: NormPolicy,
        caps: npt.ArrayLike | None,
    ) -> Ready:
        """Return what charges the first training, of instances that nobody has charged before.

        Args:
            asked: The arguments of make_private.
            instances: Of this process.
            shard: Which they are; None: all of the data set.
            policy: Of the training.
            caps: Of the whole data set, with a policy that enforces them; None: Opacus's clip.

        Raises:
            UnsupportedError, ValueError: Caps or budgets that do not fit the training.
        """
        enforced, budget = None, self.budget
        if policy.enforced:
            asked.require_caps_of_outputs()
            enforced = EnforcedCaps.checked(
                caps, num_instances=asked.size, output_bounds=asked.output_bounds,
                rounding=max(_FLOAT32, asked.cap_rounding),
            )  # fmt: skip
            if shard is not None:
                enforced, budget = enforced.of(shard.rows), shard_of_budget(budget, shard)
        accountant = PerInstanceAccountant(
            instances,
            orders=self.orders,
            levels=self.levels,
            max_sensitivity=math.hypot(1.0, asked.released_count),
            caps=None if enforced is None else enforced.charged,
            budget=budget,
            history=self.history,
            instance_ids=self.ids.array if shard is None else shard.rows,
        )
        return Ready(Charger(accountant, policy=policy), policy, enforced)


@dataclass(frozen=True)
class Ready:
    """What an account will charge a training by, once it has been made private.

    Attributes:
        charger: Charges the per-instance ledger.
        policy: Of the training.
        enforced: What this process's instances are clipped to; None: not to caps.
    """

    charger: Charger
    policy: NormPolicy
    enforced: EnforcedCaps | None


def shard_of_budget(budget: Any, shard: Shard) -> Any:
    """Return the part of a budget that belongs to a shard; one for everybody stays as it is."""
    target, delta = budget if isinstance(budget, tuple) else (budget, None)
    if target is None or np.ndim(target) == (0 if delta is not None else 1):
        return budget
    values = np.asarray(target)
    check.same_length("budget", values, "instances", shard.num_instances)
    return values[shard.rows] if delta is None else (values[shard.rows], delta)
