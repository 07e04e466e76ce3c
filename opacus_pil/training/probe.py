"""Probe: are the rows that trained those of the data set, each with a loss of its own?

Some rows are asked alone what their gradient is, at the very parameters of a step, and held against
what they contributed in it, and in a batch of the described loss. What it does not see: steps
between two looks, and what changes neither the looked-at norms nor the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from .._validate import FloatArray, IntArray
from ..capture.collate import order_of_rows
from ..capture.randomness import ForwardStates, set_generator_states, untouched_generators
from ..capture.recorder import Fact, StepRecord
from ..capture.unhooked import batch_dependent
from .row_gradients import RowGradients, active_dropout, norm, undisturbed, without_dropout
from .task import Task

_EVERY = 64  # steps between two looks, after the first powers of two
_AT_RANDOM = 2  # rows compared with what they did in a step, beside the outer and the largest one
_TOGETHER = 8  # rows of the batch that the described loss is asked about
_SCANNED = 1 << 20  # labels looked through for rare classes
_SUMMED = 256  # rows of a step whose sum is formed again
_SUMMED_ONCE = 1024  # the first time
_LAYERS = 8  # whose sums are formed again where each is clipped by itself: a backward pass each
# Relative, of sums of clipped gradients in float32: each row's own rounding is below 1e-5.
_SAME_SUM = 2e-4

ClippedNorm = Callable[[Sequence[torch.Tensor]], float]


@dataclass(frozen=True)
class _Sum:
    """A sum of clipped gradients that a step formed.

    Attributes:
        factors: Shape (rows,), or (rows, layers) where each layer is clipped by itself.
        layers: Positions of the parameters that are asked about; None: all, clipped together.
        values: What was summed up, one per parameter asked about; None: not held by the optimizer.
        size: Sum of the rows' clipped norms.
    """

    factors: FloatArray
    layers: list[int] | None
    values: Sequence[torch.Tensor | None]
    size: float


class Probe:
    """Looks at some rows of some steps; what it finds is kept for all later ones.

    At the first steps, at every power of two and at every 64th: whether rows of the described loss
    are the same alone and together; whether the largest, the first, the last and two other rows of
    the step had the norms that they have alone; and, of up to 256 rows (once: 1024), whether the
    sum that was noised is the sum of the rows' own clipped gradients (of eight layers chosen at
    random, where layers are clipped one by one). With dropout the last is
    asked with the masks of the training, and the one before not at all.

    Args:
        task: What the training was said to minimise.
        dataset: Its rows.
        module: Whose forward passes train, to see where they begin; None: not seen.
        random_rows: Whether it matters that an item is the same when it is asked for again.
        dimension: Of the rows in a batch's tensors that have so many.
    """

    def __init__(
        self,
        task: Task,
        dataset: Any,
        *,
        module: Any = None,
        random_rows: bool = False,
        dimension: int = 0,
    ) -> None:
        self.task = task
        self._dimension = dimension
        self._dataset = dataset
        self._random_rows = random_rows
        self._found: dict[str, Fact] = {}
        self._steps = 0
        self._random_items: bool | None = False if _in_memory(dataset) else None  # None: not asked
        self._summed = False
        self._states = _watched(module)
        self._states.wanted = True
        coupling = task.coupling()
        if coupling:
            self._keep("loss_couples_rows", coupling)
        if not task.named:
            self._keep("loss_not_checked", "no criterion= or loss_of= was named")

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What was found so far."""
        return tuple(self._found.values())

    @property
    def model_trains(self) -> bool:
        """Whether the model was trained on something since the last step."""
        return self._states.passes > 0

    def look(
        self, record: StepRecord, *, module: Any, parameters: Sequence[nn.Parameter],
        clipped_norm: ClippedNorm, sums: Sequence[torch.Tensor | None],
    ) -> None:  # fmt: skip
        """Look at a step that has clipped and not moved yet, if it is its turn.

        Args:
            record: Rows, norms and clip bound of the step.
            module: What Opacus made of the module.
            parameters: Those that are clipped.
            clipped_norm: From one row's gradients, one per parameter, to what `record.norms` holds.
            sums: Of the clipped gradients, one per parameter; None: not held by the optimizer.
        """
        self._steps += 1
        states, self._states.wanted = self._states.take(), False
        try:
            if due(self._steps) and self.task.named and parameters:
                with warnings.catch_warnings():  # torch's were given in the training itself
                    warnings.simplefilter("ignore")
                    self._look(record, module, parameters, clipped_norm, sums, states)
        except Exception as error:  # a foreign model, loss or data set may fail in any way
            words = str(error).splitlines()[0] if str(error) else "no message"
            self._keep(
                "loss_not_checked",
                f"the named loss could not be asked about single rows: {type(error).__name__}: "
                f"{words[:200]}",
            )
        finally:
            self._states.wanted = due(self._steps + 1)

    # --- inside -------------------------------------------------------------------------------

    def _look(
        self, record: StepRecord, module: Any, parameters: Sequence[nn.Parameter],
        clipped_norm: ClippedNorm, sums: Sequence[torch.Tensor | None], states: list[Any],
    ) -> None:  # fmt: skip
        inner = getattr(module, "_module", module)
        mixing = batch_dependent(inner)
        if mixing:
            self._keep("loss_couples_rows", mixing)
        asked = RowGradients(self.task, self._dataset, inner, parameters, dimension=self._dimension)
        with undisturbed(module), untouched_generators(asked.device) as moved:
            random = active_dropout(inner)
            with without_dropout(inner):
                self._together(asked, inner, record)
            if record.indices is None or self._items_are_random(record, moved):
                self._keep("not_compared", "")
                return
            if not len(record.indices):
                return
            before = len(self._found)
            if not random:
                random = not self._compare(asked, record, clipped_norm, moved)
            if len(self._found) > before:
                return
            formed = self._sum_of(record, sums)
            if random:
                self._replay(asked, record, formed, states)
            elif formed is not None:
                self._compare_sums(asked, record, formed)

    def _together(self, asked: RowGradients, inner: nn.Module, record: StepRecord) -> None:
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
                with untouched_generators(asked.device) as moved:
                    differs = asked.coupling(rows, bound=record.max_grad_norm)
                    if moved():  # masks that evaluation has too say nothing about other rows
                        self._keep("not_compared", "")
                        return
            finally:
                for part, mode in modes.items():
                    part.training = mode
        if differs is not None:
            self._keep(*differs)

    def _compare(
        self,
        asked: RowGradients,
        record: StepRecord,
        clipped_norm: ClippedNorm,
        moved: Callable[[], bool],
    ) -> bool:
        """Hold the norms of a step against those of the same rows alone; False: these are random.

        Of rows with norm 0 nothing is asked, a cap may have left them out; what is not finite is a
        fact of its own.
        """
        assert record.indices is not None
        norms = record.norms
        some = np.random.default_rng(self._steps).integers(0, len(norms), size=_AT_RANDOM)
        positions = np.unique([int(np.argmax(norms)), 0, len(norms) - 1, *some])
        positions = positions[np.isfinite(norms[positions]) & (norms[positions] > 0.0)]
        if not len(positions):
            return True
        alone = np.array([clipped_norm(asked.alone(int(record.indices[k]))) for k in positions])
        if moved():  # dropout without a module of its own
            return False
        tolerance = asked.tolerance(record.rounding)
        if (np.abs(norms[positions] - alone) > tolerance * (alone + record.max_grad_norm)).any():
            self._keep(*explained(norms[positions], alone, tolerance=tolerance))
        return True

    def _compare_sums(self, asked: RowGradients, record: StepRecord, formed: _Sum) -> None:
        """Hold the sum that is noised against that of the rows' own clipped gradients."""
        assert record.indices is not None
        found = asked.weighted(record.indices, formed.factors, layers=formed.layers)
        self._summed = True
        apart = _apart(asked, record, formed, found)
        if apart:
            self._keep("loss_differs", apart)

    def _replay(
        self, asked: RowGradients, record: StepRecord, formed: _Sum | None, states: list[Any]
    ) -> None:
        """The same with the random numbers that the training's forward passes had."""
        devices = {p.device for p in asked.parameters}
        if len(states) != len(record.parts) or len(devices) > 1 or formed is None:
            if not self._summed:
                self._keep("not_compared", "")
            return
        first = self._replayed(asked, record, formed, states)
        self._summed = True
        apart = _apart(asked, record, formed, first)
        if not apart:
            return
        again = replace(formed, values=first)
        if _apart(asked, record, again, self._replayed(asked, record, formed, states)):
            self._keep("not_compared", "")  # there is more chance in it than its masks
        else:
            self._keep("loss_differs", apart)

    def _replayed(
        self, asked: RowGradients, record: StepRecord, formed: _Sum, states: list[Any]
    ) -> list[torch.Tensor]:
        assert record.indices is not None
        total: list[torch.Tensor] = []
        ends = np.cumsum(record.parts)
        for state, start, end in zip(states, [0, *ends[:-1]], ends, strict=True):
            set_generator_states(state, asked.device)
            rows, factors = record.indices[start:end], formed.factors[start:end]
            if len(rows):
                found = asked.weighted(rows, factors, parts=1, layers=formed.layers)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total

    def _sum_of(self, record: StepRecord, sums: Sequence[torch.Tensor | None]) -> _Sum | None:
        """Return the step's sum if it can be asked for, and is not too much to ask."""
        most = _SUMMED if self._summed else _SUMMED_ONCE
        if len(record.norms) > most or not bool(np.isfinite(record.norms).all()):
            return None
        if record.factors is not None:
            return _Sum(record.factors, None, sums, float(record.factors @ record.norms))
        own = record.layer_factors
        if own is None or own.shape[1] != len(sums):
            return None
        some = np.random.default_rng(self._steps).permutation(len(sums))[:_LAYERS].tolist()
        factors = own[:, some].to("cpu", torch.float64).numpy()
        return _Sum(factors, some, [sums[k] for k in some], float(record.norms.sum()))

    def _items_are_random(self, record: StepRecord, moved: Callable[[], bool]) -> bool:
        """Whether the data set gives other items when it is asked again."""
        if self._random_items is None and record.drawn is not None and len(record.drawn):
            row = int(record.drawn[0])
            first, second = self._dataset[row], self._dataset[row]
            order, _ = order_of_rows([first], [[second]])
            self._random_items = order is None or moved()
        if self._random_items and self._random_rows:
            self._keep("random_rows", "")
        return bool(self._random_items)

    def _keep(self, code: str, detail: str) -> None:
        self._found.setdefault(code, Fact(code, detail))


def _watched(module: Any) -> ForwardStates:
    """Watch what Opacus made of a module; its hooks object has the user's module called instead."""
    if module is None:
        return ForwardStates()
    inner = getattr(module, "_module", module)
    device = next(inner.parameters()).device
    return ForwardStates(module if isinstance(module, nn.Module) else inner, device=device)


def due(step: int) -> bool:
    """Whether a step (from 1) is looked at: powers of two, and every 64th."""
    return step % _EVERY == 0 or step & (step - 1) == 0


def _apart(
    asked: RowGradients, record: StepRecord, formed: _Sum, found: Sequence[torch.Tensor]
) -> str:
    """Return how far a sum of clipped gradients is from what was found; "": only by rounding."""
    pairs = [(a, b) for a, b in zip(formed.values, found, strict=True) if a is not None]
    far = norm([a.to(b) - b for a, b in pairs]) if pairs else 0.0
    rounding = max(record.rounding, 0.0)
    limit = asked.tolerance(rounding, same=_SAME_SUM) * (formed.size + record.max_grad_norm)
    if far <= limit:
        return ""
    return (
        f"their clipped sum is {far / record.max_grad_norm:.3g} clip bounds away from that of the "
        f"same rows by the named loss"
    )


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
