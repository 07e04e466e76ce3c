"""Per-sample gradient norms out of Opacus's optimizers, at no extra pass over the gradients.

Opacus computes every norm and throws it away; the optimizers here keep it. Knows rows and norms of
the current step, no accountant.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from .._validate import FloatArray, IntArray
from ..errors import UnsupportedError
from .clipping import clip_factors
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
        caps: Shape (instances,), enforced per-instance caps in units of max_grad_norm, or None.
        rand_on_empty: Opacus replaces an empty draw by one random row, whose norm is nobody's.
        ghost_module: Where ghost clipping leaves its norms; None in hooks mode.
    """

    def __init__(
        self,
        tracker: BatchTracker,
        *,
        caps: FloatArray | None = None,
        rand_on_empty: bool = False,
        ghost_module: Any = None,
    ) -> None:
        self.tracker = tracker
        self.caps = caps
        self.ghost_module = ghost_module
        self.guarded = False  # True once the accounting hook is attached and must stay
        self._rand_on_empty = rand_on_empty
        self._captures: list[_Capture] = []

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
                caps = torch.as_tensor(self.caps[rows], device=norms.device, dtype=norms.dtype)
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


class _Recording:
    """What both recording optimizers share. Mixed in before the Opacus class."""

    recorder: Recorder

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Attach a hook; once privacy is accounted, add it after the accounting, with a warning."""
        if not self.recorder.guarded:
            super().attach_step_hook(fn)  # type: ignore[misc]
            return
        warnings.warn(
            "attach_step_hook would have replaced the hook that counts privacy loss; the new hook "
            "was added after it.",
            stacklevel=2,
        )
        self.step_hook: Callable[[Any], None] = functools.partial(_chain, self.step_hook, fn)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients as Opacus does, and the captures that belonged to them."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        if not self._is_last_step_skipped:  # type: ignore[attr-defined]
            self.recorder.clear()


def _chain(first: Callable[[Any], None], second: Callable[[Any], None], optimizer: Any) -> None:
    first(optimizer)
    second(optimizer)


class RecordingDPOptimizer(_Recording, DPOptimizer):
    """Opacus's DPOptimizer, keeping the norms it clips by and enforcing per-instance caps."""

    def clip_and_accumulate(self) -> None:
        """Clip and sum with Opacus's arithmetic, bit for bit, keeping the norms."""
        samples = self.grad_samples
        if len(samples[0]) == 0:
            norms = torch.zeros((0,), device=samples[0].device)
        else:
            per_param = [g.reshape(len(g), -1).norm(2, dim=-1) for g in samples]
            device = per_param[0].device
            norms = torch.stack([norm.to(device) for norm in per_param], dim=1).norm(2, dim=1)
        for p in self.params:  # before anything is claimed: a refused step leaves no trace
            _check_processed_flag(p.grad_sample)
        caps = self.recorder.capture(norms, max_grad_norm=self.max_grad_norm)
        factors = clip_factors(norms, max_grad_norm=self.max_grad_norm, caps=caps)
        # A row with cap 0 leaves before the multiplication: 0 · NaN is NaN.
        kept = None if caps is None or bool((caps > 0).all()) else caps > 0
        if kept is not None:
            factors = factors[kept]
        for p in self.params:
            grad_sample = self._get_flat_grad_sample(p).to(p.dtype)
            if kept is not None:
                grad_sample = grad_sample[kept.to(grad_sample.device)]
            grad = torch.einsum("i,i...", factors.to(grad_sample.device).to(p.dtype), grad_sample)
            if p.summed_grad is not None:
                p.summed_grad += grad
            else:
                p.summed_grad = grad
            _mark_as_processed(p.grad_sample)


class RecordingGhostOptimizer(_Recording, DPOptimizerFastGradientClipping):
    """Opacus's ghost-clipping optimizer, reading the norms that the module computed."""

    def accumulate(self) -> None:
        """Accumulate as Opacus does, then keep the norms of the backward pass behind it."""
        super().accumulate()
        module = self.recorder.ghost_module
        self.recorder.capture(
            module.per_sample_gradient_norms, max_grad_norm=float(module.max_grad_norm)
        )


_RECORDING: dict[type, type] = {
    DPOptimizer: RecordingDPOptimizer,
    DPOptimizerFastGradientClipping: RecordingGhostOptimizer,
}


def record_norms(optimizer: DPOptimizer, recorder: Recorder) -> None:
    """Make a freshly built Opacus optimizer keep its per-sample norms, in place.

    Raises:
        UnsupportedError: Another class of optimizer than flat or ghost clipping in one process; or
            caps with ghost clipping.
    """
    recording = _RECORDING.get(type(optimizer))
    if recording is None:
        raise UnsupportedError(
            f"Expected an optimizer of {', '.join(c.__name__ for c in _RECORDING)}, got "
            f"{type(optimizer).__name__}. Use clipping='flat' with grad_sample_mode='hooks' or "
            "'ghost' in one process."
        )
    if recorder.caps is not None and recording is RecordingGhostOptimizer:
        raise UnsupportedError(
            "Expected grad_sample_mode='hooks' with caps, got 'ghost'. Ghost clipping scales the "
            "losses inside backward(), before the optimizer could apply a cap."
        )
    optimizer.__class__ = recording
    optimizer.recorder = recorder
