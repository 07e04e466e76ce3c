"""Per-sample gradient norms out of Opacus's optimizers, at no extra pass over the gradients.

Opacus computes every norm and throws it away; the optimizers here keep it. Knows how each of
Opacus's optimizers clips, no accountant.
"""

from __future__ import annotations

import functools
import math
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
from .ghost import GhostSeam
from .plain_step import PlainStep, held, moves_by_gradient
from .randomness import generator_mark
from .recorder import Recorder


class _Recording:
    """What all recording optimizers share. Mixed in before the Opacus class."""

    recorder: Recorder

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refuse: torch would leave the copy without its plain optimizer, and this class broken.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "Expected one private optimizer for one accounted training, got a copy of it, whose "
            "steps nobody would charge. Copy the plain module and build a plain optimizer for it, "
            "or save optimizer.state_dict()."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled, for the same reason."""
        return self.__deepcopy__({})

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
        """Clear gradients as Opacus does, and the captures that belonged to them.

        Those of frozen parameters too, which Opacus keeps: unfrozen later, they would be in the sum
        of a step that their rows were not drawn for.
        """
        super().zero_grad(set_to_none)  # type: ignore[misc]
        for p in held(self):
            if not p.requires_grad and getattr(p, "grad_sample", None) is not None:
                p.grad_sample = None
            if not p.requires_grad and not self._is_last_step_skipped:  # type: ignore[attr-defined]
                p.summed_grad = None
        if not self._is_last_step_skipped:  # type: ignore[attr-defined]
            self.recorder.clear()

    def pre_step(self, closure: Callable[[], float] | None = None) -> Any:
        """Clip and add noise as Opacus does; refuse first what caps could not survive."""
        self.recorder.before_step()
        moves = super().pre_step(closure)  # type: ignore[misc]
        self.recorder.noised = bool(moves) and bool(self.params)  # type: ignore[attr-defined]
        return moves

    def scale_grad(self) -> None:
        """Divide as Opacus does, and remember the noised gradients: nothing may touch them now."""
        super().scale_grad()  # type: ignore[misc]
        self._remember()

    def reduce_gradients(self) -> None:
        """Join the processes' gradients as Opacus's distributed optimizers do, likewise."""
        whole = self.recorder.untouched()
        super().reduce_gradients()  # type: ignore[misc]
        if whole:
            self._remember()

    def _remember(self) -> None:
        self.recorder.remember(self.params)  # type: ignore[attr-defined]

    def noise_std(self) -> float:
        """Return the standard deviation of the noise that Opacus adds to the sum right now."""
        optimizer: Any = self
        return float(optimizer.noise_multiplier) * float(optimizer.max_grad_norm)

    def _noise_mark(self) -> int | None:
        """Return where the noise is drawn from; None: none is, or nobody can say."""
        optimizer: Any = self
        rank = getattr(optimizer, "rank", 0)  # of several processes the first one adds the noise
        if rank or optimizer.secure_mode or not optimizer.params or not self.noise_std():
            return None
        return generator_mark(optimizer.generator, optimizer.params[0].device)

    def add_noise(self) -> None:
        """Add noise as Opacus does, noting how much, to what, and whether the clip has held."""
        optimizer: Any = self
        parameters = optimizer.params
        sums = [p.summed_grad for p in parameters]
        self.recorder.before_noise([s for s in sums if s is not None])
        self.recorder.noise(self.noise_std())
        if self.recorder.noise_seen.again(self._noise_mark()):
            self.recorder.note("noise_repeated")
        super().add_noise()  # type: ignore[misc]
        self.recorder.noise(self.noise_std())
        everything = held(optimizer)
        if len(everything) > len(parameters):  # else all of them were noised
            noised = {id(p) for p in parameters}
            raw = [p for p in everything if id(p) not in noised and moves_by_gradient(p)]
            if raw:
                found = f"{len(raw)} of {len(everything)} parameter tensors"
                self.recorder.note("not_noised", found)


def chained(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a step hook that calls both, in order."""
    return functools.partial(_chain, first, second)


def _chain(first: Callable[[Any], None], second: Callable[[Any], None], optimizer: Any) -> None:
    first(optimizer)
    second(optimizer)


def _norms_of(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return each row's gradient norm for every parameter, as Opacus forms it; of no row, none."""
    return [g.reshape(len(g), math.prod(g.shape[1:])).norm(2, dim=-1) for g in samples]


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
        passes = self.accumulated_iterations  # first: Opacus says so where parameters disagree
        samples = self.grad_samples
        if len(samples[0]) == 0:
            norms = torch.zeros((0,), device=samples[0].device)
        else:
            norms = _norms_over(_norms_of(samples))
        for p in self.params:  # before anything is claimed: a refused step leaves no trace
            _check_processed_flag(p.grad_sample)
        caps = self.recorder.capture(
            norms,
            max_grad_norm=float(self.max_grad_norm),
            rounding=_coarsest(samples),
            passes=passes,
        )
        factors = clip_factors(norms, max_grad_norm=self.max_grad_norm, caps=caps)
        # A row with cap 0 leaves before the multiplication: 0 · NaN is NaN.
        kept = None if caps is None or self.recorder.everyone_in else caps > 0
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
        """Record the clipped norm over all layers, then clip and sum as Opacus does.

        The bounds in force are the list that clips; `max_grad_norm`, which the noise follows, is
        another attribute, and a schedule of Opacus changes that one only.
        """
        passes = self.accumulated_iterations
        samples = self.grad_samples
        # Opacus pairs parameters and bounds up to the shorter list: who has none is not clipped.
        bounds = [*map(float, self.max_grad_norms), *[math.inf] * len(samples)][: len(samples)]
        layers = _norms_of(samples)
        clipped = [norm.clamp(max=bound) for norm, bound in zip(layers, bounds, strict=True)]
        if math.inf in bounds:
            self.recorder.note("not_clipped", f"{bounds.count(math.inf)} of {len(bounds)} tensors")
        device = layers[0].device
        self.recorder.capture(
            _norms_over(clipped),
            max_grad_norm=math.hypot(*bounds),
            rounding=_coarsest(samples),
            passes=passes,
            allowed=torch.stack([norm.sum().to(device) for norm in clipped]),
            whole=_norms_over(layers),
            layer_factors=torch.stack(
                [
                    (bound / (norm + 1e-6)).clamp(max=1.0).to(device)  # as Opacus does
                    for norm, bound in zip(layers, bounds, strict=True)
                ],
                dim=1,
            ),
        )
        super().clip_and_accumulate()


class RecordingAdaptiveOptimizer(_Recording, AdaClipDPOptimizer):
    """Opacus's adaptive clipping, keeping the norms by the bound that is in force at the step."""

    def clip_and_accumulate(self) -> None:
        """Record the norms, then clip, count and sum as Opacus does."""
        passes = self.accumulated_iterations
        norms = _norms_over(_norms_of(self.grad_samples))
        self.recorder.capture(
            norms,
            max_grad_norm=float(self.max_grad_norm),
            rounding=_coarsest(self.grad_samples),
            passes=passes,
        )
        super().clip_and_accumulate()

    def noise_std(self) -> float:
        """Return what is added to gradients: the count that is released takes its own share."""
        if float(self.noise_multiplier) == 0.0:
            return 0.0
        own = float(self.noise_multiplier) ** -2 - (2.0 * float(self.unclipped_num_std)) ** -2
        return float(own**-0.5) * float(self.max_grad_norm)


class RecordingGhostOptimizer(_Recording, DPOptimizerFastGradientClipping):
    """Opacus's ghost-clipping optimizer, with what its module noted when it clipped."""

    seam: GhostSeam

    def accumulate(self) -> None:
        """Accumulate as Opacus does, after asking what the gradients are."""
        self.seam.commit(self.params)
        super().accumulate()

    def noise_std(self) -> float:
        """Return what Opacus adds; a multiplier adjusted for adaptive clipping has its own name."""
        multiplier: Any = getattr(self, "_adjusted_noise_multiplier", self.noise_multiplier)
        return float(multiplier) * float(self.max_grad_norm)


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
    if ghost != isinstance(module, GradSampleHooksFastGradientClipping):
        raise UnsupportedError(
            f"Expected module and optimizer of one make_private, got {type(module).__name__} with "
            f"{type(optimizer).__name__}. Pass what make_private returned together."
        )
    if recorder.caps is not None and not (ghost or issubclass(recording, RecordingDPOptimizer)):
        raise UnsupportedError(
            f"Expected flat clipping with caps, got {type(optimizer).__name__}. A cap bounds the "
            "whole gradient of an instance. Use clipping='flat'."
        )
    if ghost:
        optimizer.seam = GhostSeam(module, recorder)
    else:
        recorder.publish = module
    optimizer.__class__ = recording
    optimizer.recorder = recorder
    plain = optimizer.original_optimizer
    if isinstance(plain, torch.optim.Optimizer):
        plain.register_step_pre_hook(PlainStep(recorder))


def clipped_sum(optimizer: Any, parameter: Any) -> torch.Tensor | None:
    """Return the sum of the rows' clipped gradients; None: the optimizer does not hold it."""
    found: torch.Tensor | None = getattr(parameter, "summed_grad", None)
    gradient = parameter.grad
    if found is None or gradient is None or gradient.data_ptr() != found.data_ptr():
        return found
    # A process that adds no noise divides the sum itself: its gradient is a view of it.
    if optimizer.loss_reduction != "mean":
        return found
    return found * (optimizer.expected_batch_size * optimizer.accumulated_iterations)


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
