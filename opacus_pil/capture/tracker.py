"""BatchTracker: which rows are in the batch that was handed out, and was it used once.

Knows rows and who handed them out; no data, no gradient and no label.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._validate import IntArray
from .collate import DEFAULT, GIVEN, RowOrder, keeps_order
from .draws import Draw, SplitPasses
from .passes import Pass
from .randomness import Seen, generator_mark

NOT_HANDED_OUT = RowOrder(
    "", "no loader had just handed it out and no batch(indices=...) said which rows it holds"
)
_COLLATE_HIDDEN = RowOrder(
    "", "Opacus's BatchMemoryManager hides what the collate function does", apart=False
)


@dataclass(frozen=True)
class Claim:
    """The batch that a backward pass or a step has used, as far as it is known.

    Attributes:
        rows: Rows of the data set, in the order of the batch; None: not known for certain.
        draw: What they were drawn in, in no certain order; None: not known.
        order: How the order is known; or why not.
        fresh: Batches of this pass handed out since the last claim. 0: the batch was used before,
            or comes from elsewhere.
        unclaimed: The same over all passes: a caller may have kept earlier ones.
    """

    rows: IntArray | None
    draw: Draw | None
    order: RowOrder
    fresh: int
    unclaimed: int


class BatchTracker:
    """Holds the rows of the batch handed out last, until whoever uses the batch claims them.

    Edge cases (`claim` answers rows=None, "unknown", rather than guess):
        nothing was handed out since the last claim or since a new iterator began
        two iterators are alive and both have a batch that nobody claimed
        an iterator failed before: its later batches can no longer be matched
        the batch came while a loop over Opacus's BatchMemoryManager had one waiting
        the collate function did not show which row of the batch is which

    Attributes:
        skipped: Draws that were handed out and made no step while others did, since `settle`.
        rate: Largest probability that a row was drawn with; 0: nothing was drawn yet.
        coins_repeated: Whether batches were drawn by coins that had drawn others.
    """

    def __init__(self) -> None:
        self._rows: IntArray | None = None
        self._owner: weakref.ref[Any] | None = None  # iterator whose batch is unclaimed
        self._explicit = False
        self.handed_out = 0  # batches of this pass since the last claim
        self.unclaimed = 0  # the same of all passes
        self.skipped = 0
        self.split = SplitPasses()  # knows the draws when Opacus's BatchMemoryManager loads
        self._draw: Draw | None = None
        self._order = NOT_HANDED_OUT
        self._trained: weakref.WeakSet[Any] = weakref.WeakSet()  # passes with a claimed batch
        self._stepped = False  # a batch of this pass was claimed
        self._evaluated = True  # every batch of this pass was handed out with gradients off
        self._empty = False  # nobody was drawn into the batch handed out last
        self.rate = 0.0
        self.coins_repeated = False
        self.coins = Seen()
        self.midway: Callable[[], bool] = bool  # whether a claimed batch waits for its step
        # Told at the end of a pass of draws that made no step, and whether others did: there may
        # be no further step to say it at. Answers whether it was taken down.
        self.skipped_at_end: Callable[[bool], bool] = lambda stepped: False
        self.loader: Any = None  # the recording loader that publishes here; None: batch(indices=…)

    def draws(self, generator: Any, rate: float) -> None:
        """A sampler is about to throw a batch's coins."""
        self.coins_repeated |= self.coins.again(generator_mark(generator))
        self.rate = max(self.rate, float(rate))

    def forget_randomness(self) -> None:
        """The generators were put back on purpose, together with the ledgers."""
        self.coins.forget()
        self.coins_repeated = False

    def begin(self, running: Pass) -> None:
        """A sampler starts a pass: a batch of an older one is no longer the current batch.

        A loop may be left where it likes, at a public number of steps: the batch that was in hand
        then is no skipped draw; those before it are. A loop that looks through the data in between
        is not left, nor is one at an empty draw: whoever draws again until somebody is in it has
        another law than independent coins.
        """
        self.split.begin(running)
        if not self._explicit:
            left = self._owner is None or self._owner() is None
            self._close(self.handed_out - int(left and not self._empty))

    def end(self, owner: object) -> None:
        """A pass was gone through to its end: what no step has used of it was skipped."""
        if not self._explicit:
            self._stepped |= owner in self._trained
            self._close(self.handed_out + self.midway())

    def exhausted(self) -> None:
        """The sampler has no more batches; of one that Opacus's manager reads that is the end."""
        if self.split.left_out and not self._explicit:
            self.skipped += 1
            self._tell(stepped=True)

    def publish(
        self,
        rows: npt.ArrayLike | None,
        *,
        owner: object,
        draw: Draw | None = None,
        order: RowOrder = DEFAULT,
    ) -> None:
        """A batch is being handed out; `draw` says what it is part of, if it is not all of it."""
        if self._explicit:
            return
        other = None if self._owner is None else self._owner()
        ambiguous = other is not None and other is not owner
        if rows is None:
            order = RowOrder("", "the loader lost count of its batches", order.apart)
        elif ambiguous:
            order = RowOrder("", "two passes over the data run side by side", order.apart)
        elif not order.known:  # whom the batch holds is known all the same
            draw = Draw(np.asarray(rows, dtype=np.int64).tolist()) if draw is None else draw
        self._empty = rows is not None and not np.size(rows)
        self._rows = np.asarray(rows, dtype=np.int64) if order.known else None
        self._draw, self._order = (None, order) if rows is None or ambiguous else (draw, order)
        self._owner = weakref.ref(owner)
        self.handed_out += 1
        self.unclaimed += 1
        self._evaluated &= not torch.is_grad_enabled()

    def claim(self, *, passes: int = 1) -> Claim:
        """Return the current batch once.

        Args:
            passes: Backward passes whose gradients are claimed together.
        """
        rows, fresh, unclaimed = self._rows, self.handed_out, self.unclaimed
        published = fresh > 0 or self._explicit
        order = self._order if published else NOT_HANDED_OUT
        if self._explicit:
            order = GIVEN if rows is not None else NOT_HANDED_OUT
            fresh = int(rows is not None)
        self.skipped += max(fresh - passes, 0)
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            self._trained.add(owner)
        self._rows, self._owner, self.handed_out, self.unclaimed = None, None, 0, 0
        self._stepped = True
        if rows is not None and not self._explicit and self.split.interfering:
            self._draw = None
            why = "Opacus's BatchMemoryManager had a batch waiting"
            rows, order = None, RowOrder("", why, order.apart)
        draw = self._draw if published else None
        if rows is not None and draw is None:
            draw = Draw(rows.tolist())
        if not published:  # where a memory manager of Opacus hands out a part nothing is
            draw = self.split.use()
            if draw is not None:
                fresh, order = 1, DEFAULT if self._keeps_order else _COLLATE_HIDDEN
        return Claim(rows, draw, order, fresh, unclaimed)

    def settle(self) -> int:
        """Return the number of skipped draws and count anew."""
        skipped, self.skipped = self.skipped, 0
        return skipped

    def resume(self, skipped: int) -> None:
        """Go on where another training stood: nothing in hand, so many draws skipped."""
        self.skipped = 0
        self._close(0)
        self._owner, self.unclaimed, self.skipped = None, 0, skipped

    @property
    def in_hand(self) -> bool:
        """Whether a batch may be in hand that no step has claimed; its rows may be unknown.

        Of a loop that was left after some steps nothing is in hand.
        """
        if self.split.active or (self._explicit and self._rows is not None):
            return True
        left = self._stepped and (self._owner is None or self._owner() is None)
        return self.handed_out > 0 and not left

    def current(self) -> IntArray | None:
        """Return the rows of the batch in hand, unclaimed; None when they are not known."""
        if self.handed_out > 1 or (not self._explicit and self.split.interfering):
            return None
        return self._rows

    def set_explicit(self, rows: IntArray | None) -> None:
        """Take the caller's rows for the next claim and ignore loaders; None: back to loaders."""
        self._rows, self._draw, self._owner, self.handed_out = rows, None, None, 0
        self._explicit = rows is not None

    @property
    def _keeps_order(self) -> bool:
        return self.loader is not None and keeps_order(self.loader.collate_fn)

    def _close(self, skipped: int) -> None:
        # Whoever only evaluates, with gradients off, makes no step of any draw of the pass.
        if self._stepped or not self._evaluated:
            self.skipped += max(skipped, 0)
        self._tell(stepped=self._stepped)
        self._rows, self.handed_out = None, 0
        self._stepped, self._evaluated = False, True

    def _tell(self, *, stepped: bool) -> None:
        if self.skipped and self.skipped_at_end(stepped):
            self.skipped = 0
