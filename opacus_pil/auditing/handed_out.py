"""Which batches private loaders have handed out, and which of them a step has used.

Listens to torch's loaders and to the samplers under them, and counts: a batch is its number of
rows. Knows no model, optimizer or accountant.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from torch.utils.data import BatchSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .._validate import IntArray
from .measurements import Source

_SAMPLERS = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler, BatchSampler)


class Waiting:
    """Batches of one sampler that were handed out and that no step has used.

    Guarantee: whatever a loop skips and however far it fetches ahead, a step made on batches that
        no other step was made on is `fed`. It is `ordered` if batches are used in their order, each
        or several of them for a step, with some rows left out or none; it is `equal` if each step
        is made on a batch of its own with all rows, in any order. Trainings that only seem to keep
        to an order miss it soon, since sizes of draws are random.

    Attributes:
        count: Batches handed out so far, used or not.
        spare: Of these, more than steps were made.
    """

    def __init__(self) -> None:
        self.count = self.spare = 0
        self._known = True  # every size: batches that overtake each other have none
        self._queue: deque[int] = deque()  # if steps keep the order
        self._loose: Counter[int] = Counter()  # if steps do not
        self._fresh: list[int] = []  # since the last step

    def give(self, size: int | None) -> None:
        """Take in a batch of so many rows; None: not known."""
        self.count += 1
        self.spare += 1
        if size is None:
            self._known = False
        elif self._known:
            self._queue.append(size)
            self._loose[size] += 1
            self._fresh.append(size)

    def take(self, rows: int | None) -> Source:
        """Find the batches that a step of so many rows was made on; None: not known."""
        fed = self.spare > 0
        self.spare -= fed
        fresh, self._fresh = self._fresh, []
        if not self._known:
            return Source(fed=fed)
        if rows is None:
            if self._queue:
                self._queue.popleft()
            return Source(fed=fed)
        equal = self._loose[rows] > 0
        if equal:
            self._loose[rows] -= 1
        # The fewest of the oldest that have the rows: none that a later step could need is lost.
        total = self._queue.popleft() if self._queue else -1
        while self._queue and total < rows:
            total += self._queue.popleft()
        whole = equal or total == rows or rows in itertools.accumulate(reversed(fresh))
        return Source(fed=fed, ordered=total >= rows, equal=equal, whole=whole)


class HandedOut:
    """Listens to loaders, and tells which batches of the private ones wait to be used.

    Attributes:
        failure: What went wrong in listening, which then ends: a script goes on whether or not it
            can be looked at.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._drawn: dict[Any, tuple[IntArray, list[int]]] = {}  # rows of each sampler, its draws
        self._loaders: list[Any] = []
        self._waiting: dict[int, tuple[Any, Waiting]] = {}  # by sampler, which is kept alive
        self._passes: weakref.WeakKeyDictionary[Any, _Pass] = weakref.WeakKeyDictionary()
        self._asking = threading.local()  # a script may load in a thread of its own

    def know(self, loader: Any) -> None:
        """Learn of a loader that `make_private` returned."""
        self._loaders.append(loader)

    def why_unseen(self, loader: Any) -> str:
        """Say why nothing can be concluded of a loader; empty: its batches are seen."""
        if loader is None:
            return "it is not known which loader belongs to the optimizer"
        if self.failure:
            return f"listening to loaders failed ({self.failure})"
        sampler = _sampler_of(loader)
        ours = type(sampler).__module__.startswith("opacus_pil.")
        heard = ours or type(sampler).__iter__ in {kind.__iter__ for kind in _SAMPLERS}
        if not heard and not self._of(sampler).count:
            return f"batches may be taken from {type(sampler).__name__} unseen"
        return ""

    def use(self, loader: Any, rows: int | None) -> tuple[int, Source]:
        """Hold a step against what was handed out for it.

        Where nothing of the loader waits, batches of another private loader will do that draws from
        the same data at the same rate: Opacus makes one at every `make_private`.

        Args:
            loader: The one that belongs to the optimizer.
            rows: Of the step; None: not known.

        Returns:
            Batches handed out so far by the loaders that will do, and what was found.
        """
        kinds = {id(s): s for s in map(_sampler_of, [loader, *self._alike(loader)])}
        found = [self._of(sampler) for sampler in kinds.values()]
        chosen = next((waiting for waiting in found if waiting.spare), found[0])
        return sum(waiting.count for waiting in found), chosen.take(rows)

    def drawn_of(self, loader: Any, instances: int | None) -> tuple[IntArray | None, int]:
        """Return how often each row was drawn for a training, and in how many draws."""
        own = getattr(loader, "batch_sampler", None)
        if own in self._drawn:
            counts, draws = self._drawn[own]
            return counts, draws[0]
        alike = [d for s, d in self._drawn.items() if len(d[0]) == instances]
        if not alike:
            return None, 0
        counts = np.sum([counts for counts, _ in alike], axis=0)
        return counts, sum(draws[0] for _, draws in alike)

    # --- what is heard ------------------------------------------------------------------------

    def _draws(self, sampler: Any, rows: Any) -> None:
        """A sampler drew: for a loader that asks, or for a script that fetches rows itself."""
        with self._guarded():
            if isinstance(sampler, UniformWithReplacementSampler):
                self._count(sampler, rows)
            asking = getattr(self._asking, "sources", None)
            if asking is None:
                self._give([sampler], _length(rows))
            else:
                asking.append(sampler)

    def _asks(self, batches: Any, ask: Callable[[Any], Any]) -> Any:
        """A loader asks its sampler for the rows of one more batch, long before its turn maybe."""
        before, self._asking.sources = getattr(self._asking, "sources", None), []
        try:
            rows = ask(batches)
            sources = self._asking.sources
        finally:
            self._asking.sources = before
        with self._guarded():
            running = self._passes.get(batches)
            if running is None or running.of is not batches._sampler_iter:
                running = self._passes[batches] = _Pass(batches._sampler_iter)
                running.sources += _chain(batches._index_sampler)
            running.sources += [s for s in sources if not _among(s, running.sources)]
            running.sizes.append(_length(rows) if getattr(batches, "_in_order", True) else None)
        return rows

    def _hands(self, batches: Any, hand: Callable[[Any], Any]) -> Any:
        """A loader hands out its next batch."""
        try:
            batch = hand(batches)
        except StopIteration:
            raise
        except BaseException:  # the batch is lost, the next one is another
            if batches in self._passes and self._passes[batches].sizes:
                self._passes[batches].sizes.popleft()
            raise
        with self._guarded():
            running = self._passes.get(batches)
            if running is not None and running.sizes:
                self._give(running.sources, running.sizes.popleft())
        return batch

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = self.failure or f"{type(error).__name__}: {error}"

    # --- inside -------------------------------------------------------------------------------

    def _give(self, sources: list[Any], size: int | None) -> None:
        for loader in self._loaders:
            sampler = _sampler_of(loader)
            if _among(sampler, sources):
                filled = bool(getattr(loader.collate_fn, "rand_on_empty", False))
                self._of(sampler).give(1 if filled and size == 0 else size)
                return

    def _count(self, sampler: Any, rows: list[int]) -> None:
        if sampler not in self._drawn:
            self._drawn[sampler] = np.zeros(int(sampler.num_samples), dtype=np.int64), [0]
        counts, draws = self._drawn[sampler]
        counts[rows] += 1
        draws[0] += 1

    def _of(self, sampler: Any) -> Waiting:
        return self._waiting.setdefault(id(sampler), (sampler, Waiting()))[1]

    def _alike(self, loader: Any) -> Iterator[Any]:
        rate = getattr(loader, "sample_rate", None)
        for other in self._loaders:
            same = rate is not None and getattr(other, "sample_rate", None) == rate
            if same and other.dataset is loader.dataset:
                yield other

    # --- what is listened to ------------------------------------------------------------------

    def patches(self) -> list[tuple[Any, str, Any, Any]]:
        """Return what to put on torch's loaders and on samplers: (owner, name, theirs, ours)."""
        ask, hand = _BaseDataLoaderIter._next_index, _BaseDataLoaderIter.__next__

        def asking(batches: Any) -> Any:
            return self._asks(batches, ask)

        def handing(batches: Any) -> Any:
            return self._hands(batches, hand)

        return [
            (_BaseDataLoaderIter, "_next_index", ask, functools.wraps(ask)(asking)),
            (_BaseDataLoaderIter, "__next__", hand, functools.wraps(hand)(handing)),
            *(self._draws_of(kind) for kind in _SAMPLERS),
        ]

    def _draws_of(self, kind: Any) -> tuple[Any, str, Any, Any]:
        draw = kind.__iter__

        def drawing(sampler: Any) -> Iterator[Any]:
            for rows in draw(sampler):
                self._draws(sampler, rows)
                yield rows

        return kind, "__iter__", draw, functools.wraps(draw)(drawing)


@dataclass
class _Pass:
    """What a loader's iterator has asked for: sizes not handed out yet, and who drew them."""

    of: Any
    sizes: deque[int | None] = field(default_factory=deque)
    sources: list[Any] = field(default_factory=list)


def _sampler_of(loader: Any) -> Any:
    """Return what draws a loader's batches. Asked for late: a recorder may have exchanged it."""
    sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", loader) if sampler is None else sampler


def _chain(sampler: Any) -> list[Any]:
    """Return a sampler and those it passes on: Opacus splits draws, others record or shard them."""
    found: list[Any] = []
    while sampler is not None and not _among(sampler, found):
        found.append(sampler)
        inner = (getattr(sampler, name, None) for name in ("batches", "batch_sampler", "sampler"))
        sampler = next((one for one in inner if one is not None), None)
    return found


def _among(one: Any, several: Iterable[Any]) -> bool:
    return any(one is other for other in several)


def _length(rows: Any) -> int:
    return len(rows) if hasattr(rows, "__len__") else 1
