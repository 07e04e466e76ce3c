"""Whether the noise of noisy fine-tuning leaves anything of a model.

Knows constants of a certificate and sizes of weights; runs nothing.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn as nn

from ..certificates import Certificate, NoisyFineTuningCertificate


def warn_if_drowned(module: nn.Module, certificate: Certificate, *, steps: int) -> None:
    """Warn where a run by its own constants would leave little of the model."""
    if not isinstance(certificate, NoisyFineTuningCertificate):
        return
    found = drowned(module, certificate, steps=steps)
    if found:
        warnings.warn(
            f"noisy_finetuning: {found}. Its certificate asks for noise of the order of the "
            "weights; look at options(score=...), or retrain.",
            stacklevel=5,  # whoever called plan, past check.known_keywords
        )


@torch.no_grad()
def drowned(module: nn.Module, certificate: NoisyFineTuningCertificate, *, steps: int) -> str:
    """Say how the noise that a run leaves is larger than the weights; "": it is not.

    The noise on each parameter after the last step, what decay has taken of it included, against
    the root mean square of the weights, clipped as the run clips them. The gradients of a few steps
    bring little of a model back from noise of that size.

    Args:
        module: Plain, before the run.
        certificate: Whose constants the run follows.
        steps: Of the run.
    """
    held = [p.detach().double().flatten() for p in module.parameters()]
    count = sum(map(len, held))
    if not steps or not count:
        return ""
    length = min(float(torch.cat(held).norm()), certificate.model_clip)
    weights = length / math.sqrt(count)
    noise = _noise_left(certificate, steps)
    if noise <= weights:
        return ""
    return (
        f"the noise left on every parameter has standard deviation {noise:.3g}, the weights are "
        f"{weights:.3g} in root mean square: little of the model will be left"
    )


def _noise_left(certificate: NoisyFineTuningCertificate, steps: int) -> float:
    """Return the standard deviation of what all steps' noise is at the end."""
    keeps = 1.0 - certificate.step_size * certificate.weight_decay
    noise = certificate.noise_std
    variance = 0.0
    for step in range(steps):
        std = noise if isinstance(noise, int | float) else noise[min(step, len(noise) - 1)]
        variance = keeps * keeps * variance + float(std) ** 2
    return math.sqrt(variance)
