"""How far each per-sample gradient is scaled down: Opacus's flat clip, with per-instance caps.

Knows norms, bounds and caps; not where they come from.
"""

from __future__ import annotations

import numpy.typing as npt
import torch

from .. import _validate as check
from .._validate import FloatArray


def checked_caps(caps: npt.ArrayLike, *, num_instances: int) -> FloatArray:
    """Return caps as a float64 vector over all instances, each in [0, 1], or raise.

    Args:
        caps: Shape (instances,), clipping bounds in units of max_grad_norm.
        num_instances: Size of the training set.
    """
    array = check.real_array(
        "caps", caps, low=0.0, high=1.0,
        cure="A cap is a clipping bound divided by max_grad_norm; 1 is Opacus's own clip.",
    ).copy()  # fmt: skip
    check.same_length("caps", array, "instances", num_instances)
    return array


def clip_factors(
    norms: torch.Tensor, *, max_grad_norm: float, caps: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the factor of each per-sample gradient, shape (batch,).

    Guarantee: factor * norm <= cap * max_grad_norm, up to rounding in the dtype of `norms`.

    Args:
        norms: Shape (batch,), unclipped per-sample gradient norms.
        max_grad_norm: Opacus's clip bound, > 0.
        caps: Shape (batch,), in units of max_grad_norm; None and all ones are Opacus's clip, bit
            for bit.

    Edge cases (first match wins):
        cap = 0     0; drop such rows before multiplying, since 0 · NaN is NaN
        norm = 0    1

    >>> clip_factors(torch.tensor([2.0, 2.0]), max_grad_norm=1.0, caps=torch.tensor([1.0, 0.5]))
    tensor([0.5000, 0.2500])
    """
    factors = max_grad_norm / (norms + 1e-6)
    if caps is not None:
        factors = torch.where(caps > 0, factors * caps.to(factors), torch.zeros_like(factors))
    return factors.clamp(max=1.0)
