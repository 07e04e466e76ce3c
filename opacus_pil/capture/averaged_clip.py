"""Clip the averaged gradient, not each instance's, inside Opacus's optimizer, before its noise.

Knows plain gradients of a batch; no per-sample gradients, no accountant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

_BELOW = 1.0 - 1e-6  # float32 products may end some ulps (6e-8) above the bound


def clip_to_norm(tensors: list[torch.Tensor], *, bound: float) -> list[torch.Tensor]:
    """Return the tensors scaled together so that their joint norm is at most `bound`.

    Guarantee: the joint norm, taken exactly, is at most `bound`, also for float32 or float16
        results. Tensors within 1e-6 of the bound are scaled too.

    Args:
        tensors: Of any shapes and devices; left as they are.
        bound: >= 0.

    Edge cases (first match wins):
        an entry that is not finite   all zero: it has no direction to keep
        bound = 0                     all zero
    """
    norm = float(torch.stack([tensor.double().norm().cpu() for tensor in tensors]).norm())
    if norm != norm or norm == float("inf") or bound == 0.0:
        return [torch.zeros_like(tensor) for tensor in tensors]
    if norm <= bound * _BELOW:
        return [tensor.clone() for tensor in tensors]
    factor = bound * _BELOW / norm
    return [(tensor.double() * factor).to(tensor.dtype) for tensor in tensors]


class AveragedClipOptimizer(DPOptimizer):
    """Opacus's DPOptimizer for a plain module: one gradient per batch, clipped, then noised.

    Args:
        optimizer: The plain inner optimizer. Its weight decay acts after clipping and noise.
        gradient_clip: Bound on the norm of the batch's averaged gradient, >= 0.
        noise_std: Standard deviation of the noise on that gradient, >= 0; may be set between steps.
        generator: Source of the noise; None: torch's global generator.
        secure_mode: As in Opacus.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        gradient_clip: float,
        noise_std: float,
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        # Opacus adds noise_multiplier · max_grad_norm and, with "sum", divides by nothing.
        super().__init__(
            optimizer,
            noise_multiplier=noise_std,
            max_grad_norm=1.0,
            expected_batch_size=None,
            loss_reduction="sum",
            generator=generator,
            secure_mode=secure_mode,
        )
        self.gradient_clip = gradient_clip

    def clip_and_accumulate(self) -> None:
        """Put the clipped gradient of the batch where Opacus adds its noise."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        clipped = clip_to_norm(gradients, bound=self.gradient_clip)
        for parameter, gradient in zip(self.params, clipped, strict=True):
            parameter.summed_grad = gradient

    def pre_step(self, closure: Callable[[], float] | None = None) -> Any:
        """Clip, add noise, call the hook; there are no per-sample gradients to wait for."""
        self.clip_and_accumulate()
        self.add_noise()
        if self.step_hook:
            self.step_hook(self)
        return True
