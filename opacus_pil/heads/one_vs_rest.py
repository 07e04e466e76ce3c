"""OneVsRest: a classifier of several outputs that are trained, clipped and proved one by one.

Knows tensors; no engine, no ledger and no data set. Which module of a model is its head is read
here too, because everything that treats a head in its own way has to agree on that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from .. import _validate as check


class OneVsRest(nn.Module):
    """One linear output per class, each with a parameter tensor of its own and no bias.

    Guarantee: with `OneVsRestLoss` (or BCEWithLogitsLoss on one-hot targets) and Opacus's
        clipping="per_layer", each output is a logistic regression whose clipped training contracts
        by itself; a single Linear with as many outputs, separate biases, or flat clipping of all
        outputs together do not.

    Args:
        features: Length of the feature vectors; a bias is one of them (`BoundedFeatures`).
        classes: Number of outputs, >= 1.

    Shape: (batch, features) to logits (batch, classes). `parameters()` yields one (1, features)
        tensor per class, in their order; all start at 0, so that nobody's class is favoured.

    Raises:
        ValueError: features or classes below 1.

    Source: clipping of a one-output GLM keeps convexity, Song, Steinke, Thakkar, Thakurta (2021),
        arXiv:2006.06783; one output after the other, see `certificates/glm.py`.

    >>> OneVsRest(3, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.features = check.integer("features", features, low=1)
        self.classes = check.integer("classes", classes, low=1)
        outputs = [nn.Linear(self.features, 1, bias=False) for _ in range(self.classes)]
        for output in outputs:
            nn.init.zeros_(output.weight)
        self.outputs = nn.ModuleList(outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (batch, classes)."""
        return torch.cat([output(features) for output in self.outputs], dim=1)

    def extra_repr(self) -> str:
        """Return the arguments, for a printed model."""
        return f"features={self.features}, classes={self.classes}"


class OneVsRestLoss(nn.Module):
    """Sum over the classes of the binary cross-entropy of "this class or another".

    Guarantee: convex in each logit, with derivative in [−1, 1] that changes by at most 1/4 per
        unit, and no term that joins two outputs.

    Args:
        reduction: Over the rows: "mean", "sum" or "none".

    Shape: logits (batch, classes) and class numbers (batch,) to a scalar, or (batch,).

    Raises:
        ValueError: Another reduction; targets that are no class numbers of the logits' classes.

    >>> OneVsRestLoss()(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).item() / 3 < 0.6932
    True
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = check.choice("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss; see the class."""
        if targets.shape != logits.shape[:1] or targets.is_floating_point():
            raise ValueError(
                f"Expected one class number per row, got targets of shape {tuple(targets.shape)} "
                f"and type {targets.dtype} for logits of shape {tuple(logits.shape)}. Pass class "
                "numbers, shape (batch,)."
            )
        wanted = one_hot(targets, logits.shape[1]).to(logits)
        losses = binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()


def head_of(module: nn.Module) -> nn.Module | None:
    """Return the one part that holds all trainable parameters: OneVsRest or Linear; else None.

    Args:
        module: Plain; the head itself, a Sequential that ends with it, or any other module.

    Edge cases (first match wins):
        nothing is trainable                       None
        a trainable parameter outside of the part  None
        an OneVsRest with some outputs frozen      None
    """
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    for part in _parts(module):
        own = [id(p) for p in part.parameters()]
        if trainable and set(own) == trainable:
            return part
    return None


def one_vs_rest_of(module: nn.Module) -> OneVsRest | None:
    """Return the head of a model if it is an OneVsRest; None: another head, or none."""
    head = head_of(module)
    return head if isinstance(head, OneVsRest) else None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that could be heads, the whole before what is in it."""
    for part in module.modules():
        if type(part) in (OneVsRest, nn.Linear):
            yield part
