"""ServedRun: what a page needs of a run of this process.

Knows a plan and hashes; no model, and no page (the extra `report` need not be there).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...certificates import Certificate
from ..plan import UnlearningPlan
from ..result import CertifiedResult, UnlearningResult


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """What a page needs of a run, and no model: that of a run before knows who asked later.

    Attributes:
        plan, steps, certificate, epsilon: As in UnlearningResult.
        model_before, model_after: `model_hash` before and after; None where nothing is certified.
    """

    plan: UnlearningPlan
    steps: int
    certificate: Certificate | None
    epsilon: float | None
    model_before: str | None
    model_after: str | None

    @classmethod
    def of(cls, done: UnlearningResult) -> ServedRun:
        """Return what is kept of a result."""
        hashed = done if isinstance(done, CertifiedResult) else None
        return cls(
            plan=done.plan,
            steps=done.steps,
            certificate=done.certificate,
            epsilon=done.epsilon,
            model_before=hashed.model_before if hashed else None,
            model_after=hashed.model_after if hashed else None,
        )
