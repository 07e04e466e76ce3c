"""What an accountant of Opacus has counted, and which one counts an optimizer's steps.

Knows step hooks and histories of Opacus; no claim and no statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opacus.accountants.accountant import IAccountant

Run = tuple[float, float, int]


@dataclass(frozen=True)
class Hooked:
    """Who counts an optimizer's steps, and at which rate.

    Attributes:
        accountant: None: nobody.
        sample_rate: What each step is charged at; None: not known.
    """

    accountant: Any
    sample_rate: float | None


def accountant_of(optimizer: Any) -> Hooked:
    """Return the accountant behind an optimizer's step hook."""
    accountant, rate = None, None
    for value in _reached(getattr(optimizer, "step_hook", None)):
        if isinstance(value, IAccountant) and accountant is None:
            accountant = value
        elif isinstance(value, float) and not isinstance(value, bool) and rate is None:
            rate = value
    return Hooked(accountant, rate)


def runs_since(before: list[Any], now: list[Any]) -> tuple[Run, ...]:
    """Return what a history has counted since an earlier copy of it was made."""
    runs = [(float(z), float(q), int(n)) for z, q, n in now]
    for index, (z, q, n) in enumerate(before):
        if index >= len(runs) or runs[index][:2] != (z, q) or runs[index][2] < n:
            return tuple(runs)  # rewritten since: what stands there is what is claimed
        runs[index] = (*runs[index][:2], runs[index][2] - n)
    return tuple(run for run in runs if run[2] > 0)


def _reached(hook: Any, depth: int = 0) -> Iterator[Any]:
    """Yield what a hook holds: variables of a closure, arguments of a partial."""
    if hook is None or depth > 6:
        return
    if isinstance(hook, functools.partial):
        for part in (hook.func, *hook.args, *hook.keywords.values()):
            yield from _reached(part, depth + 1)
        return
    closure = getattr(hook, "__closure__", None)
    if closure:
        for cell in closure:
            value = cell.cell_contents
            yield value
            if callable(value) and not isinstance(value, type):
                yield from _reached(value, depth + 1)
