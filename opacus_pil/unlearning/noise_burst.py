"""The noise of a run's first step: as much more than training's as a target takes in so many steps.

Knows certificates of contraction; no model.
"""

from __future__ import annotations

from ..certificates import ContractionCertificate
from ..certificates.burst import with_burst
from ..errors import CertificateError

# A burst shows how much the forget set weighs, as a number of steps does: it is rounded up to a
# public grid, a tenth apart.
_GRID = 1.1
_MOST = 200  # grid points: a factor 1.9e8


def least_burst(
    certificate: ContractionCertificate, *, epsilon: float, delta: float, steps: int
) -> float:
    """Return the least noise of the first step, in units of the others', that reaches a target.

    Why the first: once training is over nothing is shifted any more, and what hides the distance
    is Σ c^(2(K−t))·ζ_t² whichever step it is added at; the later steps see the retained data, and
    undo what noise did to the model at least as fast as they bring two models together.

    Args:
        certificate: Of the training, with steps all alike.
        epsilon, delta: Target.
        steps: Of unlearning, >= 1.

    Returns:
        1.1^k with the smallest k >= 0.

    Raises:
        CertificateError: No noise within a factor 10^8 is enough.
    """

    def reached(power: int) -> bool:
        found = with_burst(certificate, _GRID**power).epsilon(delta=delta, steps=steps)
        return found <= epsilon

    if not reached(_MOST):
        raise CertificateError(
            f"Expected a target that noise in the first of {steps} steps reaches, got "
            f"epsilon={epsilon:g} at delta={delta:g}. Relax the target, or retrain."
        )
    low, high = -1, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return float(_GRID**high)
