"""Running sums over the noisy steps of one training, from which conformance is judged.

Filled by whoever sees the steps (`step_meter.py`). Knows numbers; no optimizer and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .._validate import FloatArray

KEPT_STEPS = 512  # of which all pairs of steps are compared; later ones with the one before


@dataclass(frozen=True)
class Source:
    """Where the rows of one step may come from, as far as sizes of batches tell.

    Attributes:
        fed: The private loader had handed out a batch for it.
        ordered: If batches are used in their order: those left had as many rows as the step.
        equal: If they are used in any order: one of those left had just its rows.
        whole: No rows of what it was made on are left out.
    """

    fed: bool
    ordered: bool = True
    equal: bool = True
    whole: bool = True


@dataclass
class Measurements:
    """What was seen of one optimizer's steps, in units of what was accounted.

    Attributes:
        tensors: Name of each parameter tensor that the optimizer noises.
        moves: Steps that moved weights.
        noisy: Of these, with noise seen or not: those that went through the private step.
        unnoised: Tensors that moved without noise, by name, and how often.
        squares: Shape (tensors,), Σ (noise / accounted std)²; NaN: never measured.
        counts: Shape (tensors,), entries summed.
        exact_noise: Whether noise was seen where it is added, not as what remains at the end.
        kept: Noise of some entries at each of the first KEPT_STEPS steps, each shape (entries,).
        repeated: Squared cosine of each later step's noise with that of the step before.
        clip_error: Largest deviation of a clipped sum from Σ min(1, C/‖g‖)·g, relative to its rows.
        clip_errors: Steps with such a deviation above `clip_slack`.
        clip_steps: Steps at which the sum could be computed again.
        clip_slack: What rounding allows.
        bound_only: Only ‖sum‖ <= Σ min(‖g‖, C) could be looked at.
        clipped_rows, rows: Rows whose gradient was above the bound; all rows.
        weight_sum, weight_base, weight_noise: Σ⟨applied, expected⟩, Σ‖expected‖² and
            Σ std²·‖expected‖²: how often the clipped sum is in what moved the weights.
        divisor: Accounted divisor of sums; None: not known.
        divisors: Least and largest divisor seen.
        changed: Steps whose gradient was changed after the noise, and the largest change.
        sizes: Rows of each noisy step.
        instances: Rows of the data set; None: not known.
        phantom: Empty draws are given as a random row.
        drawn: Shape (instances,), how often each row was drawn; None: not seen.
        draws: Number of draws counted in `drawn`.
        sourced: Steps held against the batches that the private loader handed out.
        handed: Batches that it had handed out by the last of these steps.
        unfed, unordered, unequal, partial: Of these steps, those that were not `fed`, `ordered`,
            `equal`, `whole`; see Source.
        unfinite: Steps with a gradient that is not finite.
        notes: Why something is not measurable, by the name of the check; "all": measuring failed.
    """

    tensors: tuple[str, ...] = ()
    moves: int = 0
    noisy: int = 0
    unnoised: dict[str, int] = field(default_factory=dict)
    squares: FloatArray = field(default_factory=lambda: np.zeros(0))
    counts: FloatArray = field(default_factory=lambda: np.zeros(0))
    exact_noise: bool = True
    kept: list[npt.NDArray[np.float32]] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    clip_error: float = 0.0
    clip_errors: int = 0
    clip_steps: int = 0
    clip_slack: float = 1e-3
    bound_only: bool = False
    clipped_rows: int = 0
    rows: int = 0
    weight_sum: float = 0.0
    weight_base: float = 0.0
    weight_noise: float = 0.0
    divisor: float | None = None
    divisors: tuple[float, float] | None = None
    changed: tuple[int, float] = (0, 0.0)
    sizes: list[int] = field(default_factory=list)
    instances: int | None = None
    phantom: bool = False
    drawn: npt.NDArray[np.int64] | None = None
    draws: int = 0
    sourced: int = 0
    handed: int = 0
    unfed: int = 0
    unordered: int = 0
    unequal: int = 0
    partial: int = 0
    unfinite: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    _last: npt.NDArray[np.float32] | None = None

    def add_noise(
        self, squares: FloatArray, counts: FloatArray, entries: npt.NDArray[np.float32]
    ) -> None:
        """Take in one step's noise, in units of its accounted standard deviation.

        Args:
            squares: Shape (tensors,), sum of squares of each tensor's noise.
            counts: Shape (tensors,), entries of each.
            entries: The same few entries at every step, shape (entries,).
        """
        if len(self.squares) != len(squares):
            self.squares, self.counts = np.zeros(len(squares)), np.zeros(len(squares))
        self.squares += squares
        self.counts += counts
        if len(self.kept) < KEPT_STEPS:
            self.kept.append(entries)
        elif self._last is not None and len(self._last) == len(entries):
            norms = float(self._last @ self._last) * float(entries @ entries)
            self.repeated.append(float(self._last @ entries) ** 2 / norms if norms > 0 else 1.0)
        self._last = entries

    def add_clip(self, error: float) -> None:
        """Take in one step's deviation of the clipped sum."""
        self.clip_steps += 1
        self.clip_error = max(self.clip_error, error)
        self.clip_errors += error > self.clip_slack

    def add_divisor(self, divisor: float) -> None:
        """Take in one step's measured divisor."""
        low, high = self.divisors or (divisor, divisor)
        self.divisors = min(low, divisor), max(high, divisor)

    def add_source(self, handed: int, source: Source) -> None:
        """Take in where one step's rows may come from.

        Args:
            handed: Batches that the private loader has handed out so far.
            source: Of the step.
        """
        self.sourced += 1
        self.handed = handed
        self.unfed += not source.fed
        self.unordered += not source.ordered
        self.unequal += not source.equal
        self.partial += not source.whole
