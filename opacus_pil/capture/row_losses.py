"""One loss per row of a batch: what a row's gradient is the gradient of.

From a criterion and batches that are pairs (inputs, targets). Other batches are described by the
caller's own `loss_of(module, batch)`. Knows no data set and no optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError

LossOf = Callable[[Any, Any], torch.Tensor]  # (module, batch) -> one loss per row


def pair_loss(criterion: Callable[..., torch.Tensor], *, reduction: str) -> LossOf:
    """Return `loss_of` for batches that are pairs (inputs, targets).

    Guarantee: entry i is row i's own loss as Opacus clips its gradient: a mean over the batch is
        undone. Floating inputs and targets are given the parameters' dtype.

    Args:
        criterion: Loss of (outputs, targets). With a `reduction` attribute it is asked for one loss
            per row; a function of none is called on each row by itself.
        reduction: "mean" or "sum": how a loss with several terms per row (pixels, tokens) joins
            them where the criterion does not say so itself.
    """
    losses_of = _per_row(criterion, reduction)

    def loss_of(module: Any, batch: Any) -> torch.Tensor:
        inputs, targets = typed_pair(module, batch)
        return losses_of(module(inputs), targets)

    return loss_of


def typed_pair(module: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of a batch that is a pair; floating ones in the module's dtype.

    Raises:
        UnsupportedError: Another kind of batch.
    """
    inputs, targets = as_pair(batch)
    dtype = _floating_dtype(module)
    return _cast(inputs, dtype), _cast(targets, dtype)


def as_pair(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of a batch that is a pair of tensors.

    Raises:
        UnsupportedError: Another kind of batch.
    """
    if not (isinstance(batch, Sequence) and len(batch) == 2 and all(map(torch.is_tensor, batch))):
        raise UnsupportedError(
            f"Expected batches to be a pair of tensors (inputs, targets), got {_kind(batch)}. Pass "
            "loss_of=, a function (module, batch) -> one loss per row."
        )
    return batch[0], batch[1]


def moved_to(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor of its lists, tuples and mappings on `device`."""
    if torch.is_tensor(batch):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: moved_to(value, device) for key, value in batch.items()}
        # A transformers BatchEncoding or another mapping of its own keeps its attributes.
        return moved if type(batch) is dict else _like_mapping(batch, moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved_to(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)([moved_to(value, device) for value in batch])
    return batch


def _like_mapping(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    twin = copy.copy(batch)
    try:
        for key, value in moved.items():
            twin[key] = value  # type: ignore[index]
    except TypeError:  # a mapping that cannot be written to
        return moved
    return twin


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with keys {sorted(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"{type(batch).__name__} of {len(batch)}"
    return type(batch).__name__


def _floating_dtype(module: Any) -> torch.dtype | None:
    inner = getattr(module, "_module", module)
    for parameter in inner.parameters() if isinstance(inner, torch.nn.Module) else ():
        if parameter.is_floating_point():
            dtype: torch.dtype = parameter.dtype
            return dtype
    return None


def _cast(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _per_row(
    criterion: Callable[..., torch.Tensor], reduction: str
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return a function of outputs and targets giving one loss per row."""
    own = getattr(criterion, "reduction", None)
    if own is None:

        def one_by_one(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
            losses = [
                criterion(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))
            ]
            if not losses:
                return outputs.reshape(-1)[:0]
            return torch.stack(
                [_joined_terms(loss.reshape(1, -1), reduction)[0] for loss in losses]
            )

        return one_by_one
    apart = copy.copy(criterion)  # the user's own criterion keeps its reduction
    apart.reduction = "none"  # type: ignore[attr-defined]
    how = {"mean": "mean", "sum": "sum", "batchmean": "sum"}.get(own, reduction)

    def together(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        losses = apart(outputs, targets)
        size = len(targets)
        if losses.ndim == 0 or len(losses) != size:
            raise UnsupportedError(
                f"Expected criterion to give one loss per instance with reduction='none' ({size}), "
                f"got shape {tuple(losses.shape)}. Reshape outputs and targets to (batch, ...)."
            )
        return _joined_terms(losses.reshape(size, math.prod(losses.shape[1:])), how)

    return together


def _joined_terms(losses: torch.Tensor, how: str) -> torch.Tensor:
    return losses.mean(dim=1) if how == "mean" else losses.sum(dim=1)
