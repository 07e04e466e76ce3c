"""Which requests run together: all that wait, if they have a plan together, else who has one alone.

Knows requests and sets of rows, and asks for plans; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..plan import UnlearningPlan
from .queue import Request

Planned = tuple[UnlearningPlan | None, str | None]  # the plan, or why there is none
MakePlan = Callable[[frozenset[int]], Planned]  # neither where nothing is left to forget


@dataclass(frozen=True, kw_only=True)
class Together:
    """Requests with one plan.

    Attributes:
        members: The requests, in their order; none: nobody has a plan.
        rows: Rows that they name and that were not forgotten before.
        plan: For these rows; None: there are none.
        refused: Why others have no plan at all, by request id.
    """

    members: tuple[Request, ...] = ()
    rows: frozenset[int] = frozenset()
    plan: UnlearningPlan | None = None
    refused: dict[str, str] = field(default_factory=dict)


def together(
    waiting: Sequence[Request], *, forgotten: frozenset[int], size: int, make_plan: MakePlan
) -> Together:
    """Return requests with one plan, and why others have none at all.

    All of them, if there is a plan for all; else one after the other as long as there is one. Who
    has a plan alone but not with the others waits for the next batch.

    Args:
        waiting: In the order they were submitted.
        forgotten: Rows forgotten so far.
        size: Number of rows of the data set.
        make_plan: Gives the plan for a set of rows.
    """
    members: list[Request] = []
    rows: frozenset[int] = frozenset()
    refused: dict[str, str] = {}
    for request in waiting:
        wrong = _wrong_rows(request, forgotten | rows, size=size)
        if wrong is None:
            members.append(request)
            rows |= frozenset(request.rows) - forgotten
        else:
            refused[request.request_id] = wrong
    plan, reason = make_plan(rows)
    if reason is None or not members:
        return Together(members=tuple(members), rows=rows, plan=plan, refused=refused)
    return _one_by_one(members, forgotten=forgotten, make_plan=make_plan, refused=refused)


def _one_by_one(
    candidates: Sequence[Request],
    *,
    forgotten: frozenset[int],
    make_plan: MakePlan,
    refused: dict[str, str],
) -> Together:
    members: list[Request] = []
    rows: frozenset[int] = frozenset()
    plan: UnlearningPlan | None = None
    for request in candidates:
        own = frozenset(request.rows) - forgotten
        joint, reason = make_plan(rows | own)
        if reason is None:
            members, rows, plan = [*members, request], rows | own, joint
            continue
        if rows:
            _, reason = make_plan(own)
        if reason is not None:
            refused[request.request_id] = reason
    return Together(members=tuple(members), rows=rows, plan=plan, refused=refused)


def _wrong_rows(request: Request, others: frozenset[int], *, size: int) -> str | None:
    """Return why nothing can be forgotten for these rows, whatever the plan."""
    if request.rows[-1] >= size:
        return (
            f"Expected rows in [0, {size - 1}], got {request.rows[-1]}, which the data set "
            "does not have."
        )
    if len(others | frozenset(request.rows)) == size:
        return (
            f"Expected something left to train on, got a request that takes the last of "
            f"{size} rows. Delete the model instead."
        )
    return None
