"""Which rows of the data set are in the batch that training is looking at.

A loader that publishes the rows of each batch as it hands the batch out. Knows no model, optimizer
or accountant; the random stream and the batches are Opacus's.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)

from .. import _validate as check
from .._validate import IntArray
from ..errors import UnsupportedError
from .draws import Draw, SplitPasses
from .passes import Pass, Resumable, started
from .shards import RecordingShardSampler


class BatchTracker:
    """Holds the rows of the batch handed out last, until whoever uses the batch claims them.

    Edge cases (`claim` answers None, "unknown", rather than guess):
        nothing was handed out since the last claim or since a new iterator began
        two iterators are alive and both have a batch that nobody claimed
        an iterator failed before: its later batches can no longer be matched
        the batch came while a loop over Opacus's BatchMemoryManager had one waiting
    """

    def __init__(self) -> None:
        self._rows: IntArray | None = None
        self._owner: weakref.ref[Any] | None = None  # iterator whose batch is unclaimed
        self._explicit = False
        self.handed_out = 0  # batches of this pass since the last claim
        self.unclaimed = 0  # the same of all passes: a caller may have kept earlier ones
        self.drawn: Draw | None = None  # what the batch claimed last was drawn in; None: unknown
        self.split = SplitPasses()  # knows the draws when Opacus's BatchMemoryManager loads
        self._draw: Draw | None = None
        self.loader: Any = None  # the recording loader that publishes here; None: batch(indices=…)

    def begin(self, running: Pass) -> None:
        """A sampler starts a pass: a batch of an older one is no longer the current batch."""
        self.split.begin(running)
        if not self._explicit:
            self._rows, self.handed_out = None, 0

    def publish(
        self, rows: npt.ArrayLike | None, *, owner: object, draw: Draw | None = None
    ) -> None:
        """A batch is being handed out; `draw` says what it is part of, if it is not all of it."""
        if self._explicit:
            return
        other = None if self._owner is None else self._owner()
        ambiguous = other is not None and other is not owner
        known = rows is not None and not ambiguous
        self._rows = np.asarray(rows, dtype=np.int64) if known else None
        self._draw = draw
        self._owner = weakref.ref(owner)
        self.handed_out += 1
        self.unclaimed += 1

    def claim(self) -> IntArray | None:
        """Return the current batch's rows once; None when they are not known for certain."""
        rows, published = self._rows, self.handed_out > 0 or self._explicit
        self._rows, self._owner, self.handed_out, self.unclaimed = None, None, 0, 0
        if rows is not None and not self._explicit and self.split.interfering:
            rows = None
        if rows is not None:
            self.drawn = Draw(rows.tolist()) if self._draw is None else self._draw
        else:  # where nothing is published, a memory manager of Opacus may have handed out a part
            self.drawn = None if published else self.split.use()
        return rows

    @property
    def in_hand(self) -> bool:
        """Whether a batch may be in hand that no step has claimed; its rows may be unknown."""
        return self._rows is not None or self.handed_out > 0 or self.split.active

    def current(self) -> IntArray | None:
        """Return the rows of the batch in hand, unclaimed; None when they are not known."""
        if self.handed_out > 1 or (not self._explicit and self.split.interfering):
            return None
        return self._rows

    def set_explicit(self, rows: IntArray | None) -> None:
        """Take the caller's rows for the next claim and ignore loaders; None: back to loaders."""
        self._rows, self._draw, self._owner, self.handed_out = rows, None, None, 0
        self._explicit = rows is not None


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
        running = self.begin(self._draw, redrawn=True)
        self._tracker.begin(running)
        self.emitted = running.emitted
        return running

    def _draw(self, count: int) -> Iterator[list[int]]:
        for rows in itertools.islice(super().__iter__(), count):
            if self.population is not None:
                rows = self.population[rows].tolist() if rows else []
            yield rows


class RecordingDataLoader(DPDataLoader):
    """Opacus's loader, publishing each batch's rows to `tracker` just before it is handed out."""

    tracker: BatchTracker

    def __iter__(self) -> Any:
        """Start a pass over the data."""
        # Eager, as in DataLoader: workers are primed and the base seed is drawn here.
        return Batches(self, started(self, super().__iter__))


class Batches:
    """One pass over a recording loader; pairs batches and rows first in, first out."""

    def __init__(self, loader: Any, batches: Any) -> None:
        self._loader = loader
        self._batches = batches
        self._emitted: deque[list[int]] | None = loader.batch_sampler.emitted
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
            self.finished = True
            raise
        except BaseException:
            self._emitted = None  # was the failed batch consumed? Unknown from here on.
            raise
        current = self._loader.batch_sampler.emitted
        if self._loader._iterator is self._batches and self._emitted is not current:
            self._emitted = None  # persistent workers were restarted by a newer pass
        self._publish(None if self._emitted is None else self._emitted.popleft())
        return batch

    def _publish(self, rows: Any) -> None:
        self._loader.tracker.publish(rows, owner=self)


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
