"""Draws that come in several physical batches, and which of them Opacus's memory manager hands out.

Opacus's BatchMemoryManager puts a plain DataLoader around our sampler: rows are seen when they are
drawn, which with workers is long before their batch is used, and handing out is not seen at all.
Knows no model, optimizer or accountant.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

from .passes import Pass


@dataclass(eq=False)
class Draw:
    """Rows drawn together: charged once, however many physical batches they come in.

    Attributes:
        rows: Rows of the data set, in the order of the batches.
        complete: Whether no more physical batches of it will follow.
    """

    rows: list[int]
    complete: bool = True


class SplitPasses:
    """Finds the draw behind each physical batch of Opacus's BatchMemoryManager.

    Edge cases (`use` answers None, "unknown", from there to the end of the pass):
        a batch was handed out and not used, fetched ahead or used twice: these look alike
        batches of an older pass were handed out, or wait to be used
    """

    def __init__(self) -> None:
        self._running: Pass | None = None
        self._pieces: deque[Draw] = deque()  # one entry per physical batch that was not used yet
        self._draw: Draw | None = None  # the newest
        self._used = 0
        self._trusted = True
        self._consumer: weakref.ref[Any] | None = None  # DataLoader iterator of the running pass
        # Iterators of older passes, and how many of their batches were used.
        self._older: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def begin(self, running: Pass) -> None:
        """A sampler starts a pass."""
        previous = None if self._consumer is None else self._consumer()
        if previous is not None and self._draw is not None:
            self._older[previous] = self._used
        consumer = _calling_iterator()
        if consumer is not None:
            self._older.pop(consumer, None)  # persistent workers keep their iterator
        self._consumer = None if consumer is None else weakref.ref(consumer)
        self._running, self._pieces, self._draw = running, deque(), None
        self._used, self._trusted = 0, True

    def emit(self, *, last: bool) -> None:
        """Opacus's manager is about to pass on one more piece of the newest draw."""
        if self._running is None or not self._running.emitted:
            return  # signalled by hand
        if self._draw is None or self._draw.complete:
            self._draw = Draw(self._running.emitted[-1], complete=False)
        self._draw.complete = last
        self._pieces.append(self._draw)

    @property
    def active(self) -> bool:
        """Whether the running pass is split by Opacus's manager."""
        return self._draw is not None

    @property
    def left_out(self) -> bool:
        """Whether batches of a pass in training were handed out, all so far, and not used.

        Never with workers, which ask for batches ahead of their turn.
        """
        consumer = None if self._consumer is None else self._consumer()
        ahead = getattr(consumer, "_num_workers", 1) > 0
        return bool(self._used) and not ahead and _handed_out(consumer) != self._used

    @property
    def interfering(self) -> bool:
        """Whether a batch of an older pass was handed out and is not used yet."""
        return any(_handed_out(one) != used for one, used in self._older.items())

    def use(self) -> Draw | None:
        """Return the draw that the batch handed out last belongs to; None: not certain."""
        consumer = None if self._consumer is None else self._consumer()
        self._trusted = (
            self._trusted
            and bool(self._pieces)
            and _handed_out(consumer) == self._used + 1
            and not self.interfering
        )
        if not self._trusted:
            return None
        self._used += 1
        draw = self._pieces.popleft()
        if draw.complete and not (self._pieces and self._pieces[0] is draw):
            assert self._running is not None
            self._running.emitted.popleft()
        return draw


def _calling_iterator() -> Any:
    """Return the DataLoader iterator that asks the sampler for rows; None: another caller.

    Nothing else tells which batch a plain DataLoader has handed out: its sampler is not asked
    any more near the end of a pass, and collation runs in the workers.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, _BaseDataLoaderIter):
            return caller
        frame = frame.f_back
    return None


def _handed_out(iterator: Any) -> int | None:
    """Return how many batches a DataLoader iterator has handed out; None: it does not say."""
    return getattr(iterator, "_num_yielded", None)
