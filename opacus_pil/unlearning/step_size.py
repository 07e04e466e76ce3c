"""Whether steps of an optimizer move a model at all.

Knows settings of an optimizer and sizes of parameters; no training.
"""

from __future__ import annotations

import math

import torch

from ..errors import CertificateError


def require_moving_steps(optimizer: torch.optim.Optimizer, *, noise_std: float | None) -> None:
    """Raise where every step would leave the model where it is, as at the end of a schedule.

    A step size of 0 is such a case. So is one whose noise rounds away: below a quarter of the
    spacing of floating-point numbers at the parameters' root mean square, adding it gives back the
    parameter it was added to. Of optimizers that normalise gradients the step size itself is held
    against that, of SGD the step size times the noise.

    Args:
        optimizer: Plain.
        noise_std: On the gradient that the optimizer is given, per parameter; None: no noise.

    Raises:
        CertificateError: In all of its groups.
    """
    scale = _scale(optimizer, noise_std)
    reach, spacing = 0.0, math.inf
    for group in optimizer.param_groups:
        rate = float(group.get("lr", math.inf))
        held = [p for p in group["params"] if p.requires_grad and p.numel()]
        if not held or rate == 0.0:
            continue
        step = rate * scale
        resolution = min(map(_spacing, held)) / 4.0
        if not step < resolution:
            return
        reach, spacing = max(reach, step), min(spacing, resolution)
    found = "0 in every parameter group"
    if reach > 0.0:
        found = f"so small that a step moves by {reach:.2g}, less than the rounding ({spacing:.2g})"
    raise CertificateError(
        f"Expected a step size that moves the model, got one that is {found}: a schedule that has "
        "run to its end? Such steps forget nothing. Set the optimizer's lr to that of training."
    )


def _scale(optimizer: torch.optim.Optimizer, noise_std: float | None) -> float:
    """Return how long a step is in units of the step size."""
    plain = isinstance(optimizer, torch.optim.SGD)
    return noise_std if plain and noise_std is not None else 1.0


@torch.no_grad()
def _spacing(parameter: torch.Tensor) -> float:
    """Return the distance of floating-point numbers at a parameter's root mean square."""
    size = float(parameter.double().square().mean().sqrt())
    info = torch.finfo(parameter.dtype)
    return max(size * info.eps, info.tiny) if math.isfinite(size) else 0.0
