"""What gradient canaries saw of a training, streamed, and what it says against a claim.

Knows numbers in units of the clip bound; no optimizer, no model, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm

from .._validate import FloatArray
from .claim import Claim
from .error_test import step_bound, total_variation_bound, wrong_guess_bound
from .guesses import PERMUTATIONS, by_rank, planned
from .lower_bound import LowerBound, plain
from .one_run import mahloujifar_bound, mahloujifar_p_value, steinke_bound, steinke_expected

BoolArray = npt.NDArray[np.bool_]
_FLOOR = 0.05  # of the measured noise, in units of the clip bound: a hit is certain far above it
_KEPT_STEPS, _KEPT_ENTRIES = 512, 64


@dataclass
class CanaryRecord:
    """Running sums over a training's steps.

    Attributes:
        included: Shape (canaries,), the coins thrown before training.
        controls: Number of entries that are never in.
        sample_rate: Of the canaries' own coins at each step, as accounted.
        steps: Noisy steps seen.
        faults: Steps whose canary gradient was not finite, or that had none.
        scores: Shape (canaries,), log likelihood ratio of "in" against "out", summed over steps at
            the noise measured so far on the controls.
        draws, undrawn: Entries with a row in their step, and without.
        hits, false_alarms: Of these, above half a clip bound.
        hit_sum: Sum of drawn entries, in units of the clip bound.
        hit_noise: Variance of that sum as claimed: Σ z² over draws.
        noise_squares: Σ of squares of undrawn entries, in units of the claimed noise.
        control_squares, control_count: The same of the controls, and how many.
        kept: Some controls of the first steps, in units of the claimed noise.
    """

    included: BoolArray
    controls: int
    sample_rate: float
    steps: int = 0
    faults: int = 0
    scores: FloatArray = field(default_factory=lambda: np.zeros(0))
    draws: int = 0
    hits: int = 0
    false_alarms: int = 0
    undrawn: int = 0
    hit_sum: float = 0.0
    hit_noise: float = 0.0
    noise_squares: float = 0.0
    control_squares: float = 0.0
    control_count: int = 0
    kept: list[FloatArray] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start all scores at even odds."""
        self.scores = np.zeros(len(self.included))

    def add(self, values: FloatArray, *, drawn: npt.NDArray[np.int64], noise: float) -> None:
        """Take in one step.

        Args:
            values: Shape (canaries + controls,), gradient sum with noise / clip bound.
            drawn: Canaries with a row in this step.
            noise: Noise multiplier as claimed at this step; only ratios between steps matter.
        """
        if not np.isfinite(values).all():
            self.faults += 1
            return
        m, q = len(self.included), self.sample_rate
        unit = noise if noise > 0 else 1.0
        self.steps += 1
        controls = values[m:]
        self.control_squares += float((controls / unit) @ (controls / unit))
        self.control_count += len(controls)
        variance = max(self._ratio * unit, _FLOOR) ** 2
        if q > 0:
            odds = math.log(q) + (values[:m] - 0.5) / variance
            self.scores += odds if q == 1 else np.logaddexp(math.log1p(-q), odds)
        above = values > 0.5
        hits = int(above[drawn].sum())
        self.hits += hits
        self.draws += len(drawn)
        self.false_alarms += int(above.sum()) - hits
        self.undrawn += len(values) - len(drawn)
        self.hit_sum += float(values[drawn].sum())
        self.hit_noise += len(drawn) * unit**2
        rest = values @ values - values[drawn] @ values[drawn]
        self.noise_squares += max(float(rest), 0.0) / unit**2
        if len(self.kept) < _KEPT_STEPS:
            self.kept.append((controls[:_KEPT_ENTRIES] / unit).astype(np.float32))

    @property
    def _ratio(self) -> float:
        """Measured noise / claimed noise, on the controls."""
        return math.sqrt(self.control_squares / max(self.control_count, 1))

    @property
    def guessed_in(self) -> BoolArray:
        """Shape (canaries,), who is called a member."""
        guess: BoolArray = self.scores > 0
        return guess

    @property
    def wrong(self) -> int:
        """Wrong guesses over the whole run."""
        return int((self.guessed_in != self.included).sum())

    def null_share(self, *, level: float, seed: int = 0) -> float:
        """Share of permutations of the coins whose errors refute "nothing is given away"."""
        random, guess = np.random.default_rng(seed), self.guessed_in
        m = len(guess)
        wrong = np.array(
            [(guess != random.permutation(self.included)).sum() for _ in range(PERMUTATIONS)]
        )
        return float((binom.cdf(wrong, m, 0.5) < level).mean())


@dataclass(frozen=True)
class CanaryEvidence:
    """What gradient canaries say against a claim. Two statements, not one.

    Attributes:
        refuted_p: p-value of the claim itself: small refutes it whatever the fault.
        steps_p: The same from single steps; sees less noise or larger hits, not more steps.
        lower: Lower bounds on ε; those in the claim's family hold only if rate, steps and the form
            of the noise are as accounted.
        canaries, controls, sample_rate, steps, faults: The design and what ran.
        hit: Mean of a drawn canary's entry / clip bound, and its interval.
        noise_ratio: Standard deviation of undrawn entries / claimed.
        wrong: Wrong guesses.
        powerful: Whether the median audit would have refuted the claim if ε had been twice as
            large.
        bits: "own": the training's numbers are what they are without canaries; "shared": their law.
        reason: Why there is nothing to say; empty otherwise.
    """

    refuted_p: float
    steps_p: float
    lower: tuple[LowerBound, ...]
    canaries: int
    controls: int
    sample_rate: float
    steps: int
    faults: int
    hit: tuple[float, float, float]
    noise_ratio: float
    wrong: int
    powerful: bool
    bits: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return plain(vars(self))


def evidence(
    record: CanaryRecord,
    *,
    claim: Claim,
    level: float = 0.05,
    refutation_level: float = 1e-3,
    bits: str = "own",
) -> CanaryEvidence:
    """Hold what canaries saw against a claim.

    Args:
        record: Of a whole training.
        claim: What was accounted for it.
        level: 1 − confidence of each lower bound.
        refutation_level: At which the verdict will refute; for `powerful` only.
        bits: Which generator the canaries' noise came from.

    Raises:
        ValueError: A claim without noise, which nothing refutes.
    """
    m = len(record.included)
    lower = _bounds(record, claim, level)
    spread = math.sqrt(max(record.hit_noise, 1e-300)) / max(record.draws, 1)
    mean = record.hit_sum / record.draws if record.draws else math.nan
    reach = float(norm.isf(refutation_level / 2)) * spread
    return CanaryEvidence(
        refuted_p=lower[0].p_value or 0.0,
        steps_p=lower[1].p_value or 0.0,
        lower=lower,
        canaries=m,
        controls=record.controls,
        sample_rate=record.sample_rate,
        steps=record.steps,
        faults=record.faults,
        hit=(mean, mean - reach, mean + reach),
        noise_ratio=math.sqrt(record.noise_squares / max(record.undrawn, 1)),
        wrong=record.wrong,
        powerful=_sees_twice(claim, m, refutation_level),
        bits=bits,
    )


def _bounds(record: CanaryRecord, claim: Claim, level: float) -> tuple[LowerBound, ...]:
    m, wrong = len(record.included), record.wrong
    null = record.null_share(level=level)
    losses = claim.losses()
    few = planned(
        losses,
        canaries=m,
        score=lambda g: steinke_expected(g, delta=claim.delta, level=level),
    )
    half = claim.losses(2.0)
    some = planned(
        losses,
        canaries=m,
        score=lambda g: -mahloujifar_p_value(g.right, guesses=g.count, canaries=m, curve=half),
    )
    return (
        wrong_guess_bound(wrong, canaries=m, claim=claim, level=level, null_share=null),
        step_bound(
            record.hits, of=record.draws, false_alarms=record.false_alarms,
            among=record.undrawn, claim=claim, level=level,
        ),
        total_variation_bound(
            wrong, canaries=m, delta=claim.delta, level=level, independent=True, null_share=null
        ),
        steinke_bound(by_rank(record.scores, included=record.included, guesses=few),
                      delta=claim.delta, level=level),
        mahloujifar_bound(by_rank(record.scores, included=record.included, guesses=some),
                          claim=claim, level=level),
    )  # fmt: skip


def _sees_twice(claim: Claim, canaries: int, level: float) -> bool:
    """Whether the median audit of a training of twice the claimed ε refutes the claim."""
    scale = 1.0
    for _ in range(40):
        if claim.losses(scale).epsilon >= 2.0 * claim.losses().epsilon:
            break
        scale *= 0.95
    wrong = int(binom.median(canaries, (1.0 - claim.losses(scale).total_variation) / 2.0))
    return bool(binom.cdf(wrong, canaries, (1.0 - claim.losses().total_variation) / 2.0) < level)
