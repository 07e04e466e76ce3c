"""What classifiers' outputs say about each instance: margins, losses, errors, correctness.

A model with one logit z is the two-class model with logits (0, z). Knows no training, and not how
the models of an ensemble came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn

from .. import _validate as check
from .._validate import FloatArray, IntArray
from .gap import evaluation_mode


@dataclass(frozen=True)
class ClassOutputs:
    """Logits of a batch beside the true classes.

    Attributes:
        logits: Shape (batch, classes), float64, classes >= 2.
        classes: Shape (batch,), the true ones.
    """

    logits: FloatArray
    classes: IntArray

    @classmethod
    def of(cls, outputs: Any, targets: Any) -> ClassOutputs:
        """Take a model's outputs and targets, tensors or arrays.

        Args:
            outputs: Shape (batch, classes), or (batch,) or (batch, 1) for one logit. Finite.
            targets: Class numbers, shape (batch,); for one logit 0 and 1, shape (batch,) or
                (batch, 1), of any type.

        Raises:
            ValueError: Shapes that do not fit, a logit that is not finite (names the first row),
                a target that is no class.
        """
        logits, labels = _array(outputs), _array(targets)
        if logits.ndim == 1:
            logits = logits[:, None]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if logits.ndim != 2 or logits.shape[1] == 0 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"Expected outputs (batch, classes) or (batch,) and targets (batch,), got "
                f"{np.shape(logits)} and {np.shape(labels)}. Flatten what the module returns."
            )
        largest = np.abs(logits).max(axis=1)  # NaN and infinities survive: the row can be named
        check.real_array("outputs", largest, cure="Did the training diverge?")
        if logits.shape[1] == 1:
            logits = np.hstack([np.zeros_like(logits), logits])
        count = logits.shape[1]
        bad = ~np.isin(labels, np.arange(count))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"Expected targets to be classes 0 to {count - 1}, got {int(bad.sum())} of "
                f"{len(labels)} others (first: row {first}, value {labels[first]:g})."
            )
        return cls(logits, labels.astype(np.int64))

    @property
    def log_odds(self) -> FloatArray:
        """log p_y − log(1 − p_y) = z_y − log Σ_{j≠y} exp z_j, without forming 1 − p_y."""
        return np.asarray(self._own - logsumexp(self._others, axis=1))

    @property
    def loss(self) -> FloatArray:
        """Cross-entropy −log p_y, in nats."""
        return np.logaddexp(0.0, -self.log_odds)

    @property
    def logit_margin(self) -> FloatArray:
        """z_y − max_{j≠y} z_j."""
        return np.asarray(self._own - self._others.max(axis=1))

    @property
    def margin(self) -> FloatArray:
        """p_y − max_{j≠y} p_j, in [-1, 1]."""
        p = np.exp(log_softmax(self.logits, axis=1))
        rows = np.arange(len(p))
        own = p[rows, self.classes]
        p[rows, self.classes] = -1.0
        return np.asarray(own - p.max(axis=1))

    @property
    def error_norm(self) -> FloatArray:
        """‖softmax(z) − onehot(y)‖₂, in [0, √2]."""
        p = np.exp(log_softmax(self.logits, axis=1))
        p[np.arange(len(p)), self.classes] = np.expm1(-self.loss)  # p_y − 1 without cancelling
        return np.asarray(np.linalg.norm(p, axis=1))

    @property
    def correct(self) -> FloatArray:
        """1 where the largest logit (the first one on a tie) is the true class, else 0."""
        return (self.logits.argmax(axis=1) == self.classes).astype(np.float64)

    @property
    def _own(self) -> FloatArray:
        return np.asarray(self.logits[np.arange(len(self.logits)), self.classes])

    @property
    def _others(self) -> FloatArray:
        others = self.logits.copy()
        others[np.arange(len(others)), self.classes] = -np.inf
        return others


@dataclass(frozen=True)
class EnsembleOutputs:
    """What every model of an ensemble says about every instance.

    Attributes:
        margins: Shape (models, instances), φ.
        correct: Shape (models, instances), whether the prediction is the true class.
    """

    margins: FloatArray
    correct: npt.NDArray[np.bool_]


def ensemble_outputs(
    modules: Sequence[nn.Module], *, x: Tensor, y: Tensor, batch_size: int = 512
) -> EnsembleOutputs:
    """Return margin and correctness of every model on every instance.

    Args:
        modules: Models, at least one; evaluated in eval mode, their modes are restored.
        x: Inputs, shape (instances, …).
        y: Class numbers, shape (instances,); 0 and 1 for models with one logit.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        EnsembleOutputs.

    Raises:
        ValueError: No model or no instance, outputs of an unusable shape or not finite.

    Privacy: margins of a training set depend on private data.
    """
    rows = check.integer("batch_size", batch_size, low=1)
    if not len(modules) or not len(x):
        raise ValueError(
            f"Expected at least one model and one instance, got {len(modules)} and {len(x)}."
        )
    margins, correct = [], []
    for module in modules:
        device = next((p.device for p in module.parameters()), x.device)
        with evaluation_mode(module), torch.no_grad():
            outputs = torch.cat([module(part.to(device)) for part in x.split(rows)])
        found = ClassOutputs.of(outputs, y)
        margins.append(found.log_odds)
        correct.append(found.correct == 1)
    return EnsembleOutputs(np.stack(margins), np.stack(correct))


def _array(values: Any) -> FloatArray:
    if torch.is_tensor(values):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
