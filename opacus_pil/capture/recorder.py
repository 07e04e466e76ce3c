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
from .draws import Draw
from .indices import BatchTracker

_OUT_OF_STEP = (
    "its physical batches are not the parts of one draw; a loop over Opacus's BatchMemoryManager "
    "was left early or skipped a batch, which opacus_pil.BatchMemoryManager allows"
)


@dataclass(frozen=True)
class StepRecord:
    """What one noisy step saw.

    Attributes:
        indices: Shape (batch,), rows of the data set; None: not known for certain.
        norms: Shape (batch,), float64, unclipped per-sample gradient norms.
        max_grad_norm: Bound that the gradients were clipped to.
        rounding: Machine epsilon of the coarsest dtype behind the norms.
        mismatch: Why `indices` is None, for a warning; empty when they are known.
        draws: Number of draws that may have been summed, so that an instance may be in each: 1
            when `indices` are known.
    """

    indices: IntArray | None
    norms: FloatArray
    max_grad_norm: float
    rounding: float
    mismatch: str = ""
    draws: int = 1


@dataclass(frozen=True)
class _Capture:
    rows: IntArray | None  # of this physical batch; None: not published
    draw: Draw | None  # which draw it is part of; None: not known
    norms: torch.Tensor
    max_grad_norm: float
    dropped: torch.Tensor | None  # rows with cap 0, which took no part
    mismatch: str
    rounding: float  # relative, of the coarsest number behind the norms
    unclaimed: int  # batches that loaders had given since the one before


class Recorder:
    """Collects the norms of the physical batches that make up one noisy step.

    Args:
        tracker: Knows the current batch's rows.
        caps: Maps rows to the caps they are clipped to in the step under way, shape (batch,), in
            units of max_grad_norm; None: no caps.
        caps_rounding: Machine epsilon of the least precise norms that caps may be enforced by.
        rand_on_empty: Opacus replaces an empty draw by one random row, whose norm is nobody's.
        publish: Where the norms are left as `per_sample_gradient_norms`, as ghost clipping does
            by itself: the module or hooks object that Opacus made; None: nowhere.

    Attributes:
        listeners: Called at each noisy step with rows (None: not known) and unclipped norms, those
            of rows that a cap left out included. They may read, not change.
    """

    def __init__(
        self,
        tracker: BatchTracker,
        *,
        caps: Callable[[IntArray], FloatArray] | None = None,
        caps_rounding: float = 1.0,
        rand_on_empty: bool = False,
        publish: Any = None,
    ) -> None:
        self.tracker = tracker
        self.caps = caps
        self.publish = publish
        self.listeners: list[Callable[[IntArray | None, FloatArray], None]] = []
        self.guarded = False  # True once the accounting hook is attached and must stay
        self._caps_rounding = caps_rounding
        self._rand_on_empty = rand_on_empty
        self._captures: list[_Capture] = []

    @property
    def midway(self) -> bool:
        """Whether batches were captured that no step was charged for yet."""
        return bool(self._captures)

    def clear(self) -> None:
        """Forget captured batches whose gradients were dropped without a step."""
        self._captures = []

    def capture(
        self, norms: torch.Tensor, *, max_grad_norm: float, rounding: float | None = None
    ) -> torch.Tensor | None:
        """Keep one physical batch's norms and claim its rows; return the rows' caps, if any.

        Args:
            norms: Shape (batch,), unclipped.
            max_grad_norm: Clip bound in force.
            rounding: Relative rounding of the coarsest number the norms come from; None: theirs.

        Raises:
            UnsupportedError: Caps must be enforced and the batch's rows are not known, or norms are
                too coarse.
        """
        handed_out, unclaimed = self.tracker.handed_out, self.tracker.unclaimed
        rows = self.tracker.claim()
        draw = self.tracker.drawn
        norms = norms.detach()
        coarsest = max(torch.finfo(norms.dtype).eps, rounding or 0.0)
        if self.publish is not None:
            self.publish.per_sample_gradient_norms = norms
        empty = draw is not None and len(draw.rows) == 0
        phantom = self._rand_on_empty and empty and len(norms) == 1
        if phantom:
            norms = norms[:0]
        mismatch = ""
        if rows is None and draw is None:
            mismatch = (
                _OUT_OF_STEP
                if self.tracker.split.active
                else "no loader or batch(indices=...) said which rows the batch holds"
            )
        elif rows is not None and len(rows) != len(norms):
            mismatch = f"the batch has {len(rows)} rows and {len(norms)} gradient norms"
            rows = draw = None
        caps = dropped = None
        if self.caps is not None:
            if handed_out > 1:  # a batch fetched ahead may have the same length
                rows, mismatch = None, f"{handed_out} batches were handed out since the last step"
            if coarsest > self._caps_rounding:
                raise UnsupportedError(
                    "Expected gradients as precise as the parameters under caps, got some rounded "
                    f"to {coarsest:.1g}. Clipping by such norms exceeds a cap by more than what is "
                    "charged for rounding. Leave torch.autocast out of the forward pass."
                )
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
        self._captures.append(
            _Capture(rows, draw, norms, max_grad_norm, dropped, mismatch, coarsest, unclaimed)
        )
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
        norms = _joined([c.norms for c in captures])
        draws = {c.draw for c in captures if c.draw is not None}
        unknown = sum(c.draw is None for c in captures)
        rows, mismatch = None, "no gradient was captured"
        if captures and all(c.rows is not None for c in captures):
            if len(draws) > 1:
                raise UnsupportedError(
                    f"Expected one drawn batch per noisy step, got {len(draws)}. An instance drawn "
                    "into several would be charged for one. Step after every batch, or split large "
                    "batches with opacus_pil.BatchMemoryManager."
                )
            rows, mismatch = np.concatenate([c.rows for c in captures]), ""
        elif captures:
            rows, mismatch = _whole_draw(captures, len(norms))
        unclipped = norms
        if any(c.dropped is not None for c in captures):
            dropped = [c.dropped for c in captures if c.dropped is not None]
            norms = np.where(torch.cat(dropped).cpu().numpy(), 0.0, norms)
        _require_finite(norms, rows)
        for listener in self.listeners:
            listener(rows, unclipped)
        return StepRecord(
            indices=rows,
            norms=norms,
            max_grad_norm=max((c.max_grad_norm for c in captures), default=max_grad_norm),
            rounding=max((c.rounding for c in captures), default=0.0),
            mismatch=mismatch,
            draws=1
            if rows is not None
            else max(len(draws) + unknown, sum(c.unclaimed for c in captures), 1),
        )


def _whole_draw(captures: list[_Capture], size: int) -> tuple[IntArray | None, str]:
    """Return the rows of a draw that Opacus split, if just its pieces were captured."""
    draw = captures[0].draw
    if any(c.mismatch for c in captures):
        return None, next(c.mismatch for c in captures if c.mismatch)
    if (
        draw is None
        or any(c.draw is not draw or c.rows is not None for c in captures)
        or len(draw.rows) != size  # each part is used once: all of them, if the length is right
    ):
        return None, _OUT_OF_STEP
    return np.asarray(draw.rows, dtype=np.int64), ""


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
