"""StepMeter: measures what each step of one optimizer really did, for `conformance.py` to judge.

The clipped sum is computed again from the per-sample gradients, before Opacus forms its own; noise
is what `add_noise` adds to it; what moves the weights is looked at last. Knows Opacus's optimizer;
no statistics and no claim.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from opacus.optimizers import AdaClipDPOptimizer, DPPerLayerOptimizer

from .measurements import Measurements
from .seams import Listener, is_ghost
from .shadow_step import nominal_divisor

COLUMNS = 256  # entries of each tensor that sums are computed again for
_ENTRIES = 512  # entries whose noise is kept step by step, of all tensors together


class StepMeter(Listener):
    """Listens to one optimizer's steps and sums up.

    Args:
        names: Name of a parameter tensor; None: numbers.
        multiplier: Noise multiplier that was accounted for the step just made; None: not known yet,
            or nobody counts.
        used: Told of the rows of each step that moved weights; None: they were not seen.

    Attributes:
        measured: What was seen so far. Its `divisor` may be set to the accounted one; otherwise it
            is the one the optimizer has at its first step.
        module: What Opacus made of the model; ghost clipping keeps its norms there.
    """

    def __init__(
        self,
        *,
        names: Callable[[torch.Tensor], str | None] | None = None,
        multiplier: Callable[[], float | None] = lambda: None,
        used: Callable[[int | None], None] = lambda _: None,
    ) -> None:
        self.measured = Measurements()
        self.module: Any = None
        self._names = names or (lambda _: None)
        self._multiplier = multiplier
        self._used = used
        self._columns: dict[int, torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(0)  # which columns: public
        self._reset()

    def _reset(self) -> None:
        self._expected: list[torch.Tensor] | None = None
        self._scale = 0.0  # Σ f²‖g‖² over rows: what the sum would be if rows did not cancel
        self._bound: float | None = None
        self._size = 0
        self._seen: Any = None
        self._sums: list[torch.Tensor] | None = None
        self._noise: tuple[Any, Any, Any] | None = None
        self._noised: list[torch.Tensor] | None = None
        self._allowed = 0.0
        self._ready = False
        self._divisor: float | None = None
        self._scaled: torch.Tensor | None = None  # the noised sum / divisor

    # --- stages -------------------------------------------------------------------------------

    def before(self, stage: str, optimizer: Any) -> None:
        """Compute again what is about to be clipped; keep what is about to be noised."""
        with torch.no_grad():
            if stage == "pre_step" and self._ready:  # the step before moved weights by other means
                self._settle(optimizer, seen=False)
                self._reset()
            if stage in ("pre_step", "clip"):
                self._expect(optimizer)
            elif stage == "add_noise":
                self._compare_clip(optimizer)
                sums = _sums_of(optimizer)
                self._sums = None if sums is None else [s.clone() for s in sums]

    def after(self, stage: str, optimizer: Any, result: Any) -> None:
        """Measure the noise that was added; know that the step may move the weights."""
        if stage == "add_noise" and self._sums is not None:
            with torch.no_grad():
                self._see_noise(optimizer, self._sums)
            self._sums = None
        elif stage == "scale_grad" and self._noised is not None:
            with torch.no_grad():
                self._see_divisor(optimizer, self._noised)
        elif stage == "pre_step" and result:
            self._ready = True

    def move(self, optimizer: Any) -> None:
        """Look at what moves the weights, and settle the step."""
        with torch.no_grad():
            self._expect(optimizer)
            self._settle(optimizer, seen=True)
        self._reset()

    # --- inside -------------------------------------------------------------------------------

    def _expect(self, optimizer: Any) -> None:
        """Add one physical batch to the expected sum, once."""
        measured = self.measured
        if is_ghost(optimizer):
            self._expect_ghost(optimizer)
            return
        params = optimizer.params
        samples = [_flat(getattr(p, "grad_sample", None)) for p in params]
        if not samples or any(s is None for s in samples):
            return
        first = getattr(params[0], "grad_sample", None)
        key = first[0] if isinstance(first, list) else first
        if self._seen is not None and self._seen() is key:
            return
        self._seen = weakref.ref(key)
        layers = torch.stack([_row_norms(s).to(samples[0].device) for s in samples])
        if isinstance(optimizer, DPPerLayerOptimizer):
            bounds = [float(b) for b in optimizer.max_grad_norms]
            factors = [(b / norm).clamp(max=1.0) for b, norm in zip(bounds, layers, strict=False)]
            self._bound = math.hypot(*bounds)
            smallest = min(bounds)
            above = (layers > torch.tensor(bounds[: len(layers)])[:, None].to(layers)).any(dim=0)
        else:
            bound = float(optimizer.max_grad_norm)
            norms = layers.norm(dim=0)
            factors = [(bound / norms).clamp(max=1.0)] * len(samples)
            self._bound, smallest, above = bound, bound, norms > bound
        measured.rows += len(samples[0])
        measured.clipped_rows += int(above.sum())
        self._size += len(samples[0])
        rounding = max(torch.finfo(s.dtype).eps for s in samples)
        # Opacus divides by ‖g‖ + 1e-6.
        measured.clip_slack = max(1e-3, 100.0 * rounding, 2e-6 / max(smallest, 1e-30))
        recorder = getattr(optimizer, "recorder", None)
        if getattr(recorder, "caps", None) is not None:
            measured.notes["clip"] = "each row is clipped to a cap of its own"
            return
        parts = []
        for p, sample, factor in zip(params, samples, factors, strict=False):
            columns = _rows_of(sample)[:, self._columns_of(p)]
            weighted = columns * factor.to(columns)[:, None]
            weighted = torch.where(factor.to(columns)[:, None] > 0, weighted, 0.0)
            self._scale += float((weighted.double() ** 2).sum())
            parts.append(weighted.to(torch.float64).sum(dim=0))
        if self._expected is None:
            self._expected = parts
        else:
            self._expected = [a + b for a, b in zip(self._expected, parts, strict=True)]

    def _expect_ghost(self, optimizer: Any) -> None:
        """Ghost clipping: what the norms allow the sum to be."""
        norms = getattr(self.module, "per_sample_gradient_norms", None)
        if norms is None or (self._seen is not None and self._seen() is norms):
            return
        self._seen = weakref.ref(norms)
        self._bound = float(getattr(self.module, "max_grad_norm", optimizer.max_grad_norm))
        self._allowed += float(norms.clamp(max=self._bound).sum())
        self._size += len(norms)
        self.measured.rows += len(norms)
        self.measured.clipped_rows += int((norms > self._bound).sum())
        self.measured.bound_only = True

    def _compare_clip(self, optimizer: Any) -> None:
        """Hold the sum that Opacus formed against the expected one."""
        sums = _sums_of(optimizer)
        if sums is None:
            return
        if is_ghost(optimizer):
            if self._bound is not None:
                total = math.sqrt(sum(float((s.double() ** 2).sum()) for s in sums))
                limit = self._allowed * (1.0 + 1e-3) + 1e-12
                self.measured.add_clip(max(total / limit - 1.0, 0.0))
            return
        if self._expected is None or len(self._expected) != len(sums):
            return
        error = 0.0
        for p, own, expected in zip(optimizer.params, sums, self._expected, strict=True):
            found = own.reshape(-1)[self._columns_of(p)].double()
            error += float(((found - expected) ** 2).sum())
        if not (math.isfinite(error) and math.isfinite(self._scale)):
            self.measured.unfinite += 1
            return
        self.measured.add_clip(math.sqrt(error / max(self._scale, 1e-24)) if error > 0 else 0.0)

    def _see_noise(self, optimizer: Any, sums: list[torch.Tensor]) -> None:
        """Keep what `add_noise` added, until it is known what was accounted for the step."""
        params = optimizer.params
        if any(p.grad is None for p in params) or len(params) != len(sums):
            return
        noises = [(p.grad - s.view_as(p)).reshape(-1) for p, s in zip(params, sums, strict=True)]
        squares = torch.stack([(n.double() ** 2).sum().cpu() for n in noises]).numpy()
        counts = np.array([float(n.numel()) for n in noises])
        each = max(_ENTRIES // len(noises), 4)
        entries = torch.cat([n[:each].float().cpu() for n in noises])[:_ENTRIES].numpy()
        self._noise = squares, counts, entries
        self._noised = [p.grad.reshape(-1)[self._columns_of(p)].double().clone() for p in params]

    def _settle(self, optimizer: Any, *, seen: bool) -> None:
        """Close a step: who moves, by what (if that is seen), and what was accounted for it."""
        measured, params = self.measured, optimizer.params
        if not measured.tensors:
            measured.tensors = tuple(self._names(p) or f"tensor {i}" for i, p in enumerate(params))
        measured.moves += 1
        self._used(None if self._bound is None else self._size)
        if measured.divisor is None:
            measured.divisor = nominal_divisor(optimizer)
        private = self._ready or self._noise is not None
        measured.noisy += private
        noised = {id(p) for p in params} if private else set()
        for group in optimizer.original_optimizer.param_groups if seen else ():
            for p in group["params"]:
                if id(p) not in noised and p.grad is not None and bool((p.grad != 0).any()):
                    name = self._names(p) or "a tensor"
                    measured.unnoised[name] = measured.unnoised.get(name, 0) + 1
        if self._bound is not None:
            measured.sizes.append(self._size)
        multiplier = self._multiplier()
        if multiplier is None:
            multiplier = float(optimizer.noise_multiplier)
        bound = self._bound if self._bound is not None else float(optimizer.max_grad_norm)
        std = _adjusted(optimizer, multiplier) * bound
        applied = None
        if seen and all(p.grad is not None for p in params):
            applied = [p.grad.reshape(-1)[self._columns_of(p)].double() for p in params]
        if applied is not None and self._noised is not None:
            if self._scaled is None:
                self._see_divisor(optimizer, self._noised)
            self._see_change(torch.cat(applied), self._scaled)
        if std > 0 and self._noise is not None:
            squares, counts, entries = self._noise
            if np.isfinite(squares).all():
                measured.add_noise(squares / std**2, counts, entries / np.float32(std))
        if applied is not None and self._expected is not None and private:
            self._see_weight(optimizer, applied, std)

    def _see_divisor(self, optimizer: Any, noised: list[torch.Tensor]) -> None:
        """What the noised sum is divided by."""
        params = optimizer.params
        if any(p.grad is None for p in params):
            return
        base = torch.cat(noised)
        grads = torch.cat([p.grad.reshape(-1)[self._columns_of(p)].double() for p in params])
        below, total = float(grads @ base), float(base @ base)
        if math.isfinite(below) and below != 0 and total != 0:
            self._divisor = total / below
            self._scaled = base / self._divisor
            self.measured.add_divisor(self._divisor)

    def _see_change(self, applied: torch.Tensor, scaled: torch.Tensor | None) -> None:
        """What else happened to the gradient after its noise."""
        if scaled is None or len(scaled) != len(applied):
            return
        change = float((applied - scaled).norm()) / float(scaled.norm())
        if change > 1e-4:
            times, most = self.measured.changed
            self.measured.changed = times + 1, max(most, change)

    def _see_weight(self, optimizer: Any, applied: list[torch.Tensor], std: float) -> None:
        """How often the expected sum is in what moves the weights; noise where nothing else is."""
        expected = self._expected
        assert expected is not None
        if len(expected) != len(applied):
            return
        divisor = self._divisor or self.measured.divisor or 1.0
        target, found = torch.cat(expected), torch.cat(applied) * divisor
        base = float(target @ target)
        if not math.isfinite(base):
            return
        self.measured.weight_sum += float(found @ target)
        self.measured.weight_base += base
        self.measured.weight_noise += base * std**2
        if self._noise is None and std > 0:
            rest = [a * divisor - e for a, e in zip(applied, expected, strict=True)]
            self.measured.exact_noise = False
            squares = np.array([float((r**2).sum()) for r in rest]) / std**2
            counts = np.array([float(len(r)) for r in rest])
            each = max(_ENTRIES // len(rest), 4)
            kept = torch.cat([r[:each] for r in rest])[:_ENTRIES] / std
            self.measured.add_noise(squares, counts, kept.float().cpu().numpy())

    def _columns_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the entries of a tensor that are looked at: all, or a fixed choice."""
        key = id(parameter)
        if key not in self._columns:
            size = parameter.numel()
            if size <= COLUMNS:
                chosen = torch.arange(size)
            else:
                chosen = torch.randperm(size, generator=self._random)[:COLUMNS].sort().values
            self._columns[key] = chosen.to(parameter.device)
        return self._columns[key]


def _sums_of(optimizer: Any) -> list[torch.Tensor] | None:
    """Return the sums of clipped gradients, if there is one for each tensor."""
    sums = [getattr(p, "summed_grad", None) for p in optimizer.params]
    found = [s for s in sums if s is not None]
    return found if len(found) == len(sums) else None


def _flat(sample: Any) -> Any:
    if isinstance(sample, list):
        return torch.cat(sample) if sample else None
    return sample


def _rows_of(sample: torch.Tensor) -> torch.Tensor:
    # Not -1: of a draw of nobody torch could not tell how long a row would be.
    return sample.reshape(len(sample), math.prod(sample.shape[1:]))


def _row_norms(sample: torch.Tensor) -> torch.Tensor:
    return _rows_of(sample).norm(dim=1)


def _adjusted(optimizer: Any, multiplier: float) -> float:
    """Return what is added to gradients where a released count takes its own share of the noise."""
    if isinstance(optimizer, AdaClipDPOptimizer) and multiplier > 0:
        rest = multiplier**-2 - (2.0 * float(optimizer.unclipped_num_std)) ** -2
        return float(rest**-0.5) if rest > 0 else math.inf
    return multiplier
