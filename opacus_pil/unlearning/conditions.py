"""Condition: one thing that the proof of contraction needs of a run, met or not, with its cure.

Knows words; what is looked at is `glm.py` and `feature_norm.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..errors import CertificateError


class Condition(NamedTuple):
    """An assumption of contraction, held against a run.

    Attributes:
        holds: Whether it is met.
        domain: What is needed.
        found: What there is.
        cure: What to do about it.
    """

    holds: bool
    domain: str
    found: str
    cure: str


def require_contracting(conditions: Iterable[Condition]) -> None:
    """Raise at the first condition that is not met.

    Raises:
        CertificateError: With its words.
    """
    for one in conditions:
        if not one.holds:
            raise CertificateError(
                f"Expected {one.domain} for a contraction certificate, got {one.found}. {one.cure}"
            )
