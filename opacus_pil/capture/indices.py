"""Which rows of the data set are in the batch that training is looking at.

A loader that publishes the rows of each batch as it hands the batch out. Knows no model, optimizer
or accountant; the random stream and the batches are Opacus's.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)

from .. import _validate as check
from .._validate import IntArray
from ..errors import UnsupportedError
from .collate import DEFAULT, ProvingCollate, RowOrder, keeps_order
from .passes import Pass, Resumable, started
from .shards import RecordingShardSampler
from .tracker import BatchTracker


class RecordingSampler(Resumable, UniformWithReplacementSampler):
    """Opacus's Poisson sampler, remembering what it emitted; optionally over part of the rows.

    Guarantee: one independent coin of probability `sample_rate` per member of `population` and
        batch. Over all rows the random stream is that of Opacus's sampler, draw for draw.

    Args:
        num_samples: Number of rows of the data set.
        sample_rate: Probability that a member is drawn into a batch. In (0, 1].
        generator: Source of the coins; None: torch's global generator.
        steps: Number of batches; None: Opacus's int(1 / sample_rate).
        population: Ascending rows to draw from; None: all.
        tracker: Told when a new iterator begins.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: Any = None,
        steps: int | None = None,
        population: IntArray | None = None,
        tracker: BatchTracker,
    ) -> None:
        size = num_samples if population is None else len(population)
        super().__init__(
            num_samples=size, sample_rate=sample_rate, generator=generator, steps=steps
        )
        self.population = population
        self.emitted: deque[list[int]] = deque()
        self._tracker = tracker

    def __iter__(self) -> Pass:
        """Start a pass with its own queue of emitted batches."""
        # Not a generator: the queue must exist before a DataLoader with workers primes itself.
        running = self.begin(self._draw, redrawn=True, closed=self._tracker.exhausted)
        self._tracker.begin(running)
        self.emitted = running.emitted
        return running

    def _draw(self, count: int) -> Iterator[list[int]]:
        source = super().__iter__()
        for _ in itertools.repeat(None, count):
            self._tracker.draws(self.generator, self.sample_rate)
            rows = next(source, None)
            if rows is None:
                return
            if self.population is not None:
                rows = self.population[rows].tolist() if rows else []
            yield rows


class RecordingDataLoader(DPDataLoader):
    """Opacus's loader, publishing each batch's rows to `tracker` just before it is handed out."""

    tracker: BatchTracker

    def __iter__(self) -> Any:
        """Start a pass over the data."""
        # Eager, as in DataLoader: workers are primed and the base seed is drawn here.
        return Batches(self, proving(self, super().__iter__))


def proving(loader: Any, start: Callable[[], Any]) -> Any:
    """Start a pass whose batches say which row is where, unless collation keeps the order."""
    own = loader.collate_fn
    if keeps_order(own):
        return started(loader, start)
    loader.collate_fn = ProvingCollate(own, batch_first=getattr(own, "batch_first", True))
    try:
        return started(loader, start)
    finally:
        loader.collate_fn = own  # a loader built from this one gets what the user gave


class Batches:
    """One pass over a recording loader; pairs batches and rows first in, first out."""

    def __init__(self, loader: Any, batches: Any) -> None:
        self._loader = loader
        self._batches = batches
        self._emitted: deque[Any] | None = loader.batch_sampler.emitted
        self._plain = keeps_order(loader.collate_fn)
        self.finished = False
        loader.batch_sampler.hand_out(self)

    @property
    def lost(self) -> bool:
        """Whether batches and rows can no longer be paired."""
        return self._emitted is None

    def __iter__(self) -> Batches:
        """Return itself: one pass."""
        return self

    def __len__(self) -> int:
        """Return the number of batches of the pass."""
        return len(self._batches)

    def __next__(self) -> Any:
        """Return the next batch, after publishing its rows."""
        try:
            batch = next(self._batches)
        except StopIteration:
            if not self.finished:
                self._loader.tracker.end(self)
            self.finished = True
            raise
        except BaseException:
            self._emitted = None  # was the failed batch consumed? Unknown from here on.
            raise
        current = self._loader.batch_sampler.emitted
        if self._loader._iterator is self._batches and self._emitted is not current:
            self._emitted = None  # persistent workers were restarted by a newer pass
        order, positions = DEFAULT, None
        if not self._plain:
            batch, how, why, positions = batch
            order = RowOrder(how, why, apart=bool(how))
        self._publish(None if self._emitted is None else self._emitted.popleft(), order, positions)
        return batch

    def _publish(self, rows: Any, order: RowOrder, positions: list[int] | None) -> None:
        self._loader.tracker.publish(in_order(rows, positions), owner=self, order=order)


def in_order(rows: Any, positions: list[int] | None) -> Any:
    """Return drawn rows in the order that the collate function put them in."""
    return rows if rows is None or positions is None else [rows[k] for k in positions]


def require_in_order(loader: Any) -> None:
    """Raise if batches may overtake each other."""
    if not getattr(loader, "in_order", True):
        raise UnsupportedError(
            "Expected a loader with in_order=True, got in_order=False. Batches that overtake each "
            "other cannot be matched with their rows."
        )


def record_indices(
    loader: DPDataLoader, *, population: IntArray | None = None, steps: int | None = None
) -> BatchTracker:
    """Make a freshly built DPDataLoader record its rows, in place.

    Args:
        loader: A DPDataLoader that nobody iterates yet; its class and sampler are exchanged.
        population: Ascending rows to draw from; None: all rows of the data set, in a distributed
            loader all of its shard.
        steps: Number of batches per pass; None: as the loader had it.

    Returns:
        The tracker that knows the current batch's rows.

    Raises:
        UnsupportedError: Not a DPDataLoader with Opacus's uniform sampler, or in_order=False.
        TypeError, ValueError: `population` is empty, repeats a row or leaves the data set.
    """
    sampler = loader.batch_sampler
    samplers = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler)
    if type(loader) is not DPDataLoader or type(sampler) not in samplers:
        raise UnsupportedError(
            f"Expected a DPDataLoader with Opacus's UniformWithReplacementSampler, got "
            f"{type(loader).__name__} with {type(sampler).__name__}. Rows are recorded for "
            "Opacus's own Poisson sampling only."
        )
    if population is not None:
        population = np.sort(check.index_array("population", population, size=len(loader.dataset)))
        check.integer("len(population)", len(population), low=1)
    require_in_order(loader)
    tracker = BatchTracker()
    if isinstance(sampler, DistributedUniformWithReplacementSampler):
        assert population is None
        assert steps is None
        recording: Any = RecordingShardSampler(sampler, tracker=tracker)
    else:
        recording = RecordingSampler(
            num_samples=sampler.num_samples,
            sample_rate=sampler.sample_rate,
            generator=sampler.generator,
            steps=sampler.steps if steps is None else steps,
            population=population,
            tracker=tracker,
        )
    # DataLoader forbids setting a batch_sampler once built, to protect running iterators; this
    # loader has none yet.
    loader.__dict__["batch_sampler"] = recording
    loader.__class__ = RecordingDataLoader
    loader.tracker = tracker
    tracker.loader = loader
    return tracker
