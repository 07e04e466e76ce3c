"""Task: the one description of what a training minimises and how its batches are joined.

Sweeps, unlearning, calibration, oracles and evaluation all ask here, so that they train and measure
what was trained. Knows models and batches; no optimizer and no accountant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from ..capture.row_losses import LossOf, moved_to, pair_loss, typed_pair
from ..errors import UnsupportedError

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Task:
    """What a training minimises, as far as it was named.

    Attributes:
        criterion: Loss of (outputs, targets) for batches that are such pairs; None: not named.
        own_loss: The caller's loss_of(module, batch) -> one loss per row; None: the criterion's.
        collate_fn: Joins items to a batch; None: torch's default_collate.
        reduction: "mean" or "sum" over the rows of a batch.
        per_row: Whether the training asks the criterion for one loss per row, as ghost clipping
            does, instead of a joint one.
    """

    criterion: Any = None
    own_loss: LossOf | None = None
    collate_fn: Collate | None = None
    reduction: str = "mean"
    per_row: bool = False

    @property
    def named(self) -> bool:
        """Whether there is a loss to measure or train with."""
        return self.criterion is not None or self.own_loss is not None

    @property
    def pairs(self) -> bool:
        """Whether batches are taken as pairs (inputs, targets)."""
        return self.own_loss is None

    def loss_of(self, module: Any, batch: Any) -> torch.Tensor:
        """Return one loss per row, shape (rows,): what each row's gradient is the gradient of.

        Raises:
            ValueError: No loss was named.
            UnsupportedError: A batch that is no pair, without a `loss_of`; or a loss that is not
                one value per row.
        """
        if not self.named:
            raise ValueError(
                "Expected the training's loss to be named, got none. Pass criterion= or loss_of= "
                "to make_private, attach or UnlearningEngine."
            )
        own = self.own_loss or pair_loss(self.criterion, reduction=self.reduction)
        losses = own(module, batch)
        if losses.ndim != 1:
            raise UnsupportedError(
                f"Expected one loss per row, shape (rows,), got shape {tuple(losses.shape)}. Let "
                "loss_of return them unreduced."
            )
        return losses

    def batch_loss(self, module: Any, batch: Any) -> torch.Tensor:
        """Return the scalar that a plain training step would call backward() on.

        Floating inputs and targets are given the module's dtype, as in `loss_of`.
        """
        if self.own_loss is None and self.criterion is not None:
            inputs, targets = typed_pair(module, batch)
            found: torch.Tensor = self.criterion(module(inputs), targets)
            if found.ndim == 0:
                return found
        losses = self.loss_of(module, batch)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def collate(self, items: Sequence[Any], *, device: torch.device | None = None) -> Any:
        """Join items to a batch as the training does, on a device."""
        batch = (self.collate_fn or default_collate)(list(items))
        return batch if device is None else moved_to(batch, device)

    def coupling(self) -> str:
        """Return how the criterion's own settings make rows depend on each other; "": they do not.

        A weighted mean divides by the weights of the whole batch. Ignored targets are another such
        case, which depends on the data: `ignores`.
        """
        if self.own_loss is not None or self.per_row:
            return ""
        weighted = getattr(self.criterion, "weight", None) is not None
        losses = (nn.CrossEntropyLoss, nn.NLLLoss)  # others divide by the number of terms
        if weighted and isinstance(self.criterion, losses) and self._mean:
            return (
                f"{type(self.criterion).__name__} with class weights and reduction='mean' divides "
                "by the weights of the whole batch. Use reduction='none', weight each row and take "
                "the mean over rows, or pass loss_of"
            )
        return ""

    def ignores(self, batch: Any) -> str:
        """Return how ignored targets of this batch couple its rows; "": they do not."""
        ignored = getattr(self.criterion, "ignore_index", None)
        if ignored is None or self.own_loss is not None or self.per_row or not self._mean:
            return ""
        if not (isinstance(batch, list | tuple) and len(batch) == 2 and torch.is_tensor(batch[1])):
            return ""
        if batch[1].is_floating_point() or not bool((batch[1] == ignored).any()):
            return ""
        return (
            f"{type(self.criterion).__name__} with reduction='mean' divides by the number of "
            f"targets in the whole batch that are not ignore_index={ignored}. Take each row's own "
            "mean, or pass loss_of"
        )

    @property
    def _mean(self) -> bool:
        return getattr(self.criterion, "reduction", None) == "mean"


def training_mode(module: nn.Module, *, evaluated: frozenset[str] = frozenset()) -> None:
    """Put a module into training mode, except what never trains and never updates.

    Args:
        module: Plain.
        evaluated: Names of submodules that were in evaluation mode during training.
    """
    frozen = {
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._NormBase)
        and not any(p.requires_grad for p in part.parameters())
    }
    module.train()
    for name, part in module.named_modules():
        if name in frozen or name in evaluated:
            part.training = False


def evaluated_parts(
    module: nn.Module, *, among: frozenset[str] | None = None
) -> frozenset[str]:  # fmt: skip
    """Return the names of submodules in evaluation mode; of `among`, if it is given."""
    if among is not None and not among:
        return among
    found = frozenset(name for name, part in module.named_modules() if not part.training)
    return found if among is None else found & among
