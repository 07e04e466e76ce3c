"""What one noisy step saw: rows and gradient norms, collected while Opacus clips.

Knows rows, norms and caps of the current step; no optimizer and no accountant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._validate import FloatArray, IntArray
from ..errors import UnsupportedError
from .indices import BatchTracker


@dataclass(frozen=True)
class StepRecord:
    """What one noisy step saw.

    Attributes:
        indices: Shape (batch,), rows of the data set; None: not known for certain.
        norms: Shape (batch,), float64, unclipped per-sample gradient norms.
        max_grad_norm: Bound that the gradients were clipped to.
        rounding: Machine epsilon of the dtype the norms were computed in.
        mismatch: Why `indices` is None, for a warning; empty when they are known.
    """

    indices: IntArray | None
    norms: FloatArray
    max_grad_norm: float
    rounding: float
    mismatch: str = ""


@dataclass(frozen=True)
class _Capture:
    rows: IntArray | None
    norms: torch.Tensor
    max_grad_norm: float
    dropped: torch.Tensor | None  # rows with cap 0, which took no part
    mismatch: str


class Recorder:
    """Collects the norms of the physical batches that make up one noisy step.

    Args:
        tracker: Knows the current batch's rows.
        caps: Maps rows to the caps they are clipped to in the step under way, shape (batch,), in
            units of max_grad_norm; None: no caps.
        rand_on_empty: Opacus replaces an empty draw by one random row, whose norm is nobody's.
        publish: Where the norms are left as `per_sample_gradient_norms`, as ghost clipping does
            by itself: the module or hooks object that Opacus made; None: nowhere.
    """

    def __init__(
        self,
        tracker: BatchTracker,
        *,
        caps: Callable[[IntArray], FloatArray] | None = None,
        rand_on_empty: bool = False,
        publish: Any = None,
    ) -> None:
        self.tracker = tracker
        self.caps = caps
        self.publish = publish
        self.guarded = False  # True once the accounting hook is attached and must stay
        self._rand_on_empty = rand_on_empty
        self._captures: list[_Capture] = []

    @property
    def midway(self) -> bool:
        """Whether batches were captured that no step was charged for yet."""
        return bool(self._captures)

    def clear(self) -> None:
        """Forget captured batches whose gradients were dropped without a step."""
        self._captures = []

    def capture(self, norms: torch.Tensor, *, max_grad_norm: float) -> torch.Tensor | None:
        """Keep one physical batch's norms and claim its rows; return the rows' caps, if any.

        Raises:
            UnsupportedError: Caps must be enforced and the batch's rows are not known.
        """
        handed_out = self.tracker.handed_out
        rows = self.tracker.claim()
        norms = norms.detach()
        if self.publish is not None:
            self.publish.per_sample_gradient_norms = norms
        if rows is not None and self._rand_on_empty and len(rows) == 0 and len(norms) == 1:
            norms, phantom = norms[:0], True
        else:
            phantom = False
        mismatch = ""
        if rows is None:
            mismatch = "no loader or batch(indices=...) said which rows the batch holds"
        elif len(rows) != len(norms):
            mismatch = f"the batch has {len(rows)} rows and {len(norms)} gradient norms"
            rows = None
        caps = dropped = None
        if self.caps is not None:
            if handed_out > 1:  # a batch fetched ahead may have the same length
                rows, mismatch = None, f"{handed_out} batches were handed out since the last step"
            if rows is None:
                raise UnsupportedError(
                    "Expected the rows of this batch to be known, since each has its own cap, but "
                    f"{mismatch}. Step once on each batch of the private loader, or wrap the step "
                    "in engine.batch(indices=...)."
                )
            if phantom:
                caps = torch.ones(1, device=norms.device, dtype=norms.dtype)
            else:
                caps = torch.as_tensor(self.caps(rows), device=norms.device, dtype=norms.dtype)
                dropped = caps == 0
        self._captures.append(_Capture(rows, norms, max_grad_norm, dropped, mismatch))
        return caps

    def take(self, *, max_grad_norm: float) -> StepRecord:
        """Return what the step saw and start the next one.

        Args:
            max_grad_norm: Clip bound to report if nothing was captured.

        Raises:
            ValueError: A norm is not finite; names the first instance.
            UnsupportedError: Several drawn batches were summed into one noisy step.
        """
        captures, self._captures = self._captures, []
        known = [c for c in captures if c.rows is not None]
        if len(captures) > 1 and known:
            raise UnsupportedError(
                f"Expected one drawn batch per noisy step, got {len(captures)}. An instance drawn "
                "into several would be charged for one. Step after every batch."
            )
        rows = captures[0].rows if known else None
        norms = _joined([c.norms for c in captures])
        if captures and captures[0].dropped is not None:
            norms = np.where(captures[0].dropped.cpu().numpy(), 0.0, norms)
        _require_finite(norms, rows)
        return StepRecord(
            indices=rows,
            norms=norms,
            max_grad_norm=max((c.max_grad_norm for c in captures), default=max_grad_norm),
            rounding=max((torch.finfo(c.norms.dtype).eps for c in captures), default=0.0),
            mismatch=captures[0].mismatch if captures else "no gradient was captured",
        )


def _joined(parts: list[torch.Tensor]) -> FloatArray:
    if not parts:
        return np.empty(0)
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return together.to("cpu", torch.float64).numpy()


def _require_finite(norms: FloatArray, rows: IntArray | None) -> None:
    if not np.isfinite(norms).all():
        bad = np.flatnonzero(~np.isfinite(norms))
        first = int(bad[0])
        who = f"instance {int(rows[first])}" if rows is not None else f"batch position {first}"
        raise ValueError(
            f"Expected finite per-sample gradient norms, got {len(bad)} of {len(norms)} not finite "
            f"(first: {who}). A non-finite gradient cannot be clipped; check its loss."
        )
