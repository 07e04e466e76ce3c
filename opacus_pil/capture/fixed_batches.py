"""Fixed batches: a loader like the caller's own that publishes the rows of each batch.

For `poisson_sampling=False`, where Opacus hands back the caller's loader. That object is never
changed: the copy shares its data set and samplers. Knows no model, optimizer or accountant.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from ..errors import UnsupportedError
from .indices import Batches, proving, require_in_order
from .passes import Pass, Resumable
from .tracker import BatchTracker


class RecordingBatchSampler(Resumable, Sampler[list[int]]):
    """Passes on the caller's batches, remembering them.

    Args:
        batches: The caller's batch sampler.
        tracker: Told when a new iterator begins.
    """

    def __init__(self, batches: Any, *, tracker: BatchTracker) -> None:
        self.batches = batches
        self.emitted: deque[list[int]] = deque()
        self._tracker = tracker

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return len(self.batches)

    def __iter__(self) -> Pass:
        """Start a pass with its own queue of emitted batches."""
        # Not a generator: the queue must exist before a DataLoader with workers primes itself.
        # The caller's sampler keeps its order to itself: a saved pass holds the order, not a seed.
        running = self.begin(lambda draws: iter(self.batches if draws else ()), redrawn=False)
        self.emitted = running.emitted
        self._tracker.begin(running)
        return running


class RecordingTorchBatches(RecordingBatchSampler, BatchSampler):
    """The same for torch's BatchSampler, whose kind and batch_size Opacus's splitting asks for."""

    def __init__(self, batches: BatchSampler, *, tracker: BatchTracker) -> None:
        super().__init__(batches, tracker=tracker)
        self.sampler = batches.sampler
        self.batch_size = batches.batch_size
        self.drop_last = batches.drop_last


class RecordingFixedLoader(DataLoader[Any]):
    """A DataLoader that publishes each batch's rows to `tracker` just before it is handed out."""

    tracker: BatchTracker

    def __iter__(self) -> Any:
        """Start a pass over the data."""
        return Batches(self, proving(self, super().__iter__))


def recording_copy(loader: DataLoader[Any]) -> tuple[RecordingFixedLoader, BatchTracker]:
    """Return a loader that yields what `loader` would, and the tracker of its rows.

    Raises:
        UnsupportedError: Batches are not formed by the loader, or may arrive out of order.
    """
    if loader.batch_sampler is None:
        raise UnsupportedError(
            "Expected a loader that forms batches, got batch_size=None. The rows of a batch are "
            "not known to such a loader. Pass batch_size, or use batch(indices=...)."
        )
    require_in_order(loader)
    tracker = BatchTracker()
    options: dict[str, Any] = {}
    if loader.num_workers:
        options = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    batches: Any = loader.batch_sampler
    kind = RecordingTorchBatches if isinstance(batches, BatchSampler) else RecordingBatchSampler
    copied = RecordingFixedLoader(
        loader.dataset,
        batch_sampler=kind(batches, tracker=tracker),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **options,
    )
    # Opacus hands back the caller's loader, which says these; a DataLoader given a batch_sampler
    # never reads them and refuses to have them set.
    vars(copied).update(
        batch_size=loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last
    )
    copied.tracker = tracker
    tracker.loader = copied
    return copied, tracker
