"""How far each instance's last-layer features lie from those of all others.

Knows a matrix of features. Does not know labels, losses or gradients: leverage is geometry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn

from .. import _validate as check
from .._validate import FloatArray
from .gap import evaluation_mode


def last_layer_leverage(features: npt.ArrayLike, *, ridge: float) -> FloatArray:
    """Return h_i = x̃_iᵀ (X̃ᵀX̃ + ridge·I)⁻¹ x̃_i of every instance, x̃ = (x, 1).

    The share that an instance has in its own fit if the last layer were a ridge regression; the
    1 in x̃ stands for the bias and is shrunk with the rest.

    Args:
        features: Shape (instances, features), inputs of the last layer, finite.
        ridge: λ > 0, in the unit of the features squared. A small one, such as 1e-3 of the mean
            square norm, leaves ranks almost as at 0.

    Returns:
        Shape (instances,), in (0, 1); higher is more influential. The sum is the effective number
        of features.

    Raises:
        TypeError, ValueError: Another shape, a value that is not finite (names the first row), or
            a ridge that is not > 0.

    Edge cases:
        no features (n, 0)   1 / (n + ridge) each: the bias alone

    Source: leverage scores of the last layer, arXiv:2602.15919; the formula is the hat matrix's
        diagonal of ridge regression, Hoerl and Kennard (1970).
    Privacy: depends on private data; not private to release.

    >>> last_layer_leverage([[1.0], [1.0], [-2.0]], ridge=1e-9).round(3)
    array([0.5, 0.5, 1. ])
    """
    measured = check.real_array("features", features, cure="Did the training diverge?")
    if measured.ndim != 2 or not len(measured):
        raise ValueError(
            check.expected("features", "of shape (instances, features)", measured.shape)
        )
    weight = check.real("ridge", ridge, low=0.0, open_low=True)
    wide = np.hstack([measured, np.ones((len(measured), 1))])
    gram = wide.T @ wide + weight * np.eye(wide.shape[1])
    found = (wide * cho_solve(cho_factor(gram, lower=True), wide.T).T).sum(axis=1)
    return np.asarray(np.clip(found, 0.0, 1.0))


def last_layer_features(module: nn.Module, x: Tensor, *, batch_size: int = 512) -> FloatArray:
    """Return the inputs of a module's last linear layer, shape (instances, features).

    Args:
        module: Plain; the layer is the last `nn.Linear` among its modules. Evaluated in eval mode,
            its modes are restored.
        x: Inputs, shape (instances, …).
        batch_size: Rows per forward pass, >= 1.

    Raises:
        ValueError: No linear layer, or one that sees something else than one vector per instance.

    Privacy: depends on private data; not private to release.
    """
    rows = check.integer("batch_size", batch_size, low=1)
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise ValueError(
            f"Expected a module with an nn.Linear, got {type(module).__name__} without one. Pass "
            "features of your own to last_layer_leverage."
        )
    seen: list[Tensor] = []

    def keep(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach().double().cpu())

    handle = layers[-1].register_forward_pre_hook(keep)
    try:
        with evaluation_mode(module), torch.no_grad():
            for part in x.split(rows):
                module(part)
    finally:
        handle.remove()
    features = torch.cat(seen)
    if features.shape[:-1] != x.shape[:1]:
        raise ValueError(
            "Expected one vector per instance at the last linear layer, got inputs of shape "
            f"{tuple(features.shape)} for {len(x)} instances. Pass features of your own."
        )
    return np.asarray(features)
