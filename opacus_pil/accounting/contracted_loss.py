"""What is left at the end of the shifts that an instance caused, when each step shrinks them.

Knows indices, sensitivities and a rate. Does not know what the sensitivities are of, nor whether
the training contracts at all: the rate is the caller's.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray, IntArray

_REASONS = (
    "between visits an instance is charged the sensitivity it was last seen with",
    "the decay per step is declared, not measured",
)


class ContractedLoss:
    """Shift S_T = Σ_t decay^(T−t) · s_t of every instance, from sensitivities last seen.

    The distance that an instance puts between training with and without it, where each step first
    shrinks the distance by `decay` and then adds s_t, a multiple of the instance's clipped norm.
    Predicts how long forgetting takes: K = ln(S_T / S*) / ln(1/decay) steps bring it below S*. A
    step costs time linear in its batch, not in the number of instances.

    Guarantee: none; the label is `estimate`, see `reasons`.

    Args:
        num_instances: Size of the training set, >= 1.
        decay: Factor by which one step shrinks an earlier shift, in (0, 1]. 1 − step size ·
            strong convexity where there is such a thing; else a rate fitted to pilot runs.
        initial: Sensitivity of an instance before its first visit, in [0, 1]. Default: the worst
            case, as `PerInstanceAccountant` has it.

    Attributes:
        steps: Steps seen.
        guarantee: "estimate", always.
        reasons: Why it is no more than that.

    Raises:
        TypeError, ValueError: An argument outside its domain.

    Source: S_T of the convex hull in THEORY 5.2, with one rate and one norm for all steps between
        two visits; there the sum is a geometric one.
    Privacy: everything here depends on private data; it is not private to release.

    >>> loss = ContractedLoss(2, decay=0.5)
    >>> loss.update([0], [0.25])
    >>> loss.update([], [])
    >>> loss.values()
    array([0.375, 1.5  ])
    """

    guarantee = "estimate"
    reasons = _REASONS

    def __init__(self, num_instances: int, *, decay: float, initial: float = 1.0) -> None:
        size = check.integer("num_instances", num_instances, low=1)
        self.decay = check.real("decay", decay, low=0.0, high=1.0, open_low=True)
        self.steps = 0
        self._held = np.full(size, check.probability("initial", initial))
        self._sum = np.zeros(size)  # S at step `_at`
        self._at = np.zeros(size, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self._held)

    def update(self, indices: npt.ArrayLike, sensitivities: npt.ArrayLike) -> None:
        """Take one step: these instances were looked at in it, the others go on as last seen.

        Args:
            indices: Shape (batch,), rows, each once; none for a step that looked at nobody.
            sensitivities: Shape (batch,), min(norm / max_grad_norm, 1) of each, in [0, 1].

        Raises:
            TypeError, ValueError: Rows out of range or repeated, lengths that differ, a
                sensitivity outside [0, 1] (names the first row). Nothing has changed then.
        """
        rows = check.index_array("indices", indices, size=len(self))
        seen = check.real_array(
            "sensitivities", sensitivities, low=0.0, high=1.0, cure="Clip norms first."
        )
        check.same_length("sensitivities", seen, "indices", len(rows))
        self._sum[rows] = self._until(self.steps, rows)
        self._at[rows] = self.steps
        self._held[rows] = seen
        self.steps += 1

    def values(self) -> FloatArray:
        """Return S_T, shape (instances,), in units of the step's shift at sensitivity 1.

        Edge cases (first match wins):
            no step yet     0
            decay = 1       the plain sum of sensitivities
        """
        return self._until(self.steps, np.arange(len(self)))

    def _until(self, step: int, rows: IntArray) -> FloatArray:
        """Return S of some rows at a step, their sensitivities held since they were seen."""
        gone = (step - self._at[rows]).astype(np.float64)
        if self.decay == 1.0:
            return np.asarray(self._sum[rows] + gone * self._held[rows])
        log_kept = gone * math.log(self.decay)
        added = np.expm1(log_kept) / (self.decay - 1.0)  # 1 + c + … + c^(gone − 1)
        return np.asarray(np.exp(log_kept) * self._sum[rows] + added * self._held[rows])
