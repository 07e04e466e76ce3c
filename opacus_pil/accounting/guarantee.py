"""The four things a per-instance number can claim, from the strongest to the weakest.

bound                holds for the mechanism before it runs
expectation_bound    a theorem over several independent runs, with a confidence
output_specific      exact for the run that happened, not an a-priori guarantee
estimate             something was stale, missing or nominal: for ranking and planning only
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .._validate import FloatArray, choice

GUARANTEES = ("bound", "expectation_bound", "output_specific", "estimate")

# Where the levels come from decides what a step may claim: constants or caps fixed before the run;
# caps enforced but chosen during it; a full pass at this very step; anything older or partial;
# nobody, between fixed batches.
STRONGEST_LABEL = {
    "fixed": "bound",
    "enforced": "output_specific",
    "measured": "output_specific",
    "stale": "estimate",
    "absent": "estimate",
}


def weakest(labels: Iterable[str]) -> str:
    """Return what a number may claim that was put together from numbers with these labels."""
    ranks = [GUARANTEES.index(choice("guarantee", label, GUARANTEES)) for label in labels]
    return GUARANTEES[max(ranks, default=0)]


@dataclass(frozen=True)
class PerInstanceEpsilon:
    """ε of every instance asked for, with what it may claim.

    Attributes:
        epsilon: Shape (n,), in nats; may be inf.
        order: Shape (n,), the Rényi order each ε was read at.
        delta: The δ of the (ε, δ) statement.
        guarantee: "bound", "expectation_bound", "output_specific" or "estimate".
        reasons: Why not a stronger label, a sentence each; of "bound" what it takes for granted
            without a check.

    Privacy: each value depends on private data; see the README before you show it to anyone.
    """

    epsilon: FloatArray
    order: FloatArray
    delta: float
    guarantee: str
    reasons: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.epsilon)
