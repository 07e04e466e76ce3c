"""What is left of a pass over the data, and how another process goes on with it.

Knows lists of rows, no data, model or accountant. Nothing is drawn twice: rows that were drawn and
not handed out are kept as they are, the others are drawn when their turn comes.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedError


@dataclass(frozen=True)
class Remainder:
    """What is left of a pass.

    Attributes:
        waiting: Rows of the batches that were drawn and not handed out, in order. A loader with
            workers draws ahead.
        draws: Number of batches still to be drawn after them.
    """

    waiting: list[list[int]]
    draws: int


class Pass:
    """One pass of a sampler: hands its batches to a loader, and knows what is left.

    Args:
        source: The batches still to be drawn.
        draws: How many these are.
        waiting: Batches of an interrupted pass, handed out before `source` is asked.
        redrawn: Whether another process draws the rest by itself, from the saved state of the
            generator. If not, they are read from `source` when somebody asks what is left.
        opened: Called when the first batch is asked for.
        closed: Called when one is asked for and there is none left.
    """

    def __init__(
        self,
        source: Iterator[list[int]],
        *,
        draws: int,
        waiting: list[list[int]] | None = None,
        redrawn: bool,
        opened: Callable[[], None] | None = None,
        closed: Callable[[], None] | None = None,
    ) -> None:
        self.emitted: deque[list[int]] = deque()  # given to the loader, not handed out yet
        self.owner: weakref.ref[Any] | None = None  # who hands out; None: an unknown loader
        self.exhausted = False
        self._waiting = deque(waiting or [])
        self._source = source
        self._draws = draws
        self._redrawn = redrawn
        self._opened, self._closed = opened, closed

    def __iter__(self) -> Pass:
        """Return itself: one pass."""
        return self

    def __next__(self) -> list[int]:
        """Return the next batch's rows."""
        if self._opened is not None:
            self._opened()
            self._opened = None
        if self._waiting:
            rows = self._waiting.popleft()
        else:
            try:
                rows = next(self._source)
            except StopIteration:
                if self._closed is not None and not self.exhausted:
                    self._closed()
                self.exhausted = True
                raise
            self._draws -= 1
        self.emitted.append([int(row) for row in rows])
        return rows

    def remainder(self) -> Remainder:
        """Return what was not handed out yet."""
        if not self._redrawn:
            # To the end and past it: torch's RandomSampler draws once more when it is exhausted.
            ahead = list(itertools.islice(self._source, max(self._draws, 0) + 1))
            self._waiting.extend(ahead)
            self._draws -= len(ahead)
        waiting = [[int(row) for row in rows] for rows in [*self.emitted, *self._waiting]]
        return Remainder(waiting, max(self._draws, 0) if self._redrawn else 0)


class Resumable:
    """Mixed into a recording sampler: which pass is running, and which one to go on with."""

    _running: weakref.ref[Pass] | None = None
    _resumed: Remainder | None = None

    def begin(
        self,
        source: Callable[[int], Iterator[list[int]]],
        *,
        redrawn: bool,
        closed: Callable[[], None] | None = None,
    ) -> Pass:
        """Start a pass: what is left of an interrupted one, once, else a whole one.

        Args:
            source: Draws so many batches.
            redrawn: As in Pass.
            closed: Likewise.
        """
        left = self._resumed
        draws = len(self) if left is None else left.draws  # type: ignore[arg-type]
        waiting = None if left is None else left.waiting
        # A DataLoader with workers asks for two iterators and uses the second: what is left is
        # left until it is used.
        opened = None if left is None else self._forget
        running = Pass(
            source(draws), draws=draws, waiting=waiting, redrawn=redrawn, opened=opened,
            closed=closed,
        )  # fmt: skip
        self._running = weakref.ref(running)
        return running

    def _forget(self) -> None:
        self._resumed = None

    def hand_out(self, owner: object) -> None:
        """Say who hands out the batches of the running pass."""
        running = None if self._running is None else self._running()
        if running is not None:
            running.owner = weakref.ref(owner)

    @property
    def interrupted(self) -> bool:
        """Whether the next pass is what is left of an interrupted one."""
        return self._resumed is not None

    def resume(self, left: Remainder | None) -> None:
        """Make the next pass what is left of an interrupted one; None: a whole one."""
        self._running, self._resumed = None, left

    def remainder(self) -> Remainder | None:
        """Return what is left of the running pass; None: the next pass is a whole one.

        A pass runs until its loop has seen its end or was left (`break`), as in one process.

        Raises:
            UnsupportedError: A loader that is not ours hands the batches out, or one of its
                batches failed: nobody knows how many were used.
        """
        running = None if self._running is None else self._running()
        if self._resumed is not None or running is None:
            return self._resumed
        if running.owner is None:
            if running.exhausted and not running.emitted:
                return None
            raise UnsupportedError(
                "Expected a pass of the private loader itself, got one through another loader "
                "(Opacus's BatchMemoryManager builds one), which hides how many batches were "
                "used. Use opacus_pil.BatchMemoryManager, or save after a whole pass."
            )
        owner = running.owner()
        if owner is None or owner.finished:
            return None
        if owner.lost:
            raise UnsupportedError(
                "Expected to know how many batches of this pass were used, got a pass with a batch "
                "that failed. Save after the pass."
            )
        return running.remainder()


def started(loader: Any, start: Callable[[], Any]) -> Any:
    """Start a loader's pass; one that goes on with another's draws nothing that it had drawn.

    A DataLoader begins a pass by drawing a seed for its workers. Here that seed comes from the
    generator's state, without moving it.
    """
    if not loader.batch_sampler.interrupted:
        return start()
    kept = loader.generator
    state = torch.get_rng_state() if kept is None else kept.get_state()
    seed = int.from_bytes(hashlib.sha256(state.cpu().numpy().tobytes()).digest()[:7])
    loader.generator = torch.Generator().manual_seed(seed)
    try:
        return start()
    finally:
        loader.generator = kept
