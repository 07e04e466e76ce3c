"""Rehearsal: the described training on two retained rows, before anything is planned or run.

What a run could only fail at in its middle is refused here: batches that are no pairs, losses that
are not one per row, shapes and types that do not fit. Works on a copy and leaves generators as they
were. Knows the state of a model; no ledger and no certificate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from .._validate import IntArray
from ..capture.collate import order_of_rows
from ..capture.randomness import untouched_generators
from ..capture.row_losses import typed_pair
from ..errors import CertificateError, UnsupportedError
from ..training.task import Task, training_mode
from .optimizer_copy import fresh_optimizer
from .state import TrainedState
from .twin import twin_of

_SAME = 1e-3  # relative: losses of one row in two batches; float32 sums agree far better
_CURE = (
    "Describe what the training loop does: UnlearningEngine(..., loss_of=f), f(module, batch) -> "
    "one loss per row, unreduced; collate_fn= if it joins items to batches itself."
)


@dataclass(frozen=True)
class Rehearsal:
    """What two rows have shown.

    Attributes:
        random_rows: Items are others when they are asked for again, by augmentation for one.
        coupling: How rows of a batch depend on each other, or why that could not be seen; "": each
            one's loss is its own, as far as it was compared.
        compared: Rows alone were held against rows in a batch; a random forward pass shows nothing.
    """

    random_rows: bool
    coupling: str
    compared: bool

    @property
    def codes(self) -> tuple[str, ...]:
        """What a certificate takes for granted about the rows: codes of its context."""
        codes = () if self.compared else ("rows_independent_not_checked",)
        return (*codes, "augmentation_random") if self.random_rows else codes

    def require_independent_rows(self) -> None:
        """Raise where no certificate can speak of single rows.

        Raises:
            CertificateError: Names what mixes them.
        """
        if self.coupling:
            raise CertificateError(
                f"Expected each row's loss to depend on that row alone, got one that does not: "
                f"{self.coupling}. {_CURE}"
            )


class Rehearsals:
    """Rehearsals of a trained model as it is: two rows that stay are looked at once.

    Args:
        state: Of the model, which may move on; then they are looked at again.
    """

    def __init__(self, state: TrainedState) -> None:
        self._state = state
        self._seen: dict[tuple[Any, ...], Rehearsal] = {}

    def without(self, rows: IntArray) -> Rehearsal:
        """Return what the first and the last row show that stay when these `rows` go.

        Raises:
            UnsupportedError: The training cannot be run as it is described.
        """
        state = self._state
        stay = np.setdiff1d(state.retain_set, rows)
        shown = np.unique(stay[[0, -1]])
        key = (state.model_hash, *shown.tolist())
        if key not in self._seen:
            self._seen[key] = rehearsed(
                state.task,
                module=state.module,
                optimizer=state.optimizer,
                dataset=state.data.dataset,
                rows=shown,
                evaluated=state.evaluated,
            )
        return self._seen[key]


def rehearsed(
    task: Task,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    rows: IntArray,
    evaluated: frozenset[str],
) -> Rehearsal:
    """Run the task's forward pass and loss once, as the steps of a run would.

    Args:
        task: What is minimised.
        module: Plain; a copy of it is used.
        optimizer: Of its parameters; a run makes another one like it.
        dataset: The training set.
        rows: Some rows that stay, at least one.
        evaluated: Submodules that were in evaluation mode while training.

    Raises:
        UnsupportedError: It cannot be run as described; says what failed, and the cure.
        ValueError: The optimizer is of another module.
    """
    if not task.named:
        raise UnsupportedError(
            "Expected the training's loss to be named, got none. Pass criterion= or loss_of= to "
            "make_private, attach or UnlearningEngine."
        )
    twin = twin_of(module)
    fresh_optimizer(optimizer, module=module, twin=twin)
    training_mode(twin, evaluated=evaluated)
    device = next(twin.parameters()).device
    with untouched_generators(device) as moved:
        items = [dataset[int(row)] for row in rows]
        again = [dataset[int(row)] for row in rows]
        random = moved() or _are_others(items, again)
        batch = _tried("joining items to a batch", lambda: task.collate(items, device=device))
        with torch.enable_grad():
            _require_loss(task, twin, batch, rows=len(rows))
    twin.eval()  # what dropout draws is no coupling
    with untouched_generators(device) as moved:
        found = _seen_coupling(task, twin, batch, again)
        compared = not moved()
    coupling = task.coupling() or task.ignores(batch) or (found if compared else "")
    return Rehearsal(bool(random), coupling, compared)


def _are_others(items: list[Any], again: list[Any]) -> bool:
    """Whether items are others when they are asked for a second time."""
    return any(
        order_of_rows([first], [[second]])[0] is None
        for first, second in zip(items, again, strict=True)
    )


def _require_loss(task: Task, twin: nn.Module, batch: Any, *, rows: int) -> None:
    """Raise unless a batch has a loss that can be descended on, and rows have one each if asked."""
    loss = _tried("the forward pass or the loss", lambda: task.batch_loss(twin, batch))
    if not (torch.is_tensor(loss) and loss.numel() == 1 and loss.requires_grad):
        found = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        raise UnsupportedError(
            f"Expected the loss of a batch to be one number with a gradient, got {found}. {_CURE}"
        )
    if not task.per_row and task.own_loss is None:
        return
    losses = _tried("the loss of each row", lambda: _clipped_losses(task, twin, batch))
    if tuple(losses.shape) != (rows,):
        raise UnsupportedError(
            f"Expected one loss per row, shape ({rows},), got shape {tuple(losses.shape)}, which "
            "ghost clipping would multiply by all rows' factors: nothing would be clipped. "
            f"Squeeze outputs or targets. {_CURE}"
        )


def _seen_coupling(task: Task, twin: nn.Module, batch: Any, items: list[Any]) -> str:
    """Return `_coupling`, or why rows alone could not be looked at."""
    try:
        return _coupling(task, twin, batch, items)
    except Exception as error:  # a foreign function may fail on one row in any way
        return f"the loss of single rows could not be asked for: {_first_line(error)}"


def _clipped_losses(task: Task, twin: nn.Module, batch: Any) -> torch.Tensor:
    """Return the losses that ghost clipping would multiply by the rows' factors."""
    if task.own_loss is not None:
        return task.loss_of(twin, batch)
    inputs, targets = typed_pair(twin, batch)
    before = getattr(task.criterion, "reduction", None)
    task.criterion.reduction = "none"  # as Opacus asks it
    try:
        losses: torch.Tensor = task.criterion(twin(inputs), targets)
    finally:
        task.criterion.reduction = before
    return losses


@torch.no_grad()
def _coupling(task: Task, twin: nn.Module, batch: Any, items: list[Any]) -> str:
    """Return how rows in one batch are not what they are alone; "": they are."""
    device = next(twin.parameters()).device
    together = task.loss_of(twin, batch).double()
    alone = torch.cat(
        [task.loss_of(twin, task.collate([item], device=device)).double() for item in items]
    )
    if alone.shape != together.shape:
        return f"{len(items)} rows have {tuple(together.shape)} losses in one batch"
    size = float(alone.abs().max())
    coarse = 16.0 * max(torch.finfo(p.dtype).eps for p in twin.parameters())
    # In another order they are the same rows: a collate function may sort.
    apart = float((alone.sort().values - together.sort().values).abs().max())
    if not apart <= max(_SAME, coarse) * size + 1e-6:
        return (
            f"a row's loss in a batch is {apart:.2g} away from its loss alone ({size:.2g}): the "
            "loss, the model or the padding mixes rows"
        )
    if task.own_loss is None and not task.per_row:
        joint = float(task.batch_loss(twin, batch))
        summed = getattr(task.criterion, "reduction", task.reduction) == "sum"
        own = float(together.sum() if summed else together.mean())
        if not abs(joint - own) <= max(_SAME, coarse) * size * len(items) + 1e-6:
            how = "sum" if summed else "mean"
            return (
                f"the criterion's value of a batch, {joint:.4g}, is not the {how} of its rows' own"
            )
    return ""


def _tried(what: str, run: Callable[[], Any]) -> Any:
    """Run something of the caller's; a failure is a refusal that says what failed and the cure."""
    try:
        with warnings.catch_warnings():
            # torch would go on with every row's output against every row's target
            warnings.filterwarnings("error", message="Using a target size")
            return run()
    except UnsupportedError:
        raise
    except Exception as error:  # a foreign model, loss or data set may fail in any way
        raise UnsupportedError(
            f"Expected a training that runs as it is described, got a failure on two retained "
            f"rows, at {what}: {_first_line(error)}. {_CURE}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}"
