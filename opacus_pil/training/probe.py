"""Probe: are the rows that trained those of the data set, each with a loss of its own?

A few rows are asked alone what their gradient is, at the very parameters of a step, and held
against what they contributed in it, and in a batch of the described loss. Works on the live module
with Opacus's hooks off, and leaves gradients, modes, buffers and generators as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from .._validate import FloatArray, IntArray
from ..capture.collate import order_of_rows
from ..capture.randomness import untouched_generators
from ..capture.recorder import Fact, StepRecord
from ..capture.sweep import batch_dependent
from .task import Task

_EVERY = 64  # steps between two looks, after the first powers of two
_IN_STEP = 3  # rows compared with what they did in a step
_TOGETHER = 8  # rows of the batch that the described loss is asked about
_SCANNED = 1 << 20  # labels looked through for rare classes
_SAME = 1e-3  # relative: float32 norms by two exact methods agree far better
_SAME_TF32 = 1e-2  # ten bits of mantissa in CUDA's products

ClippedNorm = Callable[[Sequence[torch.Tensor]], float]


class Probe:
    """Looks at some rows of some steps; what it finds is kept for all later ones.

    Args:
        task: What the training was said to minimise.
        dataset: Its rows.
        random_rows: Whether it matters that an item is the same when it is asked for again.
        dimension: Of the rows in a batch's tensors that have so many.
    """

    def __init__(
        self, task: Task, dataset: Any, *, random_rows: bool = False, dimension: int = 0
    ) -> None:
        self.task = task
        self._dimension = dimension
        self._dataset = dataset
        self._random_rows = random_rows and not _in_memory(dataset)
        self._found: dict[str, Fact] = {}
        self._steps = 0
        self._described = False
        coupling = task.coupling()
        if coupling:
            self._keep("loss_couples_rows", coupling)
        if not task.named:
            self._keep("loss_not_checked", "no criterion= or loss_of= was named")

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What was found so far."""
        return tuple(self._found.values())

    def look(
        self, record: StepRecord, *, module: Any, parameters: Sequence[nn.Parameter],
        clipped_norm: ClippedNorm,
    ) -> None:  # fmt: skip
        """Look at a step that has clipped and not moved yet, if it is its turn.

        Args:
            record: Rows, norms and clip bound of the step.
            module: What Opacus made of the module.
            parameters: Those that are clipped.
            clipped_norm: From one row's gradients, one per parameter, to what `record.norms` holds.
        """
        self._steps += 1
        due = self._steps % _EVERY == 0 or self._steps & (self._steps - 1) == 0
        if not due or not self.task.named or not parameters:
            return
        try:
            with warnings.catch_warnings():  # torch's notices were given in the training itself
                warnings.simplefilter("ignore")
                self._look(record, module, parameters, clipped_norm)
        except Exception as error:  # a foreign model, loss or data set may fail in any way
            words = str(error).splitlines()[0] if str(error) else "no message"
            self._keep(
                "loss_not_checked",
                f"the named loss could not be asked about single rows: {type(error).__name__}: "
                f"{words[:200]}",
            )

    # --- inside -------------------------------------------------------------------------------

    def _look(
        self, record: StepRecord, module: Any, parameters: Sequence[nn.Parameter],
        clipped_norm: ClippedNorm,
    ) -> None:  # fmt: skip
        inner = getattr(module, "_module", module)
        mixing = batch_dependent(inner)
        if mixing:
            self._keep("loss_couples_rows", mixing)
        asked = _Asked(self.task, self._dataset, inner, parameters, dimension=self._dimension)
        with _quiet(module), untouched_generators(asked.device) as moved:
            random = _active_dropout(inner)
            with _without_dropout(inner):
                if not self._described:
                    self._together(asked, inner, record)
                if record.indices is not None and not random:
                    self._compare(asked, record, clipped_norm, moved)
            if random:
                self._keep("not_compared", "")
            if self._random_rows and record.drawn is not None and len(record.drawn):
                self._ask_twice(int(record.drawn[0]), moved)

    def _together(self, asked: _Asked, inner: nn.Module, record: StepRecord) -> None:
        """Hold the described loss of rows alone against that of the same rows in one batch."""
        rows = chosen_rows(self._dataset, record.drawn)
        if len(rows) < 2:
            return
        with untouched_generators(asked.device) as moved:
            differs = asked.coupling(rows, bound=record.max_grad_norm)
            random = moved()
        if random:  # functional dropout: only evaluation mode is quiet
            modes = {part: part.training for part in inner.modules()}
            inner.eval()
            try:
                differs = asked.coupling(rows, bound=record.max_grad_norm)
            finally:
                for part, mode in modes.items():
                    part.training = mode
        self._described = True
        if differs is not None:
            self._keep(*differs)

    def _compare(
        self,
        asked: _Asked,
        record: StepRecord,
        clipped_norm: ClippedNorm,
        moved: Callable[[], bool],
    ) -> None:
        """Hold the norms of a step against those of the same rows alone."""
        assert record.indices is not None
        norms = record.norms
        positions = np.unique([int(np.argmax(norms)), 0, len(norms) - 1] if len(norms) else [])
        positions = positions.astype(np.int64)[:_IN_STEP]
        # 0 may be a row that a cap left out; what is not finite is a fact of its own.
        positions = positions[np.isfinite(norms[positions]) & (norms[positions] > 0.0)]
        if not len(positions):
            return
        alone = np.array([clipped_norm(asked.alone(int(record.indices[k]))) for k in positions])
        if moved():  # dropout without a module of its own
            self._keep("not_compared", "")
            return
        tolerance = asked.tolerance(record.rounding)
        if (np.abs(norms[positions] - alone) > tolerance * (alone + record.max_grad_norm)).any():
            self._keep(*explained(norms[positions], alone, tolerance=tolerance))

    def _ask_twice(self, row: int, moved: Callable[[], bool]) -> None:
        first, second = self._dataset[row], self._dataset[row]
        order, _ = order_of_rows([first], [[second]])
        if order is None or moved():
            self._keep("random_rows", "")

    def _keep(self, code: str, detail: str) -> None:
        self._found.setdefault(code, Fact(code, detail))


class _Asked:
    """A model's gradients for rows of a data set, alone or together, by the described loss."""

    def __init__(
        self,
        task: Task,
        dataset: Any,
        inner: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        dimension: int,
    ) -> None:
        self._dimension = dimension
        self._task, self._dataset, self._inner = task, dataset, inner
        self._parameters = list(parameters)
        self.device = self._parameters[0].device

    def tolerance(self, rounding: float = 0.0) -> float:
        """Return how far two exact computations of one gradient may be apart, relatively."""
        eps = max(float(torch.finfo(p.dtype).eps) for p in self._parameters)
        tf32 = self.device.type == "cuda" and (
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        )
        return max(_SAME_TF32 if tf32 else _SAME, 16.0 * eps, 16.0 * rounding)

    def alone(self, row: int) -> list[torch.Tensor]:
        """Return the gradients of one row's own loss."""
        return self._of_item(self._dataset[row])

    def _of_item(self, item: Any) -> list[torch.Tensor]:
        batch = self._task.collate([item], device=self.device)
        with torch.enable_grad():
            return self._gradients(self._task.loss_of(self._inner, batch).sum(), keep=False)

    def coupling(self, rows: IntArray, *, bound: float) -> tuple[str, str] | None:
        """Return the fact that rows in one batch are not what they are alone; None: they are."""
        items = [self._dataset[int(row)] for row in rows]
        batch = self._task.collate(items)
        single = [self._task.collate([item]) for item in items]
        order, why = order_of_rows(batch, single, dimension=self._dimension)
        if order is None:
            return "loss_not_checked", f"rows are not found in a batch of them: {why}"
        batch = self._task.collate(items, device=self.device)
        with torch.enable_grad():
            losses = self._task.loss_of(self._inner, batch)
            if losses.shape != (len(rows),):
                return "loss_couples_rows", (
                    f"{len(rows)} rows have {tuple(losses.shape)} losses in one batch"
                )
            joint = self._joint_difference(batch, losses.detach())
            together = [self._gradients(loss, keep=True) for loss in losses]
        if joint:
            return "loss_couples_rows", joint
        for position, k in enumerate(order):
            alone = self._of_item(items[int(k)])  # the very draw, where items are random
            size = max(_norm(alone), _norm(together[position]))
            apart = _norm([a - b for a, b in zip(alone, together[position], strict=True)])
            if not apart <= self.tolerance() * (size + bound):
                return "loss_couples_rows", (
                    f"a row's gradient in a batch is {apart / max(size, 1e-30):.0%} away from its "
                    "gradient alone; the loss, the model or the padding mixes rows"
                )
        return None

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
        if abs(joint - own) <= self.tolerance() * scale + 1e-6:
            return ""
        return (
            f"the criterion's value for a batch ({joint:.4g}) is not the "
            f"{'sum' if summed else 'mean'} of its rows' own ({own:.4g})"
        )

    def _gradients(self, loss: torch.Tensor, *, keep: bool) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, self._parameters, retain_graph=keep, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(self._parameters, found, strict=True)
        ]


def explained(ran: FloatArray, alone: FloatArray, *, tolerance: float) -> tuple[str, str]:
    """Say how norms in a training differ from those of the described loss: a fact and its detail.

    >>> explained(np.array([50.0, 100.0]), np.array([1.0, 2.0]), tolerance=1e-3)[1]
    'all norms are 50 times as large'
    >>> explained(np.array([1.0, 2.0]), np.array([2.0, 1.0]), tolerance=1e-3)[0]
    'rows_reordered'
    """
    ratios = ran / np.maximum(alone, 1e-30)
    if len(ran) > 1 and np.allclose(np.sort(ran), np.sort(alone), rtol=tolerance):
        return "rows_reordered", ""
    if len(ran) > 1 and ratios.max() <= ratios.min() * (1.0 + 10.0 * tolerance):
        return "loss_scaled", f"all norms are {ratios.mean():.3g} times as large"
    return "loss_differs", f"norms are {ratios.min():.3g} to {ratios.max():.3g} times as large"


def chosen_rows(dataset: Any, drawn: IntArray | None) -> IntArray:
    """Return some rows: of many classes, the rarest first, then drawn and evenly spaced ones."""
    size = len(dataset)
    labels = _labels(dataset)
    first: list[int] = []
    if labels is not None and len(labels) == size:
        _, starts, counts = np.unique(labels[:_SCANNED], return_index=True, return_counts=True)
        first = starts[np.argsort(counts, kind="stable")][: _TOGETHER - 2].tolist()
    spaced = np.linspace(0, size - 1, _TOGETHER).astype(np.int64).tolist()
    here = [] if drawn is None else drawn[:2].tolist()
    return np.array(list(dict.fromkeys([*first, *here, *spaced]))[:_TOGETHER], dtype=np.int64)


def _labels(dataset: Any) -> Any:
    """Return the labels of a data set that holds them in memory; None: not known."""
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[-1]
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if torch.is_tensor(found):
        found = found.detach().cpu().numpy()
    array = np.asarray(found) if isinstance(found, list | np.ndarray) else None
    return array if array is not None and array.ndim == 1 and array.dtype.kind in "biu" else None


def _in_memory(dataset: Any) -> bool:
    """Whether items are read off tensors, the same at each time."""
    if isinstance(dataset, Subset):
        return _in_memory(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(_in_memory, dataset.datasets))
    return type(dataset) is TensorDataset


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([g.double().norm() for g in gradients]).norm())


def _active_dropout(inner: nn.Module) -> bool:
    return any(isinstance(p, _DropoutNd) and p.training and p.p > 0 for p in inner.modules())


@contextmanager
def _without_dropout(inner: nn.Module) -> Iterator[None]:
    off = [part for part in inner.modules() if isinstance(part, _DropoutNd) and part.training]
    for part in off:
        part.training = False
    try:
        yield
    finally:
        for part in off:
            part.training = True


@contextmanager
def _quiet(module: Any) -> Iterator[None]:
    """Switch Opacus's hooks off, as it does itself between its two backward passes."""
    before = getattr(module, "hooks_enabled", None)
    if before is None:
        yield
        return
    module.hooks_enabled = False
    try:
        yield
    finally:
        module.hooks_enabled = before
