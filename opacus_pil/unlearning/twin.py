"""A model out of Opacus's hands, and its twin: a copy that carries nothing of the training over.

Knows modules and wrappers; the optimizer's twin is `optimizer_copy.py`.
"""

from __future__ import annotations

import torch.nn as nn
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks

from ..capture.unhooked import measurable_copy


def plain_module(module: nn.Module) -> nn.Module:
    """Return the user's own module from inside Opacus's wrapper."""
    if isinstance(module, AbstractGradSampleModule | AbstractGradSampleHooks):
        inner: nn.Module = module._module
        return inner
    return module


def twin_of(module: nn.Module) -> nn.Module:
    """Return a copy of the user's module that shares nothing with Opacus, in the same modes.

    Opacus hangs per-sample and summed gradients on the original; a copy must not carry them over,
    because they were computed with the instances that are to be forgotten.
    """
    twin = measurable_copy(module)
    for mine, theirs in zip(plain_module(module).modules(), twin.modules(), strict=True):
        theirs.training = mine.training
    return twin


def with_still_statistics(module: nn.Module) -> nn.Module:
    """Return the module itself; a copy where a frozen BatchNorm of it is in training mode.

    While training it was in evaluation mode, and every pass leaves it there; the caller's module is
    not touched.
    """
    woken = [
        part
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._NormBase)
        and part.training
        and part.track_running_stats
        and not any(p.requires_grad for p in part.parameters())
    ]
    if not woken:
        return module
    for part in woken:
        part.training = False
    try:
        return twin_of(module)
    finally:
        for part in woken:
            part.training = True
