"""What one noisy step saw, noted where it acts: rows, norms, the clip in force, the noise added.

Knows rows, norms and caps of the current step; no optimizer and no accountant. It judges nothing:
which label a step has earned is `training/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._validate import FloatArray, IntArray
from ..errors import UnsupportedError
from .clipping import LayerNorms, require_bounds, require_finite
from .collate import DEFAULT, RowOrder
from .draws import Draw
from .parts import (
    OUT_OF_STEP,
    Part,
    bounds_of,
    exceeds,
    factors_of,
    joined,
    layer_factors_of,
    members,
    most_copies,
    most_draws,
    rows_of,
    whole_norms,
)
from .randomness import Seen
from .tracker import BatchTracker


@dataclass(frozen=True)
class Fact:
    """Something seen at a step that takes away from what may be claimed for it.

    Attributes:
        code: What it is; a row of the table in `training/evidence.py`.
        detail: What was found this time, to complete the table's sentence.
    """

    code: str
    detail: str = ""


@dataclass(frozen=True)
class StepRecord:
    """What one noisy step saw.

    Attributes:
        indices: Shape (batch,), rows of the data set; None: not known for certain.
        norms: Shape (batch,), float64, unclipped per-sample gradient norms; 0 of rows that a cap
            of 0 left out.
        max_grad_norm: Bound in force when the gradients were clipped, over all layers.
        rounding: Machine epsilon of the coarsest dtype behind the norms.
        mismatch: Why `indices` is None, for a warning; empty when they are known.
        order: How the order of `indices` is known, or why not.
        drawn: Rows in the step, in no certain order; None: not known.
        draws: Number of draws that may have been summed, so that an instance may be in each: 1
            when `indices` are known.
        copies: Gradients that one row of a draw may have in the sum.
        noise_std: Standard deviation of the noise on the sum, as it was when it was added; None: no
            noise was seen.
        unfinite: Shape (batch,), rows whose gradient was not finite.
        factors: Shape (batch,), what each row's gradient was multiplied with before it was summed;
            None: layers were clipped one by one.
        whole: Shape (batch,), norms over all layers where `norms` are those of what clipping layers
            one by one has left, still on their device; None: `norms` are whole.
        layer_factors: Shape (batch, layers), the same for layers clipped one by one, still on their
            device; None: clipped together, or parts of the step trained other layers.
        layer_bounds: Clip bound of each layer where they were clipped one by one; else none.
        largest: The largest finite norm of any row before it was clipped, rows that a cap left out
            included; of one layer where layers are clipped one by one.
        parts: Rows in each physical batch.
        facts: What takes away from a claim.
    """

    indices: IntArray | None
    norms: FloatArray
    max_grad_norm: float
    rounding: float
    mismatch: str = ""
    order: RowOrder = DEFAULT
    drawn: IntArray | None = None
    draws: int = 1
    copies: int = 1
    noise_std: float | None = None
    unfinite: npt.NDArray[np.bool_] | None = None
    factors: FloatArray | None = None
    whole: torch.Tensor | None = None
    layer_factors: torch.Tensor | None = None
    layer_bounds: tuple[float, ...] = ()
    largest: float = 0.0
    parts: tuple[int, ...] = ()
    facts: tuple[Fact, ...] = ()


class Recorder:
    """Collects what happens to the physical batches that make up one noisy step.

    Args:
        tracker: Knows the current batch's rows.
        caps: Maps rows to the caps they are clipped to in the step under way, shape (batch,), in
            units of max_grad_norm; None: no caps.
        caps_rounding: Machine epsilon of the least precise norms that caps may be enforced by.
        cap_bounds: Clip bounds of the layers that caps are in units of; (): of whole gradients.
        rand_on_empty: Opacus replaces an empty draw by one random row, whose norm is nobody's.
        publish: Where the norms are left as `per_sample_gradient_norms`, as ghost clipping does
            by itself: the module or hooks object that Opacus made; None: nowhere.
        noise_seen: Where noise was drawn from before, in other trainings of the same ledgers too.

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
        cap_bounds: tuple[float, ...] = (),
        rand_on_empty: bool = False,
        publish: Any = None,
        noise_seen: Seen | None = None,
    ) -> None:
        self.tracker = tracker
        tracker.midway = lambda: self.midway
        self.caps = caps
        self.publish = publish
        self.listeners: list[Callable[[IntArray | None, FloatArray], None]] = []
        self.guards: list[Callable[[], None]] = []  # each may refuse the step that begins
        self.guarded = False  # True once the accounting hook is attached and must stay
        self.everyone_in = True  # no row of the batch captured last is left out by a cap of 0
        self.noised = False  # the plain optimizer's next step is that of a gradient with noise
        self.unnoised_step: Callable[[], None] | None = None  # told of one that is not
        self.ledger: object = None  # that the steps are charged to; others may share it
        self.noise_seen = Seen() if noise_seen is None else noise_seen
        self.changed_step: Callable[[], None] | None = None  # and of one by a changed gradient
        self._caps_rounding, self._cap_bounds = caps_rounding, cap_bounds
        self._rand_on_empty = rand_on_empty
        self._captures: list[Part] = []
        self._facts: dict[Fact, None] = {}  # in order, each once
        self._lasting: dict[Fact, None] = {}
        self._noise_std: float | None = None
        self._sums: torch.Tensor | None = None  # norm of each layer's clipped sum
        self._sum_rounding = 0.0
        self._noised: list[tuple[Any, tuple[int, int]]] = []  # parameters, and what they step by

    @property
    def midway(self) -> bool:
        """Whether batches were captured that no step was charged for yet."""
        return bool(self._captures)

    def clear(self) -> None:
        """Forget captured batches whose gradients were dropped without a step."""
        self.tracker.skipped += bool(self._captures)  # of a draw that was used for nothing
        self._reset()

    def _reset(self) -> None:
        self._captures, self._facts = [], {}
        self._noise_std, self._sums = None, None

    def note(self, code: str, detail: str = "", *, lasting: bool = False) -> None:
        """Keep a fact about the step under way.

        Args:
            code: What it is.
            detail: What was found.
            lasting: Keep it for all later steps too, and when gradients are dropped, which ghost
                clipping does between its two backward passes.
        """
        (self._lasting if lasting else self._facts).setdefault(Fact(code, detail))

    def capture(
        self,
        norms: torch.Tensor,
        *,
        max_grad_norm: float,
        rounding: float | None = None,
        passes: int = 1,
        layers: LayerNorms | None = None,
        droppable: bool = True,
    ) -> torch.Tensor | None:
        """Keep one physical batch's norms and claim its rows; return the rows' caps, if any.

        The caps have shape (batch,), or (batch, layers) where each layer has its own.

        Args:
            norms: Shape (batch,), unclipped; of what Opacus's clip leaves, with `layers`.
            max_grad_norm: Clip bound in force.
            rounding: Relative rounding of the coarsest number the norms come from; None: theirs.
            passes: Backward passes whose gradients are clipped together.
            layers: Where layers are clipped one by one; None: they are clipped together, to
                `max_grad_norm`.
            droppable: Whether a row with cap 0 is left out before anything is summed.

        Raises:
            UnsupportedError: Caps must be enforced and the batch's rows are not known, it is not
                the only draw of the step, norms are too coarse or not finite, or layers have other
                clip bounds than caps are charged for.
        """
        claim = self.tracker.claim(passes=passes)
        rows, draw, mismatch = claim.rows, claim.draw, ""
        norms = norms.detach()
        coarsest = max(torch.finfo(norms.dtype).eps, rounding or 0.0)
        if self.publish is not None:
            self.publish.per_sample_gradient_norms = norms
        empty = draw is not None and len(draw.rows) == 0
        phantom = self._rand_on_empty and empty and len(norms) == 1
        if phantom:
            norms = norms[:0]
        if passes > 1:
            rows, mismatch = None, f"{passes} backward passes are in one step"
        elif not claim.order.known:
            split = self.tracker.split.active and draw is None and claim.fresh == 0
            rows, mismatch = None, OUT_OF_STEP if split else claim.order.why
        elif rows is not None and len(rows) != len(norms):
            mismatch = f"the batch has {len(rows)} rows and {len(norms)} gradient norms"
            rows = None
        caps = dropped = limits = None
        if self.caps is not None:
            if claim.fresh > 1:  # a batch fetched ahead may have the same length
                rows, mismatch = None, f"{claim.fresh} batches were handed out since the last step"
            try:
                require_bounds(layers, caps_for=self._cap_bounds)
                self._require_enforceable(rows, draw, coarsest, mismatch)
            except UnsupportedError:
                self.tracker.skipped += claim.fresh > 0  # claimed, and no step will be made of it
                raise
            if phantom:
                self.everyone_in = True
                shape = (1,) if layers is None else (1, len(layers.bounds))
                caps = torch.ones(shape, device=norms.device, dtype=norms.dtype)
            else:
                assert rows is not None
                limits = self.caps(rows)
                self.everyone_in = bool((limits.astype(np.float32) > 0.0).all())
                caps = torch.as_tensor(limits, device=norms.device, dtype=norms.dtype)
                dropped = caps == 0 if caps.ndim == 1 else (caps == 0).all(dim=1)
                require_finite(norms, rows, dropped if droppable else torch.zeros_like(dropped))
        allowed = factors = None
        if layers is not None:
            allowed, factors = layers.allowed(caps), layers.factors(caps)
        self._captures.append(
            Part(
                rows, draw, claim.order, norms, max_grad_norm, dropped, mismatch, coarsest,
                claim.unclaimed, passes, passes > claim.fresh, limits, allowed, layers, factors,
                phantom,
            )
        )  # fmt: skip
        return caps

    def before_step(self) -> None:
        """Tell whoever wants to refuse a step before anything of it is done."""
        for guard in self.guards:
            guard()

    def before_noise(self, sums: Sequence[torch.Tensor]) -> None:
        """Keep how large the clipped sums are, on their device, to be held against their rows.

        A tripwire: a sum above it shows that clipping did not hold. One below it shows nothing: it
        does not see rows that depend on each other, a batch used twice, or gradients that cancel.

        Args:
            sums: Of the clipped gradients, one per parameter.
        """
        if not sums or not self._captures:
            return
        norms = list(torch._foreach_norm(list(sums)))
        if any(s.device != sums[0].device for s in sums):
            norms = [norm.to(sums[0].device) for norm in norms]
        self._sums = torch.stack(norms)
        self._sum_rounding = max(torch.finfo(s.dtype).eps for s in sums)

    def remember(self, parameters: Sequence[Any]) -> None:
        """Note the noised gradients as they are, by which the model is to move."""
        self._noised = [(p, written(p.grad)) for p in parameters if p.grad is not None]

    def untouched(self) -> bool:
        """Whether the gradients noted by `remember` are as they were then."""
        return all(p.grad is not None and written(p.grad) == seen for p, seen in self._noised)

    def noise(self, std: float) -> None:
        """Note the standard deviation of the noise that is being added to the sum.

        Args:
            std: As it is at that moment. Of two values within one step the smaller one counts.
        """
        self._noise_std = std if self._noise_std is None else min(self._noise_std, std)

    def take(self, *, max_grad_norm: float) -> StepRecord:
        """Return what the step saw and start the next one.

        Args:
            max_grad_norm: Clip bound to report if nothing was captured.
        """
        captures, facts, std = self._captures, [*self._lasting, *self._facts], self._noise_std
        norms, sums, allowed, largest = joined(captures, self._sums)
        exceeded = exceeds(captures, norms, sums, allowed, rounding=self._sum_rounding)
        bounds = bounds_of(captures)
        self._reset()
        skipped = self.tracker.settle()
        if skipped:
            facts.append(Fact("draw_skipped"))
        if self.tracker.coins_repeated:
            facts.append(Fact("coins_repeated"))
        if exceeded:
            facts.append(Fact("sum_above_clip"))
        if len({c.max_grad_norm for c in captures}) > 1 or len(bounds) > 1:
            facts.append(Fact("clip_changed_midway"))
        if any(c.foreign for c in captures):
            facts.append(Fact("batch_not_drawn"))
        draws = {c.draw for c in captures if c.draw is not None}
        rows, mismatch = rows_of(captures, draws, len(norms))
        order = next((c.order for c in captures if not c.order.known), DEFAULT)
        drawn = members(captures, draws)
        copies = 1
        if rows is None and drawn is not None and len(norms) != len(drawn):
            copies = max(-(-len(norms) // max(len(drawn), 1)), 1)
            facts.append(Fact("rows_not_once"))
        elif rows is not None and (most := most_copies(rows)) > 1:  # drawn with replacement
            rows, copies, mismatch = None, most, f"a row is in the batch {most} times"
            facts.append(Fact("rows_not_once"))
        unclipped = norms
        if any(c.dropped is not None for c in captures):
            dropped = [c.dropped for c in captures if c.dropped is not None]
            norms = np.where(torch.cat(dropped).cpu().numpy(), 0.0, norms)
        for listener in self.listeners:
            listener(rows, unclipped)
        return StepRecord(
            indices=rows,
            norms=norms,
            max_grad_norm=max((c.max_grad_norm for c in captures), default=max_grad_norm),
            rounding=max((c.rounding for c in captures), default=0.0),
            mismatch=mismatch,
            order=order,
            drawn=drawn,
            draws=1 if rows is not None else most_draws(captures, draws),
            copies=copies,
            noise_std=std,
            unfinite=~np.isfinite(norms),
            factors=factors_of(captures, unclipped),
            whole=whole_norms(captures),
            layer_factors=layer_factors_of(captures),
            layer_bounds=bounds[0] if bounds else (),
            largest=largest,
            parts=tuple(len(c.norms) for c in captures),
            facts=tuple(facts),
        )

    # --- inside -------------------------------------------------------------------------------

    def _require_enforceable(
        self, rows: IntArray | None, draw: Draw | None, coarsest: float, mismatch: str
    ) -> None:
        """Raise where clipping each row to its own cap would not hold what the caps promise."""
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
        if self._captures and self._captures[-1].draw is not draw:
            raise UnsupportedError(
                "Expected one drawn batch per noisy step under caps, got several. An instance "
                "drawn into each would enter the step with a cap for every time. Step after every "
                "batch, or split large batches with opacus_pil.BatchMemoryManager."
            )


def written(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what changes when somebody replaces a tensor or writes to it."""
    return tensor.data_ptr(), tensor._version
