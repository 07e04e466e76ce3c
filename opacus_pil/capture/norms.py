"""Per-sample gradient norms out of Opacus's optimizers, at no extra pass over the gradients.

Opacus computes every norm and throws it away; the optimizers here keep it. Knows how each of
Opacus's optimizers clips, no accountant.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
)
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)
from opacus.optimizers.ddp_perlayeroptimizer import SimpleDistributedPerLayerOptimizer
from opacus.optimizers.ddpoptimizer import DistributedDPOptimizer
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import (
    DistributedDPOptimizerFastGradientClipping,
)
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from ..errors import UnsupportedError
from .clipping import clip_factors
from .recorder import Recorder


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
        self.step_hook: Callable[[Any], None] = chained(self.step_hook, fn)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Opacus's BatchMemoryManager passes on part of a draw; called ahead of its use.

        Raises:
            UnsupportedError: Caps are enforced: each part must know its rows before it is clipped.
        """
        if self.recorder.caps is not None:
            raise UnsupportedError(
                "Expected every physical batch to know its rows, since each has its own cap, got "
                "Opacus's BatchMemoryManager, which hides them. Use opacus_pil.BatchMemoryManager."
            )
        require_splittable(self)
        self.recorder.tracker.split.emit(last=not do_skip)
        super().signal_skip_step(do_skip)  # type: ignore[misc]

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients as Opacus does, and the captures that belonged to them."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        if not self._is_last_step_skipped:  # type: ignore[attr-defined]
            self.recorder.clear()


def chained(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a step hook that calls both, in order."""
    return functools.partial(_chain, first, second)


def _chain(first: Callable[[Any], None], second: Callable[[Any], None], optimizer: Any) -> None:
    first(optimizer)
    second(optimizer)


def _norms_of(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return each row's gradient norm for every parameter, as Opacus forms it."""
    return [g.reshape(len(g), -1).norm(2, dim=-1) for g in samples]


def _norms_over(layers: list[torch.Tensor]) -> torch.Tensor:
    """Return each row's norm over all parameters, on the first one's device."""
    device = layers[0].device
    return torch.stack([norm.to(device) for norm in layers], dim=1).norm(2, dim=1)


def _coarsest(samples: list[torch.Tensor]) -> float:
    """Return the relative rounding of the least precise ones, which joining them would hide."""
    return max(torch.finfo(g.dtype).eps for g in samples)


class RecordingDPOptimizer(_Recording, DPOptimizer):
    """Opacus's DPOptimizer, keeping the norms it clips by and enforcing per-instance caps."""

    def clip_and_accumulate(self) -> None:
        """Clip and sum with Opacus's arithmetic, bit for bit, keeping the norms."""
        samples = self.grad_samples
        if len(samples[0]) == 0:
            norms = torch.zeros((0,), device=samples[0].device)
        else:
            norms = _norms_over(_norms_of(samples))
        for p in self.params:  # before anything is claimed: a refused step leaves no trace
            _check_processed_flag(p.grad_sample)
        caps = self.recorder.capture(
            norms, max_grad_norm=self.max_grad_norm, rounding=_coarsest(samples)
        )
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


class RecordingPerLayerOptimizer(_Recording, DPPerLayerOptimizer):
    """Opacus's per-layer clipping, keeping the norm of what is left of each gradient."""

    def clip_and_accumulate(self) -> None:
        """Record the clipped norm over all layers, then clip and sum as Opacus does."""
        bounds = [float(bound) for bound in self.max_grad_norms]
        layers = _norms_of(self.grad_samples)
        clipped = [norm.clamp(max=bound) for norm, bound in zip(layers, bounds, strict=True)]
        self.recorder.capture(
            _norms_over(clipped),
            max_grad_norm=self.max_grad_norm,
            rounding=_coarsest(self.grad_samples),
        )
        super().clip_and_accumulate()


class RecordingAdaptiveOptimizer(_Recording, AdaClipDPOptimizer):
    """Opacus's adaptive clipping, keeping the norms by the bound that is in force at the step."""

    def clip_and_accumulate(self) -> None:
        """Record the norms, then clip, count and sum as Opacus does."""
        norms = _norms_over(_norms_of(self.grad_samples))
        self.recorder.capture(
            norms,
            max_grad_norm=float(self.max_grad_norm),
            rounding=_coarsest(self.grad_samples),
        )
        super().clip_and_accumulate()


class RecordingGhostOptimizer(_Recording, DPOptimizerFastGradientClipping):
    """Opacus's ghost-clipping optimizer, reading the norms that the module computed."""

    module: Any

    def accumulate(self) -> None:
        """Accumulate as Opacus does, then keep the norms of the backward pass behind it."""
        super().accumulate()
        if self.recorder.caps is None:  # with caps the module has recorded them before clipping
            module = self.module
            self.recorder.capture(
                module.per_sample_gradient_norms, max_grad_norm=float(module.max_grad_norm)
            )


# Clipping and its norms are local to a process, noise and the sum over processes Opacus's.


class RecordingDistributedOptimizer(RecordingDPOptimizer, DistributedDPOptimizer):
    """Flat clipping in one of several processes."""


class RecordingDistributedPerLayerOptimizer(
    RecordingPerLayerOptimizer, SimpleDistributedPerLayerOptimizer
):
    """Per-layer clipping in one of several processes."""


class RecordingDistributedGhostOptimizer(
    RecordingGhostOptimizer, DistributedDPOptimizerFastGradientClipping
):
    """Ghost clipping in one of several processes."""


def _capped_coefficients(module: Any, recorder: Recorder) -> torch.Tensor:
    """Return each row's factor in place of the ghost module's own, after recording the norms."""
    norms = module.get_norm_sample()
    if not bool(torch.isfinite(norms).all()):
        # A factor of 0 would not help: 0 · NaN is NaN, and the rows are summed inside backward.
        raise ValueError(
            "Expected finite per-sample gradient norms, got "
            f"{int((~torch.isfinite(norms)).sum())} of {len(norms)} not finite. A non-finite "
            "gradient cannot be clipped; check its loss."
        )
    layers = [p._norm_sample for p in module.parameters() if hasattr(p, "_norm_sample")]
    caps = recorder.capture(
        norms, max_grad_norm=float(module.max_grad_norm), rounding=_coarsest([norms, *layers])
    )
    return clip_factors(norms, max_grad_norm=module.max_grad_norm, caps=caps)


_RECORDING: dict[type, type] = {
    DPOptimizer: RecordingDPOptimizer,
    DPPerLayerOptimizer: RecordingPerLayerOptimizer,
    AdaClipDPOptimizer: RecordingAdaptiveOptimizer,
    DPOptimizerFastGradientClipping: RecordingGhostOptimizer,
    DistributedDPOptimizer: RecordingDistributedOptimizer,
    SimpleDistributedPerLayerOptimizer: RecordingDistributedPerLayerOptimizer,
    DistributedDPOptimizerFastGradientClipping: RecordingDistributedGhostOptimizer,
}


def record_norms(optimizer: DPOptimizer, recorder: Recorder, *, module: Any) -> None:
    """Make a freshly built Opacus optimizer keep its per-sample norms, in place.

    Args:
        optimizer: Opacus's optimizer; its class is exchanged.
        recorder: Collects rows and norms.
        module: What Opacus made of the module; with ghost clipping and caps its clipping factors
            are exchanged.

    Raises:
        UnsupportedError: An optimizer of another kind (sharded parameters) or library; or caps with
            per-layer or adaptive clipping.
    """
    require_known(optimizer)
    recording = _RECORDING[type(optimizer)]
    ghost = issubclass(recording, RecordingGhostOptimizer)
    if recorder.caps is not None and not issubclass(recording, RecordingDPOptimizer):
        if not (ghost and isinstance(module, GradSampleHooksFastGradientClipping)):
            raise UnsupportedError(
                f"Expected flat clipping with caps, got {type(optimizer).__name__} with "
                f"{type(module).__name__}. A cap bounds the whole gradient of an instance. Use "
                "clipping='flat'."
            )
        module.get_clipping_coef = functools.partial(_capped_coefficients, module, recorder)
    if ghost:
        optimizer.module = module
    else:
        recorder.publish = module
    optimizer.__class__ = recording
    optimizer.recorder = recorder


def require_splittable(optimizer: Any) -> None:
    """Raise if a draw may not be split into several physical batches."""
    if isinstance(optimizer, AdaClipDPOptimizer):
        # Opacus forgets the count of unclipped rows at every physical batch.
        raise UnsupportedError(
            "Expected flat or per-layer clipping with a BatchMemoryManager, got adaptive clipping, "
            "whose count would be that of the last physical batch alone. Use batches that fit "
            "in memory."
        )


def require_known(optimizer: DPOptimizer) -> None:
    """Raise unless the optimizer is one of Opacus's whose clipping is known here."""
    if type(optimizer) not in _RECORDING:
        raise UnsupportedError(
            f"Expected an optimizer of {', '.join(c.__name__ for c in _RECORDING)}, got "
            f"{type(optimizer).__name__}. Use one of these, as Opacus makes them."
        )
