"""Verdict: what may be claimed for one step, by the table of `evidence.py`.

Knows facts and rows of the table; no torch and no accountant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..accounting.guarantee import weakest
from ..capture.recorder import Fact
from .evidence import BEST, rows_of


@dataclass(frozen=True)
class Verdict:
    """What may be claimed for one step.

    Attributes:
        label: The strongest that the evidence carries.
        reasons: Why not a stronger one, a sentence each; of "bound" what it takes for granted.
        codes: Of the facts behind it.
        unamplified: Charge the step as if everybody had been in it.
        unbounded: Charge everybody infinitely.
        broken: Why caps and budgets would not hold; "": they do.
        chosen: Whether nothing takes the label away but what the caller chose.
    """

    label: str
    reasons: tuple[str, ...]
    codes: tuple[str, ...]
    unamplified: bool
    unbounded: bool
    broken: str
    chosen: bool


def judged(policy: str, facts: Iterable[Fact]) -> Verdict:
    """Return what may be claimed for a step under a policy, given what was seen of it.

    Guarantee: the label is the weakest of the policy's best and of what each fact leaves.

    Raises:
        KeyError: A fact that the table does not know: ours to mend.
    """
    label, own = BEST[policy]
    reasons, codes, broken = ([own] if own else []), [], ""
    unamplified, unbounded, chosen = False, False, True
    for fact in facts:
        rows = rows_of(fact.code)
        found = next((row for row in rows if row.concerns(policy)), None)
        codes.append(fact.code)
        if found is None:
            continue
        words = found.words.format(detail=fact.detail)
        label = weakest([label, found.leaves])
        reasons.append(words)
        unamplified |= found.unamplified
        unbounded |= found.unbounded
        chosen &= found.chosen or found.leaves == "bound"
        if found.breaks_caps and not broken:
            broken = words
    return Verdict(
        label, tuple(dict.fromkeys(reasons)), tuple(dict.fromkeys(codes)), unamplified, unbounded,
        broken, chosen,
    )  # fmt: skip


def joined(policy: str, verdict: Verdict, facts: Iterable[Fact]) -> Verdict:
    """Return a verdict with some more facts, which were found later."""
    more = judged(policy, facts)
    return Verdict(
        weakest([verdict.label, more.label]),
        tuple(dict.fromkeys([*verdict.reasons, *more.reasons])),
        tuple(dict.fromkeys([*verdict.codes, *more.codes])),
        verdict.unamplified or more.unamplified,
        verdict.unbounded or more.unbounded,
        verdict.broken or more.broken,
        verdict.chosen and more.chosen,
    )


def uncertifiable(codes: Iterable[str], *, policy: str) -> str | None:
    """Return why no certificate can rest on a ledger with these facts; None: nothing speaks so."""
    for code in codes:
        for row in rows_of(code):
            if row.concerns(policy) and not row.certifiable:
                return row.words.replace("{detail}", "see the ledger's reasons")
    return None
