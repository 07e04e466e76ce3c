"""A lower bound on ε, with everything it rests on. Knows numbers; no scores and no claim.

"An ε as small as this is refuted", never "the training is private": a bound of 0 says only that
this design saw nothing, which is why its ceiling and smallest detectable ε stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import _validate as check
from ..accounting.shown import rounded_down

ASSUMPTIONS = ("none", "independent by construction", "assumes independence")


@dataclass(frozen=True)
class LowerBound:
    """A lower confidence bound on the ε of a training.

    Guarantee: if the assumption holds and the condition is met, `epsilon` exceeds the training's ε
        at δ in at most 1 − confidence of all audits (over the coins of the canaries and the
        training's own randomness). One bound at one level: of several, the largest has no such
        confidence.

    Attributes:
        epsilon: In nats, >= 0; may be inf.
        delta: δ of the (ε, δ) statement.
        confidence: In (0, 1).
        method: Which bound, in words.
        assumption: "none": canaries may depend on each other in any way;
            "independent by construction": their noise is claimed to be independent, entry by entry;
            "assumes independence": nobody makes sure of it, so never in a verdict.
        condition: What must hold besides, a half sentence; empty: nothing.
        ceiling: What the bound would be if every guess had been right.
        smallest_detectable: Smallest ε at which the median audit of this design finds more than 0;
            None: not known.
        null_share: Share of permutations of the coins for which the bound is above 0: at most about
            1 − confidence, or something is wrong with the scores; None: not computed.
        right, guesses, canaries: What was counted.
        p_value: Of the claim that the bound was made against; None: made against none.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    assumption: str
    condition: str = ""
    ceiling: float = math.inf
    smallest_detectable: float | None = None
    null_share: float | None = None
    right: int = 0
    guesses: int = 0
    canaries: int = 0
    p_value: float | None = None

    def __post_init__(self) -> None:
        """Refuse an assumption that is not one of the three."""
        check.choice("assumption", self.assumption, ASSUMPTIONS)

    @property
    def for_verdict(self) -> bool:
        """Whether the bound may take part in a verdict."""
        return self.assumption != "assumes independence"

    def to_json(self) -> dict[str, Any]:
        """Return plain types; an infinite number becomes the text "inf"."""
        return plain(vars(self))

    def __str__(self) -> str:
        """Say the bound in one line."""
        under = f", if {self.condition}" if self.condition else ""
        return (
            f"ε ≥ {rounded_down(self.epsilon)} at δ = {self.delta:g} "
            f"({self.method}, {self.confidence:.0%}; assumption: {self.assumption}{under}; "
            f"ceiling {self.ceiling:.3g})"
        )


def plain(value: Any) -> Any:
    """Return a value in types that JSON knows: containers copied, numbers as Python's own."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "to_json"):
        return value.to_json()
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
