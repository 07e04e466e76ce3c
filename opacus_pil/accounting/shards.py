"""One ledger out of those of two shards: distinct instances that were charged the same steps.

Knows ledgers; whether two accountants really were on the same steps is seen from their sums alone.
Offsets are against prefix sums: shards with other sums are brought to common ones, rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray
from ..errors import LedgerError
from .balances import relative_error
from .filter import PrivacyFilter
from .guarantee import STRONGEST_LABEL, weakest
from .history import History
from .ledger import Ledger

_Part = TypeVar("_Part", PrivacyFilter, History)


def merged(mine: Ledger, theirs: Ledger) -> Ledger:
    """Return the ledger of both shards' instances, ordered by id.

    No repeats may be pending in either, unless they are the same.

    Raises:
        LedgerError: Ids in common, other orders or levels, or other steps.
    """
    mine.require_same_frame(theirs)
    _require_distinct_instances(mine, theirs)
    if not same_sums(mine, theirs):
        mine = _raised_to(mine, theirs.base[-2])
        theirs = _against(theirs, mine)
    _require_same_parts(mine, theirs)
    ids = np.concatenate([mine.instance_ids, theirs.instance_ids])
    order = np.argsort(ids, kind="stable")

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(mine, name), getattr(theirs, name)])[order]

    return replace(
        mine,
        base=mine.base.copy(),
        unattributed=max(mine.unattributed, theirs.unattributed),
        level=joined("level"),
        offset=joined("offset"),
        infinite=joined("infinite"),
        worst_infinite=mine.worst_infinite or theirs.worst_infinite,
        caps=None if mine.caps is None else joined("caps"),
        source=max(mine.source, theirs.source, key=list(STRONGEST_LABEL).index),  # the weaker
        guarantee=weakest([mine.guarantee, theirs.guarantee]),
        reasons=_most(mine.reasons, theirs.reasons),
        instance_ids=ids[order],
        privacy_filter=_both(mine.privacy_filter, theirs.privacy_filter, order),
        history=_both(mine.history, theirs.history, order),
    )


def same_sums(mine: Ledger, theirs: Ledger) -> bool:
    """Whether offsets of both are against the same prefix sums."""
    shared = ("flushes", "repeats", "noise_multiplier", "sample_rate", "steps")
    same = all(getattr(mine, name) == getattr(theirs, name) for name in shared)
    return same and np.array_equal(mine.base, theirs.base)


def settled(ledger: Ledger, table: FloatArray) -> Ledger:
    """Return the same ledger with its repeats of `table` (levels + 1, orders) in the sums."""
    if not ledger.repeats:
        return ledger
    base = ledger.base + ledger.repeats * table
    return replace(
        ledger, base=base, flushes=ledger.flushes + 1, repeats=0, noise_multiplier=0.0,
        sample_rate=0.0,
    )  # fmt: skip


def _require_distinct_instances(mine: Ledger, theirs: Ledger) -> None:
    common = np.intersect1d(mine.instance_ids, theirs.instance_ids)
    if len(common):
        raise LedgerError(
            f"Expected shards of distinct instances, got {len(common)} in common "
            f"(first: {common[0]}). Merge each shard once."
        )


def _require_same_parts(mine: Ledger, theirs: Ledger) -> None:
    for name in ("caps", "privacy_filter", "history"):
        if (getattr(mine, name) is None) != (getattr(theirs, name) is None):
            raise LedgerError(f"Expected {name} in both shards or in neither, got it in one.")


def _against(ledger: Ledger, other: Ledger) -> Ledger:
    """Return `ledger` with offsets against the sums of `other`, rounded up.

    Sums of shards differ by steps whose rows one of them did not know: everyone there paid the
    highest level, at another rate or noise perhaps. Where both have as many such steps their
    highest levels must agree.

    Raises:
        LedgerError: They do not: the shards were charged other steps.
    """
    slack = relative_error(max(ledger.flushes, other.flushes))
    top, expected = ledger.base[-2], other.base[-2]
    differ = bool((np.abs(top - expected) > 2.0 * slack * expected).any())
    if ledger.steps != other.steps or (differ and ledger.unattributed == other.unattributed):
        raise LedgerError(
            f"Expected shards that were charged the same steps, got {other.steps} and "
            f"{ledger.steps} steps or other noise. Charge every shard at every step."
        )
    before, after = ledger.base[ledger.level], other.base[ledger.level]
    error = slack * (before + after + np.abs(ledger.offset))
    shared = ("flushes", "repeats", "noise_multiplier", "sample_rate")
    return replace(
        ledger,
        base=other.base,
        offset=ledger.offset + (before - after) + error,
        **{name: getattr(other, name) for name in shared},
    )


def _raised_to(ledger: Ledger, top: FloatArray) -> Ledger:
    """Return `ledger` on sums whose highest level is at least `top`, charges unchanged.

    A reading never exceeds the highest level: joined shards need that of all of them.
    """
    extra = np.maximum(top - ledger.base[-2], 0.0)
    if not extra.any():
        return ledger
    slack = relative_error(ledger.flushes + 1)
    base = ledger.base.copy()
    base[:-1] += extra
    present = ledger.level != len(ledger.base) - 1
    offset = ledger.offset.copy()
    offset[present] += slack * (extra + np.abs(offset[present])) - extra
    return replace(ledger, base=base, offset=offset, flushes=ledger.flushes + 1)


def _both(mine: _Part | None, theirs: _Part | None, order: npt.NDArray[Any]) -> _Part | None:
    """Return budgets or histories of both shards, which both have them or neither."""
    return None if mine is None or theirs is None else mine.merged(theirs, order)


def _most(mine: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
    """Return the reasons of both shards: steps are the same ones, the larger count holds."""
    return {why: max(mine.get(why, 0), theirs.get(why, 0)) for why in [*mine, *theirs]}
