"""What private training alone already certifies, for any model and any number of steps.

Does not know where its Rényi curve came from; the caller vouches for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..accounting.rdp import rdp_to_epsilon
from .assumptions import Assumption, Context, assumption, checked_context
from .certificate import Certificate


@dataclass(frozen=True, init=False)
class DataProcessingCertificate(Certificate):
    """Unlearning never adds to what the training run itself gave away about the forget set.

    Guarantee: D_α(trained, then K steps on the retain set ‖ retrained, then the same K steps)
        is at most the given rdp at α, for every K >= 0: the later steps are one and the same
        random map of the transcript. Both directions if `two_sided`.

    Args:
        rdp: (orders,) bound on the Rényi divergence, in nats, between the transcripts of training
            with and without the forget set. >= 0, may be inf. Kept as the field `curve`.
        orders: (orders,) Rényi orders, each > 1, strictly increasing.
        two_sided: Whether `rdp` bounds both directions (training with against without, and back).
        context: Codes of further assumptions (`certificates.sentences.CONTEXT`).

    Raises:
        ValueError: A value outside its range, orders not increasing, lengths that differ.
        CertificateError: Free text or an unknown code in context.

    Edge cases of `.rdp` at other orders (first match wins):
        order below the smallest given   its share of (α − 1)D, which is 0 at α = 1
        order above the largest given    inf
        between two given orders         (α − 1)D interpolated linearly; it is convex in α

    Source: data processing inequality, van Erven, Harremoës (2014), arXiv:1206.2459v2, Theorem 9;
        convexity of (α − 1)D: ibid., Corollary 2.

    >>> certificate = DataProcessingCertificate((0.1, 0.3), (2.0, 4.0))
    >>> certificate.rdp([2.0, 3.0], steps=5).round(3)
    array([0.1 , 0.25])
    """

    curve: tuple[float, ...]
    orders: tuple[float, ...]
    two_sided: bool
    context: Context = ()

    # Written out because the argument and the method that every certificate has are both `rdp`.
    def __init__(
        self,
        rdp: Sequence[float],
        orders: Sequence[float],
        two_sided: bool = True,
        *,
        context: Context = (),
    ) -> None:
        """Check the curve and freeze it."""
        grid = _validate.orders(orders)
        if (np.diff(grid) <= 0.0).any():
            raise ValueError(_validate.expected("orders", "to increase strictly", orders))
        curve = _validate.real_array("rdp", rdp, low=0.0, allow_infinite=True)
        _validate.same_length("rdp", curve, "orders", len(grid))
        if not isinstance(two_sided, bool):
            raise TypeError(_validate.expected("two_sided", "to be True or False", two_sided))
        for name, value in (
            ("curve", tuple(curve.tolist())),
            ("orders", tuple(grid.tolist())),
            ("two_sided", two_sided),
            ("context", checked_context(context)),
        ):
            object.__setattr__(self, name, value)

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        return (
            assumption(
                f"training_curve{'_both' if self.two_sided else ''}",
                last_rdp=self.curve[-1],
                last_order=self.orders[-1],
            ),
            assumption("reference_same_unlearning"),
            assumption("retained_data_only"),
            assumption("nothing_else_carried"),
            *self._of_context(),
        )

    def with_context(self, *codes: str | Assumption) -> DataProcessingCertificate:
        """Return the same certificate, which names these `codes` of `context` too."""
        return DataProcessingCertificate(
            self.curve, self.orders, self.two_sided, context=(*self.context, *codes)
        )

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats, the same after any number of steps, shape (orders,)."""
        _validate.integer("steps", steps, low=0)
        asked = _validate.orders(orders)
        grid, curve = np.asarray(self.orders), np.asarray(self.curve)
        right = np.searchsorted(grid, asked, side="left")
        inside = np.minimum(right, len(grid) - 1)
        below, grid_left = np.r_[0.0, (grid - 1.0) * curve], np.r_[1.0, grid]
        weight = (asked - grid_left[inside]) / (grid_left[inside + 1] - grid_left[inside])
        with np.errstate(invalid="ignore"):  # 0·inf: only where the answer is set just below
            scaled = (1.0 - weight) * below[inside] + weight * below[inside + 1]
        result = scaled / (asked - 1.0) * (1.0 + 1e-14)  # a few roundings, upwards
        result[np.isnan(result)] = np.inf
        exact = grid[inside] == asked
        result[exact] = curve[inside[exact]]
        result[right == len(grid)] = np.inf
        return result

    def epsilon(self, *, delta: float, steps: int) -> float:
        """ε of the (ε, δ) statement, the same after any number of steps; from the given orders."""
        delta = _validate.delta(delta)
        curve = self.rdp(self.orders, steps=steps)
        return float(rdp_to_epsilon(curve, orders=self.orders, delta=delta)[0])
