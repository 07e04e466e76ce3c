"""How far a model is from its retrained oracles: accuracy, loss and the step where it reaches them.

Knows torch modules and plain numbers. Does not know how a model was unlearned or retrained, and
claims nothing about privacy: a small gap is evidence, never a certificate.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _validate as check

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metrics:
    """How a model does on one split.

    Attributes:
        accuracy: Share of correct predictions, in [0, 1].
        loss: The criterion on the whole split (nats for cross-entropy).
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Spread:
    """A statistic over retrained models.

    Attributes:
        mean, min, max: Over the models, in the unit of the statistic.
        std: Sample standard deviation (divisor count − 1); None for a single model, whose spread is
            unknown rather than 0.
        count: Number of models.
    """

    mean: float
    min: float
    max: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float], *, name: str = "oracle values") -> Spread:
        """Summarise one value per retrained model.

        Args:
            values: One number per model, finite: a mean with one that diverged says nothing.
            name: What they are, for messages.

        Raises:
            ValueError: No value, or one that is not finite; the row is the model's number.
        """
        numbers = check.real_array(
            name, values, cure="Leave a retrained model that diverged out, and say so."
        )
        if numbers.ndim != 1 or numbers.size == 0:
            raise ValueError(
                check.expected(
                    name, "to hold one number per model", list(values),
                    "Retrain at least one model.",
                )
            )  # fmt: skip
        listed = numbers.tolist()
        std = statistics.stdev(listed) if len(listed) > 1 else None
        return cls(statistics.fmean(listed), min(listed), max(listed), std, len(listed))


@dataclass(frozen=True)
class Gap:
    """One statistic of a model beside the same statistic of its retrained oracles.

    Attributes:
        value: Of the model.
        oracle: Of the oracles.
    """

    value: float
    oracle: Spread

    @property
    def difference(self) -> float:
        """Model minus mean of the oracles, signed."""
        return self.value - self.oracle.mean

    @property
    def inside(self) -> bool:
        """Whether the model lies between the smallest and the largest oracle."""
        return self.oracle.min <= self.value <= self.oracle.max


@dataclass(frozen=True)
class SplitGap:
    """Gaps of one split (forget, retain, test).

    Attributes:
        accuracy: Share of correct predictions, beside the oracles'.
        loss: The criterion on the split, beside the oracles'.
    """

    accuracy: Gap
    loss: Gap


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode and give every submodule its own mode back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def evaluate(
    module: nn.Module, x: Tensor, y: Tensor, *, criterion: Criterion, batch_size: int = 512
) -> Metrics:
    """Return accuracy and loss of a model on one split.

    Two tasks are told apart by the model's output: two or more logits per row (`y` holds class
    numbers; a prediction is the largest logit, the first one on a tie) or one logit per row (`y`
    holds 0 and 1; a prediction is 1 where the logit is > 0).

    Args:
        module: The model. Evaluated in eval mode without gradients; its modes are restored.
        x: Inputs, shape (n, …), n ≥ 1.
        y: Targets, shape (n,), or (n, 1) for one logit.
        criterion: (outputs of all rows, targets) -> scalar, for example `nn.CrossEntropyLoss()` or
            `nn.BCEWithLogitsLoss()`. It is called once on the whole split, so weighted means are
            right too. With one logit it receives both arguments in shape (n,).
        batch_size: Rows per forward pass, ≥ 1. Only memory depends on it.

    Returns:
        Metrics. The loss may be inf or NaN where the model diverged.

    Raises:
        ValueError: No row, lengths that differ, targets or outputs of an unusable shape, or a
            criterion that does not return one number.

    Privacy: statistics of a forget or retain set are computed from private data.
    """
    rows = check.integer("batch_size", batch_size, low=1)
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"Expected x and y with the same number of rows, at least one, got {len(x)} and "
            f"{len(y)}. Pass one target per input."
        )
    logits, targets = _outputs(module, x, y, rows)
    with torch.no_grad():
        loss = criterion(logits, targets)
    if loss.numel() != 1:
        raise ValueError(
            f"Expected criterion to return one number, got shape {tuple(loss.shape)}. "
            'Use reduction="mean".'
        )
    predicted = logits.argmax(dim=1) if logits.ndim == 2 else logits > 0
    return Metrics(float((predicted == targets).double().mean()), float(loss))


@torch.no_grad()
def _outputs(module: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return logits (n, classes) with class targets, or logits (n,) with 0/1 targets."""
    parameter = next(module.parameters(), x)
    with evaluation_mode(module):
        logits = torch.cat([module(b.to(parameter.device)) for b in x.split(batch_size)])
    targets = y.to(logits.device)
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if logits.ndim not in (1, 2) or len(logits) != len(targets) or targets.ndim != 1:
        raise ValueError(
            f"Expected outputs (n, classes) or (n,) and targets (n,), got {tuple(logits.shape)} "
            f"and {tuple(y.shape)}. Flatten what the module returns."
        )
    if logits.ndim == 2 and targets.is_floating_point():
        raise ValueError(
            f"Expected y as integer class numbers for {logits.shape[1]} logits, got "
            f"{targets.dtype}. Call y.long(), or give the model one logit."
        )
    if logits.ndim == 1:
        targets = targets.to(logits.dtype)
        if not ((targets == 0) | (targets == 1)).all():
            raise ValueError(
                "Expected y of a one-logit model to hold 0 and 1 only, got other values. "
                "Encode the two classes as 0 and 1."
            )
    return logits, targets


def evaluate_splits(
    module: nn.Module,
    *,
    splits: Mapping[str, tuple[Tensor, Tensor]],
    criterion: Criterion,
    batch_size: int = 512,
) -> dict[str, Metrics]:
    """Return `evaluate` for each split, for example forget, retain and test.

    Args:
        module: The model.
        splits: Name -> (x, y), each as in `evaluate`.
        criterion: As in `evaluate`.
        batch_size: As in `evaluate`.

    Returns:
        Split name -> Metrics, in the order of `splits`.

    Raises:
        ValueError: As in `evaluate`.

    Privacy: as in `evaluate`.
    """
    return {
        name: evaluate(module, x, y, criterion=criterion, batch_size=batch_size)
        for name, (x, y) in splits.items()
    }


def oracle_gap(
    metrics: Mapping[str, Metrics], *, oracles: Sequence[Mapping[str, Metrics]]
) -> dict[str, SplitGap]:
    """Compare a model's metrics with those of models retrained without the forget set.

    Args:
        metrics: Split name -> Metrics of the model (`evaluate_splits`).
        oracles: The same splits of each retrained model, at least one; three or more say something
            about the spread.

    Returns:
        Split name -> SplitGap. Its `.accuracy` and `.loss` are Gaps, and the `.difference` of each
        is the model's value minus the mean of the oracles'.

    Raises:
        ValueError: No oracle, an oracle that lacks a split of `metrics` (names both), or one whose
            accuracy or loss is not finite (names split, statistic and oracle).

    Edge cases:
        one oracle                    .oracle.std of each Gap is None: the spread is unknown
        loss of the model inf or NaN  so is its difference, and .inside is False

    Source: accuracy and loss gaps to retraining as in the unlearning literature, for example
        Golatkar et al. (2020), arXiv:1911.04933.
    Privacy: as in `evaluate`.
    """
    if len(oracles) == 0:
        raise ValueError("Expected oracles to hold at least one model, got none. Retrain one.")
    for number, oracle in enumerate(oracles):
        missing = [name for name in metrics if name not in oracle]
        if missing:
            raise ValueError(
                f"Expected every oracle to have the splits of the model, got oracle {number} "
                f"without {missing}. Evaluate it on them."
            )

    def gap(split: str, statistic: str) -> Gap:
        values = [getattr(oracle[split], statistic) for oracle in oracles]
        spread = Spread.of(values, name=f"{statistic} of the oracles on {split!r}")
        return Gap(getattr(metrics[split], statistic), spread)

    return {split: SplitGap(gap(split, "accuracy"), gap(split, "loss")) for split in metrics}


def time_to_unlearn(
    values: Sequence[float],
    *,
    oracle_values: Sequence[float],
    tolerance: float,
    steps: Sequence[int] | None = None,
    stay: int = 3,
) -> int | None:
    """Return the first step at which a statistic reaches the retrained ensemble and stays there.

    Reached means |value − mean(oracle_values)| ≤ tolerance, with a slack of 1e-12 · max(1, |mean|)
    for rounding (accuracies of ten images are multiples of 0.1 that floats miss).

    Args:
        values: Forget-set statistic (loss, accuracy or a per-example score) at each recorded point,
            in time order. May be inf.
        oracle_values: The same statistic of each retrained model, at least one, finite.
        tolerance: Largest distance that counts as reached, ≥ 0, in the unit of the statistic.
        steps: Unlearning step of each recorded point, ascending; 0, 1, 2, … when None.
        stay: Number of consecutive recorded points, the first included, that must be within
            tolerance, ≥ 1.

    Returns:
        The step, or None where the run never stays for `stay` points. A run that arrives fewer than
        `stay` points before its end has not shown that it stays: None.

    Raises:
        ValueError: An argument outside its range; NaN in `values` (names the first).

    Source: definition of this package; papers differ in statistic and tolerance, so state yours.
    Privacy: the result depends on the forget set.

    >>> time_to_unlearn([1.0, 0.7, 0.9, 0.7, 0.7], oracle_values=[0.7], tolerance=0.05, stay=2)
    3
    """
    curve = check.real_array("values", values, allow_infinite=True, cure="Did the run diverge?")
    if curve.ndim != 1:
        raise ValueError(check.expected("values", "to be one sequence", curve.shape))
    width = check.real("tolerance", tolerance, low=0.0)
    length = check.integer("stay", stay, low=1)
    at = list(range(len(curve))) if steps is None else [int(step) for step in steps]
    if len(at) != len(curve) or any(a >= b for a, b in itertools.pairwise(at)):
        raise ValueError(
            f"Expected steps to be ascending, one per value ({len(curve)}), got {at!r}. "
            "Pass the step of each recorded point."
        )
    mean = Spread.of(oracle_values).mean
    reached = abs(curve - mean) <= width + 1e-12 * max(1.0, abs(mean))
    for start in range(len(curve) - length + 1):
        if reached[start : start + length].all():
            return at[start]
    return None
