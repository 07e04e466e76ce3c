"""The history of a run: on which level each instance stood at each step, append-only.

Knows steps, rows and levels; not what a level costs. What several instances lost *together* cannot
be read from their single balances: it needs the levels they stood on at the same step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray, IntArray
from ..errors import LedgerError


@dataclass(frozen=True)
class JointSteps:
    """`count` equal steps of a few instances: their sensitivities (members,) and the kernel."""

    sensitivities: FloatArray
    noise_multiplier: float
    sample_rate: float
    count: int


class History:
    """Moves between levels and the kernel of every step.

    A move belongs to the first step it counts for. Everyone starts on the highest level; the level
    `num_levels` is where forgotten instances stand.
    """

    def __init__(self, size: int, *, num_levels: int) -> None:
        self.size = size
        self.num_levels = num_levels
        self.steps = 0
        # One array per kind, of chunks that are joined when they are read.
        self._moves: list[tuple[npt.NDArray[np.int32], ...]] = []
        self._kernels: list[list[Any]] = []  # noise_multiplier, sample_rate, attributed, count

    def move(self, rows: IntArray, levels: IntArray) -> None:
        """Note that `rows` stand on `levels` from the next step on."""
        if len(rows):
            step = np.full(len(rows), self.steps, dtype=np.int32)
            self._moves.append((step, rows.astype(np.int32), levels.astype(np.int32)))

    def charge(self, noise_multiplier: float, sample_rate: float, *, attributed: bool) -> None:
        """Note one step; in a step that is not `attributed` everyone paid the highest level."""
        kernel = [noise_multiplier, sample_rate, attributed]
        if self._kernels and self._kernels[-1][:3] == kernel:
            self._kernels[-1][3] += 1
        else:
            self._kernels.append([*kernel, 1])
        self.steps += 1

    def runs(self, rows: IntArray, *, sensitivities: FloatArray) -> list[JointSteps]:
        """Return the joint steps of `rows` in order of time; `sensitivities` of each level."""
        charged = np.append(sensitivities, 0.0)  # forgotten instances pay nothing
        step, row, level = self._joined()
        place = np.full(self.size, -1)
        place[rows] = np.arange(len(rows))
        mine = np.flatnonzero(place[row] >= 0)
        step, row, level = step[mine], place[row[mine]], level[mine]
        starts = np.cumsum([0, *(kernel[3] for kernel in self._kernels)])
        edges = np.unique(np.concatenate([step, starts]))
        current = np.full(len(rows), self.num_levels - 1)
        found, done = [], 0
        for edge, end in itertools.pairwise(edges.tolist()):
            until = int(np.searchsorted(step, edge, side="right"))
            for position in range(done, until):  # in order: the last move of a row counts
                current[row[position]] = level[position]
            done = until
            noise, rate, attributed, _ = self._kernels[
                int(np.searchsorted(starts, edge, side="right")) - 1
            ]
            joint = current.copy()
            if not attributed:
                joint[joint != self.num_levels] = self.num_levels - 1
            found.append(JointSteps(charged[joint], noise, rate, end - edge))
        return found

    def levels(self) -> IntArray:
        """Return the level everyone stands on now, shape (instances,)."""
        current = np.full(self.size, self.num_levels - 1)
        for _, row, level in self._moves:
            current[row] = level
        return current

    # --- saved form ---------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return arrays and plain values."""
        step, row, level = self._joined()
        return {
            "step": step.copy(),
            "row": row.copy(),
            "level": level.copy(),
            "kernels": [tuple(kernel) for kernel in self._kernels],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], *, size: int, num_levels: int) -> History:
        """Return a checked history from arrays and plain values.

        Raises:
            LedgerError: A key is missing or a value cannot be right.
        """
        made = cls(size, num_levels=num_levels)
        try:
            moves = tuple(np.array(state[key], dtype=np.int32) for key in ("step", "row", "level"))
            made._kernels = [
                [float(noise), float(rate), bool(attributed), int(count)]
                for noise, rate, attributed, count in state["kernels"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"Expected a readable history, got one with {error!r}.") from error
        made.steps = sum(kernel[3] for kernel in made._kernels)
        if not (made._can_hold(*moves) and all(map(_possible, made._kernels))):
            raise LedgerError(
                f"Expected a history of {size} instances on {num_levels} levels, in order of time, "
                "got one that is not. Use an earlier copy."
            )
        made._moves = [moves] if len(moves[0]) else []
        return made

    def merged(self, other: History, order: IntArray) -> History:
        """Return the history of both shards' instances, taken in `order`.

        Raises:
            LedgerError: Other steps.
        """
        if self._kernels != other._kernels:
            raise LedgerError("Expected shards that were charged the same steps, got other ones.")
        new_row = np.empty(len(order), dtype=np.int32)
        new_row[order] = np.arange(len(order))
        mine, theirs = self._joined(), other._joined()
        step = np.concatenate([mine[0], theirs[0]])
        row = new_row[np.concatenate([mine[1], theirs[1] + self.size])]
        level = np.concatenate([mine[2], theirs[2]])
        by_time = np.argsort(step, kind="stable")
        made = History(self.size + other.size, num_levels=self.num_levels)
        made._moves = [(step[by_time], row[by_time], level[by_time])]
        made._kernels = [list(kernel) for kernel in self._kernels]
        made.steps = self.steps
        return made

    # --- inside -------------------------------------------------------------------------------

    def _can_hold(
        self, step: npt.NDArray[Any], row: npt.NDArray[Any], level: npt.NDArray[Any]
    ) -> bool:
        """Whether moves are of this history's instances, levels and steps, in order of time."""
        return (
            step.ndim == row.ndim == level.ndim == 1
            and len(step) == len(row) == len(level)
            and bool((np.diff(step, prepend=0) >= 0).all())
            and bool((step <= self.steps).all())
            and bool(((row >= 0) & (row < self.size)).all())
            and bool(((level >= 0) & (level <= self.num_levels)).all())
        )

    def _joined(self) -> tuple[npt.NDArray[np.int32], ...]:
        """Return step, row and level of every move; keeps the joined arrays."""
        if not self._moves:
            empty = np.empty(0, dtype=np.int32)
            return empty, empty, empty
        if len(self._moves) > 1:
            self._moves = [tuple(np.concatenate(kind) for kind in zip(*self._moves, strict=True))]
        return self._moves[0]


def _possible(kernel: Sequence[Any]) -> bool:
    """Whether a saved kernel may be that of some steps."""
    noise, rate, _, count = kernel
    return noise >= 0.0 and 0.0 <= rate <= 1.0 and count > 0
