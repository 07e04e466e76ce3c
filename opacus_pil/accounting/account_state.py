"""AccountState: what the account of every instance is made of, and how charges change it.

Checks nothing: whoever changes it has checked before (`charging`). What a number may claim it holds
as a value and never decides. What can be read from it is `readings`; its saved form is `ledger`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray, IntArray
from . import offsets
from .balances import Balances, Kernel, Pending
from .filter import PrivacyFilter
from .guarantee import GUARANTEES, weakest
from .history import History
from .ledger import Ledger
from .levels import LevelGrid
from .shards import merged, same_sums, settled

MOST_REASONS = 64  # different ones are kept; a run that goes wrong in more ways needs no more


@dataclass(eq=False)
class AccountState:
    """The account of every instance of a training set.

    Attributes:
        grid: Sensitivities and orders that charges are made on.
        balances: What has been charged to every instance, and the level it stands on.
        instance_ids: Shape (instances,), unique.
        num_present: Instances that are not forgotten. Kept: counting would cost a step time that
            grows with their number.
        caps: Shape (instances,), enforced clipping bounds, or None.
        privacy_filter: Budgets, or None.
        history: Who stood on which level at which step, or None.
        source: Where the levels come from, a key of `guarantee.STRONGEST_LABEL`.
        steps: Number of steps charged.
        unattributed: Number of steps in which everyone was charged the highest level.
        guarantee: The weakest label of any step so far.
        reasons: Sentence -> number of steps, in order of appearance.
    """

    grid: LevelGrid
    balances: Balances
    instance_ids: npt.NDArray[Any]
    num_present: int
    caps: FloatArray | None = None
    privacy_filter: PrivacyFilter | None = None
    history: History | None = None
    source: str = "fixed"
    steps: int = 0
    unattributed: int = 0
    guarantee: str = GUARANTEES[0]
    reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def unspent(
        cls,
        grid: LevelGrid,
        *,
        instance_ids: npt.NDArray[Any],
        privacy_filter: PrivacyFilter | None,
        history: bool,
        folder: str | os.PathLike[str] | None,
    ) -> AccountState:
        """Return an account without charges; `folder` as in `Balances`."""
        size = len(instance_ids)
        return cls(
            grid=grid,
            balances=Balances(size, levels=len(grid), orders=len(grid.orders), folder=folder),
            instance_ids=instance_ids,
            num_present=size,
            privacy_filter=privacy_filter,
            history=History(size, num_levels=len(grid)) if history else None,
        )

    @property
    def size(self) -> int:
        """Number of instances, forgotten ones included."""
        return len(self.balances.level)

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Shape (instances,), False for forgotten instances."""
        return self.balances.level != len(self.grid)

    # --- charging -----------------------------------------------------------------------------

    def charge(self, table: FloatArray, kernel: Kernel, *, attributed: bool) -> None:
        """Charge one step: each level its row of `table`, or everyone the highest level's."""
        if attributed:
            self.balances.charge(table, kernel)
        else:
            self.balances.charge_everyone(table[-1])
            self.unattributed += 1
        if self.history is not None:
            self.history.charge(*kernel, attributed=attributed)
        self.steps += 1

    def weaken(self, label: str) -> None:
        """Lower the guarantee to `label`, unless it is that weak already."""
        if label != self.guarantee:
            self.guarantee = weakest([self.guarantee, label])

    def count_reasons(self, reasons: Iterable[str]) -> None:
        """Count the reasons of one step's label, each once."""
        for reason in dict.fromkeys(reasons):
            if reason in self.reasons or len(self.reasons) < MOST_REASONS:
                self.reasons[reason] = self.reasons.get(reason, 0) + 1

    # --- levels -------------------------------------------------------------------------------

    def move(self, rows: IntArray, levels: IntArray) -> None:
        """Put `rows` on other levels from the next step on."""
        if self.history is not None:
            changed = self.balances.level[rows] != levels
            self.history.move(rows[changed], levels[changed])
        self.balances.move(rows, levels)

    def move_to(self, rows: IntArray, level: int) -> None:
        """Put all of `rows` on one level from the next step on."""
        self.move(rows, np.full(len(rows), level))

    def move_everyone(self, level: int) -> None:
        """Put whoever is not forgotten on one level from the next step on."""
        self.move_to(np.flatnonzero(self.present), level)

    def observe(self, sensitivities: FloatArray) -> None:
        """Put whoever is not forgotten on the level of their own entry, rounded up."""
        present = np.flatnonzero(self.present)
        self.move(present, self.grid.round_up(sensitivities[present]))

    def set_caps(self, caps: FloatArray) -> None:
        """Put everyone on the level of their cap; whoever was left out stays out."""
        if self.privacy_filter is not None:
            caps = np.where(self.privacy_filter.dropped, 0.0, caps)
        self.observe(caps)
        self.caps = caps
        self.source = "enforced" if self.steps else "fixed"

    def leave_out(self, settled: PrivacyFilter, caps: FloatArray) -> None:
        """Take whoever pays something but has no cap in this step out of it and all later ones."""
        rows = np.flatnonzero((caps == 0.0) & (self.balances.level > 0) & self.present)
        self.privacy_filter, self.caps = settled, caps
        settled.dropped[rows] = True
        self.move_to(rows, 0)

    def forget(self, rows: IntArray) -> None:
        """Stop charging `rows`, which were present."""
        self.move_to(rows, len(self.grid))
        self.num_present -= len(rows)

    # --- saved form ---------------------------------------------------------------------------

    def to_ledger(self) -> Ledger:
        """Return the saved form; it shares its arrays with this account."""
        held, pending = self.balances, self.balances.pending
        noise, rate = (0.0, 0.0) if pending is None else pending.kernel
        return Ledger(
            orders=self.grid.orders,
            sensitivities=self.grid.sensitivities,
            base=held.base,
            flushes=held.flushes,
            repeats=0 if pending is None else pending.repeats,
            noise_multiplier=noise,
            sample_rate=rate,
            level=held.level,
            offset=held.offset,
            infinite=held.infinite,
            worst_infinite=held.worst_infinite,
            caps=self.caps,
            source=self.source,
            steps=self.steps,
            unattributed=self.unattributed,
            guarantee=self.guarantee,
            reasons=dict(self.reasons),
            instance_ids=self.instance_ids,
            privacy_filter=self.privacy_filter,
            history=self.history,
        )

    def adopt(self, ledger: Ledger) -> None:
        """Become the account that was saved, on this grid and in this account's folder."""
        folder = self.balances.folder
        held = Balances(0, levels=len(self.grid), orders=len(self.grid.orders), folder=folder)
        if ledger.repeats:
            noise, rate = ledger.noise_multiplier, ledger.sample_rate
            table = self.grid.rdp(noise_multiplier=noise, sample_rate=rate)
            held.pending = Pending(table, (noise, rate), repeats=ledger.repeats)
        held.base, held.flushes = ledger.base, ledger.flushes
        held.level, held.offset = ledger.level, offsets.placed(ledger.offset, folder=folder)
        held.infinite, held.worst_infinite = ledger.infinite, ledger.worst_infinite
        self.balances = held
        self.num_present = int(np.count_nonzero(self.present))
        self.instance_ids, self.caps, self.source = ledger.instance_ids, ledger.caps, ledger.source
        self.steps, self.unattributed = ledger.steps, ledger.unattributed
        self.guarantee, self.reasons = ledger.guarantee, dict(ledger.reasons)
        self.privacy_filter, self.history = ledger.privacy_filter, ledger.history

    def merge(self, other: AccountState) -> None:
        """Take in the instances of a shard that was charged the same steps.

        Raises:
            LedgerError: As `shards.merged`; this account is left as it was.
        """
        mine, theirs = self.to_ledger(), other.to_ledger()
        if not same_sums(mine, theirs):
            mine, theirs = self._settled_ledger(), other._settled_ledger()
        self.adopt(merged(mine, theirs))

    def _settled_ledger(self) -> Ledger:
        """Return the saved form with pending steps in the sums."""
        ledger, pending = self.to_ledger(), self.balances.pending
        return ledger if pending is None else settled(ledger, pending.table)
