"""What contraction needs to know of a loss: convex in the outputs, how smooth, how steep.

Knows loss modules of torch and of `heads`; no model and no run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.nn as nn

from ..heads import OneVsRestLoss

_ROOT_2 = math.sqrt(2.0)


class ConvexLoss(NamedTuple):
    """A loss, convex in the linear outputs of a model.

    Attributes:
        smoothness: Lipschitz constant of its gradient in the outputs.
        steepest: Largest norm of that gradient, of one output where outputs are apart.
        apart: Whether it is a sum of terms in one output each.
    """

    smoothness: float
    steepest: float
    apart: bool


def convex_loss(criterion: Any, *, outputs: int) -> ConvexLoss | None:
    """Return the constants of a loss on so many outputs; None: none are known.

    Edge cases (first match wins):
        hooks, or a forward of its own               None
        class weights, pos_weight, label_smoothing   None
        BCEWithLogitsLoss                            its mean over outputs divides by their number
    """
    kind = type(criterion)
    settings = ("weight", "pos_weight", "label_smoothing")
    if any(_set(getattr(criterion, name, None)) for name in settings) or _altered(criterion):
        return None
    if kind is OneVsRestLoss:
        return ConvexLoss(0.25, 1.0, True)
    if kind is nn.BCEWithLogitsLoss:
        return ConvexLoss(0.25 / outputs, 1.0 / outputs, True)
    if kind is nn.CrossEntropyLoss and outputs > 1:
        return ConvexLoss(0.5, _ROOT_2, False)
    if kind is nn.HuberLoss and outputs == 1:
        return ConvexLoss(1.0, float(criterion.delta), True)
    if kind is nn.SmoothL1Loss and outputs == 1 and criterion.beta > 0.0:
        return ConvexLoss(1.0 / float(criterion.beta), 1.0, True)
    return None


def _altered(criterion: Any) -> bool:
    """Whether a loss module computes something else than its class does."""
    if not isinstance(criterion, nn.Module):
        return False
    hooks = (criterion._forward_pre_hooks, criterion._forward_hooks, criterion._backward_hooks)
    return "forward" in vars(criterion) or any(map(len, hooks))


def _set(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value == 0.0)
