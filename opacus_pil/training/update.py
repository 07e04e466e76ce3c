"""How a noisy gradient moves a model, in words: equal words mean equal steps.

Knows settings of optimizers; no gradient, no ledger and no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer


def described_update(
    optimizer: Optimizer,
    *,
    clip_bound: float,
    noise_std: float,
    divisor: int | None,
    loss_reduction: str,
    batches: int,
    default_batches: bool,
) -> str:
    """Return in words what makes a step of a batch; equal words mean equal steps.

    Args:
        optimizer: The plain one.
        clip_bound: That gradients are clipped to.
        noise_std: On their sum.
        divisor: What a mean is divided by.
        loss_reduction: "mean" or "sum".
        batches: How many drawn batches the step may have summed.
        default_batches: Whether torch's default_collate joins the data set's items to a batch.
    """
    return (
        f"{type(optimizer).__name__} {described_groups(optimizer)}, {batches} drawn, clipped to "
        f"{float(clip_bound)!r}, noise {float(noise_std)!r} on the {loss_reduction}, over "
        f"{divisor}, joined by {'default_collate' if default_batches else 'another collate_fn'}"
    )


def described_groups(optimizer: Optimizer) -> str:
    """Return the settings of all groups, numbers with every digit, whatever their type."""
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "initial_lr")}
        for group in optimizer.param_groups
    ]
    return repr(groups)


def _plain(value: Any) -> Any:
    """Return a setting as Python numbers: a tensor prints four digits only."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if type(value) is int else value


def adaptive_noise(noise_multiplier: float, unclipped_num_std: float) -> tuple[float, float]:
    """Return adaptive clipping's noise on gradients, and its count's shift in units of that noise.

    It splits the nominal noise: gradients get (z^-2 - (2σ)^-2)^(-1/2), the count of unclipped rows
    gets σ. The count is a sum of zeros and ones, so that an instance moves it by 1, not by the 1/2
    that the split assumes.

    Source: Andrew et al. (2021), arXiv:1905.03871, Theorem 1, as in Opacus's AdaClipDPOptimizer.

    >>> adaptive_noise(1.0, 10.0)[1] > 0.1
    True
    """
    if noise_multiplier == 0.0:
        return 0.0, 0.0
    noise = (noise_multiplier**-2 - (2.0 * unclipped_num_std) ** -2) ** -0.5
    return noise, noise / unclipped_num_std
