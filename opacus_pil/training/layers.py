"""Clip bounds of layers that an optimizer clips one by one, and what they leave of a gradient.

Knows Opacus's optimizers; no ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def named_bounds(optimizer: Any, module: nn.Module) -> dict[str, float] | None:
    """Return each parameter's own clip bound; None: all are clipped together."""
    bounds = getattr(optimizer, "max_grad_norms", None)
    if bounds is None:
        return None
    own = dict(zip(map(id, optimizer.params), map(float, bounds), strict=False))
    return {name: own.get(id(p), math.inf) for name, p in module.named_parameters()}


def norm_left(optimizer: Any, gradients: Sequence[torch.Tensor]) -> float:
    """Return what a recorder keeps of one row's gradients: per layer, what its bound leaves."""
    bounds = getattr(optimizer, "max_grad_norms", None)
    layers = [float(g.double().norm()) for g in gradients]
    if bounds is not None:
        limits = [*map(float, bounds), *[math.inf] * len(layers)]
        layers = [min(a, b) for a, b in zip(layers, limits, strict=False)]
    return math.hypot(*layers)
