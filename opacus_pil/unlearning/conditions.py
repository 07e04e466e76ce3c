"""Condition: one thing that the proof of contraction needs of a run, met or not, with its cure.

Knows words; what is looked at is `glm.py`, `linear_model.py` and `feature_norm.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..errors import CertificateError, OpacusPilError


class Condition(NamedTuple):
    """An assumption of contraction, held against a run.

    Attributes:
        holds: Whether it is met.
        domain: What is needed.
        found: What there is.
        cure: What to do about it.
        error: In other words, where somebody else has looked.
    """

    holds: bool
    domain: str
    found: str
    cure: str
    error: OpacusPilError | None = None


def looked_at(domain: str, look: Callable[[], object]) -> Condition:
    """Return the condition that a look does not raise.

    Args:
        domain: What is needed.
        look: Raises an error of this package where it is not.
    """
    try:
        look()
    except OpacusPilError as error:
        return Condition(False, domain, "", "", error)
    return Condition(True, domain, "", "")


def reading(message: str) -> str:
    """Return an error as a line of a list: what is needed, what there is, the cure."""
    return re.sub(r"^Expected ", "needs ", message)


def short_reading(message: str) -> str:
    """Return the same for a cell of a table, without the cure."""
    return re.split(r"\. (?=[A-Z])", reading(message), maxsplit=1)[0].removesuffix(".")


def require_contracting(conditions: Iterable[Condition]) -> None:
    """Raise at the first condition that is not met; the ones after it are not looked at.

    Raises:
        CertificateError: With its words.
    """
    for one in conditions:
        if one.error is not None:
            raise one.error
        if not one.holds:
            raise CertificateError(
                f"Expected {one.domain} for a contraction certificate, got {one.found}. {one.cure}"
            )
