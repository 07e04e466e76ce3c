"""Gradients of rows of a data set by the described loss, on a live model that stays as it was.

Knows a model, a data set and a task; nothing of what a training did, and no optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .._validate import FloatArray, IntArray
from ..capture.collate import keeps_order, order_of_rows
from ..capture.row_losses import moved_to
from .task import Task

_SAME = 1e-3  # relative: float32 gradients by two exact methods agree far better
_SAME_TF32 = 1e-2  # ten bits of mantissa in CUDA's products
_PARTS = 8  # batches that a large one is asked in, so that rows that mix show

Gradients = list[torch.Tensor]


class RowGradients:
    """A model's gradients for rows of a data set, alone or together, by the described loss.

    Args:
        task: The described loss, and how items are joined.
        dataset: The rows.
        inner: The live module; call inside `undisturbed`.
        parameters: Those whose gradients count.
        dimension: Of the rows in a batch's tensors that have so many.
    """

    def __init__(
        self,
        task: Task,
        dataset: Any,
        inner: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        dimension: int,
    ) -> None:
        self._task, self._dataset, self._inner = task, dataset, inner
        self._dimension = dimension
        self.parameters = list(parameters)
        self.device = self.parameters[0].device

    def tolerance(self, rounding: float = 0.0, *, same: float = _SAME) -> float:
        """Return how far two exact computations may be apart, relatively; `same` in float32."""
        eps = max(float(torch.finfo(p.dtype).eps) for p in self.parameters)
        tf32 = self.device.type == "cuda" and (
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        )
        return max(_SAME_TF32 if tf32 else same, 16.0 * eps, 16.0 * rounding)

    def alone(self, row: int) -> Gradients:
        """Return the gradients of one row's own loss."""
        return self._alone(self._task.collate([self._dataset[row]], device=self.device))

    def weighted(
        self,
        rows: IntArray,
        factors: FloatArray,
        *,
        parts: int = _PARTS,
        layers: Sequence[int] | None = None,
    ) -> Gradients:
        """Return the sum of the rows' gradients, each times its factor.

        Args:
            rows: Shape (n,), in the order of the batch.
            factors: Shape (n,); or (n, layers): each layer's own, a backward pass each.
            parts: Batches that they are asked in: where rows of a batch depend on each other, the
                sum depends on it.
            layers: Positions of the parameters asked for, one per column of `factors`; None: all.
        """
        asked = self.parameters if layers is None else [self.parameters[k] for k in layers]
        total = [torch.zeros_like(p) for p in asked]
        size = max(-(-len(rows) // parts), 1)
        for start in range(0, len(rows), size):
            chosen = slice(start, start + size)
            items = [self._dataset[int(row)] for row in rows[chosen]]
            batch = self._task.collate(items)
            order = self._order(batch, items)
            weights = torch.as_tensor(factors[chosen][order])
            batch = self._task.collate(items, device=self.device)
            with torch.enable_grad():
                losses = self._task.loss_of(self._inner, batch)
                weights = weights.to(losses)
                if layers is None:
                    found = self._gradients((losses * weights).sum(), keep=False)
                else:
                    found = [
                        self._gradients(losses @ own, [p], keep=True)[0]
                        for p, own in zip(asked, weights.T, strict=True)
                    ]
            for one, more in zip(total, found, strict=True):
                one += more
        return total

    def coupling(self, rows: IntArray, *, bound: float) -> tuple[str, str] | None:
        """Return the fact that rows in one batch are not what they are alone; None: they are.

        Args:
            rows: Shape (n,), two or more.
            bound: Gradients below are taken as small.
        """
        items = [self._dataset[int(row)] for row in rows]
        batch = self._task.collate(items)
        single = [self._task.collate([item]) for item in items]
        order, why = order_of_rows(batch, single, dimension=self._dimension)
        if order is None:
            return "loss_not_checked", f"rows are not found in a batch of them: {why}"
        batch = self._task.collate(items, device=self.device)
        single = [moved_to(one, self.device) for one in single]
        with torch.no_grad():
            own = torch.cat([self._task.loss_of(self._inner, one) for one in single]).isfinite()
        with torch.enable_grad():
            losses = self._task.loss_of(self._inner, batch)
            if losses.shape != (len(rows),):
                return "loss_couples_rows", (
                    f"{len(rows)} rows have {tuple(losses.shape)} losses in one batch"
                )
            finite = own & losses.isfinite()[np.argsort(order)]
            if not bool(finite.all()) and bool((finite == own).all()):
                # Records without a loss, alone or not, are a fact of their own.
                rest = rows[finite.cpu().numpy()]
                return self.coupling(rest, bound=bound) if len(rest) > 1 else None
            joint = self._joint_difference(batch, losses.detach())
            if joint:
                return "loss_couples_rows", joint
            for position, k in enumerate(order):
                within = self._gradients(losses[position], keep=True)
                alone = self._alone(single[k])  # of the same item: asked again it may be another
                size = max(norm(alone), norm(within))
                apart = norm([a - b for a, b in zip(alone, within, strict=True)])
                if not apart <= self.tolerance() * (size + bound):
                    far = (
                        f"{apart / max(size, 1e-30):.0%}" if np.isfinite(apart) else "not a number"
                    )
                    return "loss_couples_rows", (
                        f"a row's gradient in a batch is {far} away from its gradient alone; the "
                        "loss, the model or the padding mixes rows"
                    )
        return None

    def _alone(self, batch: Any) -> Gradients:
        with torch.enable_grad():
            return self._gradients(self._task.loss_of(self._inner, batch).sum(), keep=False)

    def _order(self, batch: Any, items: list[Any]) -> Any:
        """Return which of the items each row of their batch is."""
        collate = self._task.collate_fn
        if collate is None or keeps_order(collate):
            return slice(None)
        order, why = order_of_rows(
            batch, [self._task.collate([item]) for item in items], dimension=self._dimension
        )
        if order is None:
            raise ValueError(f"rows are not found in a batch of them: {why}")
        return order

    def _joint_difference(self, batch: Any, losses: torch.Tensor) -> str:
        """Return how a criterion's joint value is not that of its rows; "": it is."""
        task = self._task
        if task.own_loss is not None or task.per_row:
            return ""
        ignored = task.ignores(batch)
        if ignored:
            return ignored
        with torch.no_grad():
            joint = float(task.batch_loss(self._inner, batch).detach())
        rows = losses.double()
        summed = getattr(task.criterion, "reduction", task.reduction) == "sum"
        own = float(rows.sum() if summed else rows.mean())
        scale = float(rows.abs().sum() if summed else rows.abs().mean())
        same = joint == own or abs(joint - own) <= self.tolerance() * scale + 1e-6
        if same or not np.isfinite(own):
            return ""
        return (
            f"the criterion's value for a batch ({joint:.4g}) is not the "
            f"{'sum' if summed else 'mean'} of its rows' own ({own:.4g})"
        )

    def _gradients(
        self, loss: torch.Tensor, parameters: Gradients | None = None, *, keep: bool
    ) -> Gradients:
        asked = self.parameters if parameters is None else parameters
        found = torch.autograd.grad(loss, asked, retain_graph=keep, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(asked, found, strict=True)
        ]


def norm(gradients: Sequence[torch.Tensor]) -> float:
    """Return the norm over all tensors, in float64."""
    return float(torch.stack([g.double().norm() for g in gradients]).norm())


def active_dropout(inner: nn.Module) -> bool:
    """Whether a module of dropout draws masks."""
    return any(isinstance(p, _DropoutNd) and p.training and p.p > 0 for p in inner.modules())


@contextmanager
def without_dropout(inner: nn.Module) -> Iterator[None]:
    """Switch modules of dropout off."""
    off = [part for part in inner.modules() if isinstance(part, _DropoutNd) and part.training]
    for part in off:
        part.training = False
    try:
        yield
    finally:
        for part in off:
            part.training = True


@contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """Run forward passes on a live module without Opacus's hooks, leaving nothing changed.

    Buffers, and attributes that a stateful model assigns in its forward pass, are put back.

    Args:
        module: What Opacus made of the user's.
    """
    inner = getattr(module, "_module", module)
    with ExitStack() as stack:
        for part in inner.modules():
            for names in (part.__dict__, part._buffers):
                stack.callback(_put_back, names, dict(names))
        for buffer in inner.buffers():
            stack.callback(_restore, buffer, buffer._version, buffer.detach().clone())
        enabled = getattr(module, "hooks_enabled", None)
        if enabled is not None:
            stack.callback(setattr, module, "hooks_enabled", enabled)
            module.hooks_enabled = False  # as Opacus does between its two backward passes
        yield


def _put_back(names: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in names if name not in before]:
        del names[name]
    for name, value in before.items():
        if names.get(name, names) is not value:
            names[name] = value


def _restore(buffer: torch.Tensor, version: int, value: torch.Tensor) -> None:
    """Write only where it is needed, since writing is noticed: torch's own norms leave no mark."""
    with torch.no_grad():
        same = (buffer == value) | ((buffer != buffer) & (value != value))
        if buffer._version != version or not bool(same.all()):
            buffer.copy_(value)
