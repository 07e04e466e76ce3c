"""Accuracy and loss of a model by the description of its training, whatever its batches look like.

Knows a task and rows of a data set. Where batches are pairs of tensors `gap.evaluate` says the same
of tensors in hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .. import _validate as check
from ..capture.randomness import untouched_generators
from ..training.task import Task
from .gap import Metrics, evaluation_mode

_LABELS = ("labels", "label", "targets", "target")  # where batches that are mappings keep them


def evaluate_task(
    module: nn.Module,
    dataset: Any,
    *,
    task: Task,
    rows: npt.ArrayLike | None = None,
    batch_size: int = 512,
) -> Metrics:
    """Return accuracy and mean loss of a model on some rows, batched and measured as in training.

    Args:
        module: The model. Evaluated in eval mode without gradients; its modes are restored.
        dataset: Map-style.
        task: Of the training: `privacy_engine.task` or `UnlearningEngine.task`.
        rows: Rows to look at, shape (n,), at least one. Default: all.
        batch_size: Rows per forward pass.

    Returns:
        Metrics. The accuracy is NaN where nothing says what the classes are: batches that are no
        pairs and have no entry "labels", or outputs that are no logits, one row each.

    Raises:
        ValueError: No row, or one out of range.
        UnsupportedError: A batch that the task does not describe.

    Privacy: statistics of a forget or retain set are computed from private data.
    """
    size = len(dataset)
    chosen = check.index_array("rows", np.arange(size) if rows is None else rows, size=size)
    count = check.integer("batch_size", batch_size, low=1)
    if not len(chosen):
        raise ValueError("Expected rows to name at least one row, got none.")
    device = next(module.parameters()).device
    losses, correct = [], []
    with untouched_generators(device), evaluation_mode(module), torch.no_grad():
        for start in range(0, len(chosen), count):
            items = [dataset[int(row)] for row in chosen[start : start + count]]
            batch = task.collate(items, device=device)
            seen = _Seen(module)
            losses.append(task.loss_of(seen, batch).double().cpu())
            correct.append(_correct(seen.output, batch, len(items)))
    return Metrics(float(torch.cat(correct).mean()), float(torch.cat(losses).mean()))


class _Seen:
    """The model, and what it answered last."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.output: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.output = self._module(*arguments, **named)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _correct(output: Any, batch: Any, size: int) -> torch.Tensor:
    """Return 1 for each row that is classified right, else 0; NaN where that is unknown."""
    logits = getattr(output, "logits", output)
    labels = _labels(batch)
    unknown = torch.full((size,), torch.nan, dtype=torch.float64)
    if not (torch.is_tensor(logits) and torch.is_tensor(labels)):
        return unknown
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if len(logits) != size or labels.shape != (size,) or logits.ndim not in (1, 2):
        return unknown
    predicted = logits.argmax(dim=1) if logits.ndim == 2 else logits > 0
    return (predicted == labels).double().cpu()


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _LABELS if name in batch), None)
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    return None
