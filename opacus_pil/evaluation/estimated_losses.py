"""Privacy losses that are estimates: their values, the clip they are under, and why no more.

Knows norms and a clipping bound; which divergence they are summed to is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray

MEDIAN = "median"
HELD = "norms are held between the passes that measured them"


@dataclass(frozen=True)
class EstimatedLosses:
    """One privacy loss per instance, for ranking and planning only; an array to numpy.

    Attributes:
        values: Shape (instances,), nats.
        max_grad_norm: Bound that the norms were clipped at; None: they were taken as they are.
        reasons: Why the label is no more than an estimate, in sentences.
        guarantee: "estimate", always.

    Privacy: depends on private data; not private to release.
    """

    values: FloatArray
    max_grad_norm: float | None
    reasons: tuple[str, ...]
    guarantee: str = "estimate"

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return the values, as numpy asks for them."""
        return np.array(self.values, dtype=dtype) if copy else np.asarray(self.values, dtype=dtype)


@dataclass(frozen=True)
class ClippedNorms:
    """Norms under a clipping bound.

    Attributes:
        norms: Shape of what was given, none above `max_grad_norm`.
        max_grad_norm: The bound; None: nothing was clipped.
        reasons: What the bound's origin, or its absence, takes from a loss.
    """

    norms: FloatArray
    max_grad_norm: float | None
    reasons: tuple[str, ...]


def clip_norms(norms: FloatArray, *, max_grad_norm: float | str | None) -> ClippedNorms:
    """Clip norms at a bound, or at one that they choose themselves.

    Args:
        norms: Any shape, >= 0; NaN is passed on and takes no part in a median.
        max_grad_norm: A bound > 0 that the caller knows, in the unit of the norms; "median": the
            median of all norms, a rule that reads private data; None: no clipping.

    Raises:
        TypeError, ValueError: Another rule, a bound that is not > 0, or a median of 0.

    Source: THEORY 12: unclipped sums follow the early peaks, where everyone's gradient is large.

    >>> clip_norms(np.array([1.0, 2.0, 9.0]), max_grad_norm="median").norms
    array([1., 2., 2.])
    """
    if max_grad_norm is None:
        return ClippedNorms(norms, None, ("norms are not clipped: no DP-SGD has such steps",))
    if isinstance(max_grad_norm, str):
        check.choice("max_grad_norm", max_grad_norm, (MEDIAN,), "Or pass a bound.")
        middle = float(np.nanmedian(norms)) if not np.isnan(norms).all() else 0.0
        if middle <= 0.0:
            raise ValueError(
                "Expected norms with a median > 0 for max_grad_norm='median', got "
                f"{middle:g}. Pass a bound."
            )
        reason = "the clipping bound is the median of all norms, which are private data"
        return ClippedNorms(np.minimum(norms, middle), middle, (reason,))
    bound = check.real("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
    return ClippedNorms(np.minimum(norms, bound), bound, ())
