"""EnforcedCaps: what instances are clipped to, and what they are charged for it.

Caps per instance, or per instance and output where an OneVsRest head is clipped output by output.
Knows arrays; no ledger, no optimizer and no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray, IntArray
from ..capture.clipping import checked_caps, joint_caps
from ..errors import LedgerError
from .norms import raised


@dataclass(frozen=True, eq=False)
class EnforcedCaps:
    """Caps of the instances of one process.

    Attributes:
        values: Shape (instances,), in units of the clip bound; with `output_bounds`
            (instances, outputs), in units of each output's own.
        output_bounds: As in TrainingKernel.
        rounding: Relative error by which charged caps are raised: clipping to a cap is exact up to
            it.
    """

    values: FloatArray
    output_bounds: tuple[float, ...]
    rounding: float

    @classmethod
    def checked(
        cls,
        caps: npt.ArrayLike | None,
        *,
        num_instances: int,
        output_bounds: Sequence[float],
        rounding: float,
    ) -> Self:
        """Return caps of a whole data set, or raise.

        Args:
            caps: None: Opacus's own clip for everybody.

        Raises:
            ValueError: Not one cap in [0, 1] per instance, or per instance and output.
        """
        values = checked_caps(
            np.ones(num_instances) if caps is None else caps,
            num_instances=num_instances, outputs=len(output_bounds),
        )  # fmt: skip
        return cls(values, tuple(output_bounds), rounding)

    @property
    def joint(self) -> FloatArray:
        """What each instance moves a step by at most, in units of the whole clip bound."""
        return joint_caps(self.values, self.output_bounds) if self.output_bounds else self.values

    @property
    def charged(self) -> FloatArray:
        """The same, raised by what clipping may round."""
        return raised(self.joint, rounding=self.rounding)

    @property
    def of_outputs(self) -> FloatArray | None:
        """The caps, where there are several per instance; else None: a ledger holds them all."""
        return self.values if self.output_bounds else None

    def of(self, rows: IntArray) -> Self:
        """Return the caps of some rows, in their order."""
        return replace(self, values=self.values[rows])

    def within(self, charged: FloatArray) -> FloatArray:
        """Return caps that move a step by no more than a ledger charges, of the same rows.

        A ledger may have smaller caps than these, or budgets of its own: it has the last word.
        """
        if not self.output_bounds:
            return np.minimum(self.values, charged)
        joint = self.joint
        share = np.divide(charged, joint, out=np.ones_like(joint), where=joint > charged)
        return self.values * share[:, None]

    def require_same(self, saved: Any) -> None:
        """Raise if another split of caps over outputs was enforced before.

        A ledger knows how far an instance moves all outputs together; certificates also count which
        of them.

        Raises:
            LedgerError: Says so.
        """
        mine = self.of_outputs
        same = (saved is None) == (mine is None)
        if same and mine is not None:
            theirs = np.asarray(saved, dtype=np.float64)
            same = theirs.shape == mine.shape and bool((theirs == mine).all())
        if not same:
            raise LedgerError(
                "Expected a ledger of the caps per output that this engine clips to, got one of "
                "others. Build the engine with the caps of the training that was saved."
            )
