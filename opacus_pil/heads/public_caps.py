"""Caps from a public model: how far each instance may push each output, fixed before training.

Knows a module and rows; no engine and no ledger.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .. import _validate as check
from .._validate import FloatArray
from ..capture.randomness import untouched_generators
from ..errors import UnsupportedError
from .frozen_features import FrozenFeatures
from .one_vs_rest import OneVsRest, head_of

_CHUNK = 1024


@torch.no_grad()
@check.known_keywords
def caps_from_public_model(
    module: nn.Module,
    dataset: Any,
    *,
    max_grad_norm: float | list[float],
    factor: float = 1.5,
    floor: float = 0.02,
    loss_scale: float = 1.0,
) -> FloatArray:
    """Return caps by a rule: `factor` times the gradient at a public model, plus `floor`.

    Guarantee: row i is a function of the public model and of row i of the data set alone, hence a
        constant of the run whatever other instances are in the training set: a training with these
        caps keeps the label "bound".

    Args:
        module: Trained on public data only, with the architecture that is going to be trained: an
            OneVsRest or a Linear with one output, alone or on a frozen part.
        dataset: The private training set, of pairs (input, target): class numbers or one-hot rows
            for OneVsRest, 0 or 1 for one output.
        max_grad_norm: C that training will clip to; with OneVsRest one per class, or one for all.
        factor, floor: Of the rule, public constants >= 0. A cap that is too small slows learning of
            its instance; one that is too large costs steps when it is forgotten.
        loss_scale: What the loss multiplies a row's own loss with: 1 for OneVsRestLoss and for one
            output, 1/classes for BCEWithLogitsLoss over several.

    Returns:
        Shape (instances, classes) for OneVsRest, (instances,) for one output; in [0, 1], in units
        of max_grad_norm.

    Raises:
        UnsupportedError: Another kind of model; features with erased rows.
        ValueError: Constants out of range, targets that are neither class numbers nor one-hot, or
            a row whose gradient is not finite.

    Source: pilots on MNIST, 1.5 × the residual at a model trained on public data + 0.02.
    """
    if isinstance(dataset, FrozenFeatures) and dataset.erased.any():
        raise UnsupportedError(
            f"Expected the features that are trained on, got some of which {dataset.erased.sum()} "
            "rows are erased: their caps would be others than training had. Keep the caps of "
            "training, or compute them from the original rows."
        )
    head = head_of(module)
    outputs = head.classes if isinstance(head, OneVsRest) else getattr(head, "out_features", 0)
    if head is None or (outputs != 1 and not isinstance(head, OneVsRest)):
        raise UnsupportedError(
            f"Expected a model whose only trainable part is OneVsRest or a Linear with one output, "
            f"got {type(module).__name__}. Caps of other models bound nothing that contracts."
        )
    bounds = np.asarray(
        check.real_array("max_grad_norm", max_grad_norm, low=0.0, open_low=True), dtype=np.float64
    )
    if bounds.shape not in ((), (outputs,)):
        raise ValueError(
            f"Expected max_grad_norm to be one bound or {outputs}, got {bounds.shape}. Pass those "
            "of training."
        )
    check.real("factor", factor, low=0.0)
    check.real("floor", floor, low=0.0)
    check.real("loss_scale", loss_scale, low=0.0, open_low=True)
    norms = _gradient_norms(module, head, dataset, outputs=outputs) * loss_scale
    broken = np.flatnonzero(~np.isfinite(norms).all(axis=1))
    if len(broken):
        raise ValueError(
            f"Expected finite gradients at the public model, got others (row {broken[0]}). Leave "
            "records with NaN or inf out, or put BoundedFeatures before the head."
        )
    caps: FloatArray = np.minimum(factor * norms / bounds + floor, 1.0)
    return caps if isinstance(head, OneVsRest) else caps[:, 0]


def _gradient_norms(
    module: nn.Module, head: nn.Module, dataset: Any, *, outputs: int
) -> FloatArray:
    """Return |residual| · ‖features‖ of every row and output, shape (rows, outputs)."""
    device = next(head.parameters()).device
    biased = getattr(head, "bias", None) is not None
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    modes = {part: part.training for part in module.modules()}
    found = []
    try:
        module.eval()
        with untouched_generators(device):
            for start in range(0, len(dataset), _CHUNK):
                rows = [dataset[k] for k in range(start, min(start + _CHUNK, len(dataset)))]
                inputs = torch.stack([torch.as_tensor(x) for x, _ in rows]).to(device)
                targets = torch.stack([torch.as_tensor(y) for _, y in rows]).to(device)
                seen.clear()
                logits = module(inputs)
                features = seen[-1].double()
                norms = (features.square().sum(dim=1) + float(biased)).sqrt()
                residuals = logits.double().sigmoid() - _wanted(targets, outputs)
                found.append((residuals.abs() * norms[:, None]).cpu().numpy())
    finally:
        hook.remove()
        for part, mode in modes.items():
            part.training = mode
    return np.concatenate(found)


def _wanted(targets: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return targets as numbers in [0, 1] per output."""
    if outputs > 1 and targets.ndim == 1 and not targets.is_floating_point():
        return torch.nn.functional.one_hot(targets, outputs).double()
    wanted = targets.double().reshape(len(targets), -1)
    if wanted.shape[1] != outputs or not bool(((wanted >= 0) & (wanted <= 1)).all()):
        raise ValueError(
            f"Expected class numbers or targets in [0, 1] for {outputs} outputs, got shape "
            f"{tuple(targets.shape)}. Pass the data set that is trained on."
        )
    return wanted
