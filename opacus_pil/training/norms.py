"""KnownNorms: the gradient norm that each instance was last seen with, and what is charged for it.

Knows arrays; no policy, no accountant and no label.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray, IntArray

# Float32 norms err by a few units in the last place; charged sensitivities are raised by as many.
ROUNDING_STEPS = 16


def raised(values: FloatArray, *, rounding: float) -> FloatArray:
    """Raise sensitivities by a few rounding errors, to at most 1; exact zeros stay zero."""
    return np.minimum(values * (1.0 + ROUNDING_STEPS * rounding), 1.0)


class KnownNorms:
    """Norms of a training's instances, in units of a clip bound that may follow a schedule.

    Args:
        size: Number of instances.

    Attributes:
        seen: Shape (instances,), inf where nothing was seen yet; None: of nobody.
        rounding: Relative rounding error of the norms.
        max_grad_norm: Clip bound of the last step; 0 before it.
        released_count: Shift of the count that adaptive clipping releases, in units of the noise on
            gradients; 0: none is released.
    """

    def __init__(self, size: int) -> None:
        self.seen: FloatArray | None = None
        self.rounding = 0.0
        self.max_grad_norm = 0.0
        self.released_count = 0.0
        self._size = size

    def all(self) -> FloatArray:
        """Return the norms, to be written to."""
        if self.seen is None:
            self.seen = np.full(self._size, np.inf)
        return self.seen

    def note(self, rows: IntArray, norms: npt.NDArray[np.floating]) -> FloatArray:
        """Remember norms of some rows; return them with inf in place of what is not a number."""
        finite: FloatArray = np.where(np.isfinite(norms), norms, np.inf)
        self.all()[rows] = finite
        return finite

    def drop(self, rows: IntArray) -> None:
        """Forget what was measured of these rows."""
        if self.seen is not None:
            self.seen[rows] = np.inf

    def sensitivities(self, norms: FloatArray, *, top: float) -> FloatArray:
        """Return what instances with such norms move a step by, in units of the clip bound.

        Args:
            norms: Shape (rows,).
            top: Largest sensitivity that the ledger tells apart.
        """
        bound = self.max_grad_norm
        gradient = raised(np.minimum(norms, bound) / bound, rounding=self.rounding)
        if not self.released_count:
            return gradient
        # Gradient and count are released with independent noise: one vector, one joint shift.
        return np.minimum(np.hypot(gradient, self.released_count), top)
