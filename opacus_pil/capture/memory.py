"""BatchMemoryManager: large draws in small physical batches, each of which knows its rows.

Opacus's own decides which parts are steps while it samples, ahead of their use. Here that is said
when a part is handed out, so that a loop may be left or skip batches. Knows no accountant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusBatchMemoryManager
from opacus.utils.batch_memory_manager import BatchSplittingSampler
from torch.utils.data import DataLoader

from .. import _validate as check
from ..errors import UnsupportedError
from .collate import RowOrder
from .draws import Draw
from .fixed_batches import RecordingFixedLoader
from .indices import Batches, RecordingDataLoader, in_order, proving
from .norms import require_splittable
from .plain_step import held


class Piece(NamedTuple):
    """A physical batch: its rows, its draw, and whether it is the draw's first and last part."""

    rows: list[int]
    draw: Draw
    first: bool
    last: bool


class _Signals:
    """Stands where Opacus's splitting sampler expects an optimizer, and keeps what it signals."""

    def __init__(self) -> None:
        self.last = False

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Keep whether the part ends its draw."""
        self.last = not do_skip


class RecordingSplitter(BatchSplittingSampler):
    """Opacus's splitting sampler, remembering what it emitted instead of telling the optimizer."""

    def __init__(self, *, sampler: Any, max_batch_size: int) -> None:
        self._signals = _Signals()
        super().__init__(sampler=sampler, max_batch_size=max_batch_size, optimizer=self._signals)
        self.emitted: deque[Piece] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        """Start a pass with its own queue of emitted batches."""
        # Not a generator: the queue must exist before a DataLoader with workers primes itself.
        self.emitted = deque()
        return self._split(self.emitted)

    def _split(self, emitted: deque[Piece]) -> Iterator[list[int]]:
        draw = Draw([])
        for rows in super().__iter__():
            first, last = draw.complete, self._signals.last
            if first:
                draw = Draw([])
            piece = [int(row) for row in rows]
            draw.rows.extend(piece)
            draw.complete = last
            emitted.append(Piece(piece, draw, first, last))
            yield rows

    @property
    def interrupted(self) -> bool:
        """Whether the next pass is what is left of an interrupted one."""
        return bool(self.sampler.interrupted)

    def hand_out(self, owner: object) -> None:
        """Say who hands out the batches of the running pass."""
        self.sampler.hand_out(owner)


class SplittingLoader(DataLoader[Any]):
    """A loader of physical batches; a new pass drops the sum that an unfinished one left behind."""

    tracker: Any
    optimizer: Any

    def __iter__(self) -> Any:
        """Start a pass over the data."""
        _drop_unfinished(self.optimizer)
        return PhysicalBatches(self, proving(self, super().__iter__))


class PhysicalBatches(Batches):
    """One pass in physical batches; tells the optimizer which part of a draw is in its hands."""

    _drawn: deque[list[int]] | None = None  # whole draws not handed out to their end yet

    def _publish(self, rows: Piece | None, order: RowOrder, positions: list[int] | None) -> None:
        if rows is None:
            raise UnsupportedError(
                "Expected a pass whose batches all loaded, got one with a failed batch or workers "
                "restarted by a newer pass: nobody knows where a draw ends. Start a new pass."
            )
        piece, optimizer = rows, self._loader.optimizer
        if self._drawn is None:  # without workers the sampler starts with the first batch
            self._loader.batch_sampler.hand_out(self)
            self._drawn = self._loader.batch_sampler.sampler.emitted
        if piece.first:
            _drop_unfinished(optimizer)  # the last part of the draw before was skipped
        if piece.last:
            self._drawn.popleft()
        optimizer._step_skip_queue[:] = [not piece.last]
        found = in_order(piece.rows, positions)
        self._loader.tracker.publish(found, owner=self, draw=piece.draw, order=order)


def _drop_unfinished(optimizer: Any) -> None:
    """Forget a sum of gradients that never became a step."""
    optimizer._step_skip_queue.clear()
    if optimizer._is_last_step_skipped:
        optimizer._is_last_step_skipped = False
        for parameter in held(optimizer):  # those too that were frozen since
            parameter.summed_grad = None
        optimizer.recorder.clear()


class BatchMemoryManager(OpacusBatchMemoryManager):
    """Opacus's BatchMemoryManager for trainings with per-instance accounting.

    Guarantee: batches, random stream and trained weights are those of Opacus's manager in a loop
        that steps once on every batch. An instance is charged once per draw, at its own norm. A
        loop that is left early or skips batches does not spoil the steps after it, as it does with
        Opacus's: a draw whose last part was skipped makes no step and is dropped.

    Args:
        data_loader: The loader that make_private returned.
        max_physical_batch_size: Rows that fit into memory at once.
        optimizer: The optimizer that make_private returned with it.

    Raises:
        TypeError, ValueError: max_physical_batch_size is not a positive whole number.
        UnsupportedError: A loader without per-instance accounting, an optimizer of another
            training, or adaptive clipping.

    Edge cases:
        batches fetched ahead of their step   parts are taken for those handed out last: step on
                                              each batch before the next one is fetched
    """

    def __init__(
        self, *, data_loader: DataLoader[Any], max_physical_batch_size: int, optimizer: DPOptimizer
    ) -> None:
        size = check.integer("max_physical_batch_size", max_physical_batch_size, low=1)
        if not isinstance(data_loader, RecordingDataLoader | RecordingFixedLoader):
            raise UnsupportedError(
                "Expected data_loader to be what PerInstancePrivacyEngine.make_private returned, "
                f"got {type(data_loader).__name__}. Pass that loader, or use Opacus's own manager."
            )
        recorder = getattr(optimizer, "recorder", None)
        if recorder is None or recorder.tracker is not data_loader.tracker:
            raise UnsupportedError(
                "Expected optimizer to be what make_private returned with data_loader, got "
                f"{type(optimizer).__name__} of another training. Pass that one."
            )
        require_splittable(optimizer)
        super().__init__(data_loader=data_loader, max_physical_batch_size=size, optimizer=optimizer)

    def __enter__(self) -> DataLoader[Any]:
        """Return the loader of physical batches."""
        loader = super().__enter__()
        # Opacus has copied every setting of the loader. Nobody iterates it yet, so that class and
        # sampler may be exchanged.
        loader.__dict__["batch_sampler"] = RecordingSplitter(
            sampler=self.data_loader.batch_sampler, max_batch_size=self.max_physical_batch_size
        )
        loader.__class__ = SplittingLoader
        loader.tracker = self.data_loader.tracker
        loader.optimizer = self.optimizer
        return loader
