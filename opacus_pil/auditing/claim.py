"""What an accountant claims for noisy steps, and the family of claims at other amounts of noise.

Knows runs of (noise_multiplier, sample_rate, steps) as plain numbers; no model, no scores and no
torch. The claim itself is the accounting's own tight ε, which needs dp-accounting.

>>> claim = Claim(((2.0, 1.0, 4),), delta=1e-5)  # four full batches: one Gaussian of noise 1
>>> round(claim.losses().total_variation, 3)  # 2·Φ(1/2) − 1
0.383
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray
from ..accounting.pld import tight_epsilon
from .losses import ADD_REMOVE, REPLACE, LossLaw, step_laws

_RESERVE = 1e-11  # part of δ kept for the round-off of Fourier transforms
_EPSILONS = np.concatenate([np.linspace(0.0, 4.0, 161), np.linspace(4.1, 40.0, 360)])
_POINTS = {True: 2e5, False: 8e6}  # within the reach of one composition; from above?
_FAR = 200.0  # nats beyond which a fifth of them will do
_BY_LIBRARY = 4  # distinct runs that the accounting's own function composes
_DISTINCT = 32  # distinct (noise, rate) that are composed one by one; more are joined
_IN_FAMILY = 8  # the same, where many multiples of the noise are looked at

Run = tuple[float, float, int]


@dataclass(frozen=True)
class Losses:
    """What a sequence of steps allows: δ at every ε, the larger of both directions, from above.

    Attributes:
        epsilons: Shape (points,), ascending from 0.
        deltas: Shape (points,), upper bounds on δ there.
        epsilon: ε at the claim's δ, from above.
    """

    epsilons: FloatArray
    deltas: FloatArray
    epsilon: float = math.inf

    @property
    def total_variation(self) -> float:
        """Largest probability by which a guess can exceed its chance, from above."""
        return float(self.deltas[0])

    def trade(self, false_positives: npt.ArrayLike) -> FloatArray:
        """Return the least probability that the other hypothesis may give to an event.

        Args:
            false_positives: Any shape: the event's probability x under one hypothesis, in [0, 1].

        Returns:
            max_ε e^{−ε}(x − δ(ε)) over ε of both signs, same shape: a lower bound. A finite set
            of ε makes it smaller, never larger.
        """
        x = np.asarray(false_positives, dtype=np.float64)[..., None]
        down, up = self._weights
        # With δ(−ε) = 1 − e^{−ε} + e^{−ε}δ(ε) the second one is the same at −ε.
        found = np.maximum(down * (x - self.deltas), 1.0 - self.deltas - up * (1.0 - x))
        return np.maximum(found.max(axis=-1), 0.0)

    @functools.cached_property
    def _weights(self) -> tuple[FloatArray, FloatArray]:
        return np.exp(-self.epsilons), np.exp(self.epsilons)


@dataclass(frozen=True)
class Claim:
    """Steps as somebody accounted for them.

    Guarantee: `epsilon` bounds from above what the mechanism of these steps gives away; nobody says
        here that the training was this mechanism. That is what an audit tests.

    Attributes:
        runs: One (noise_multiplier, sample_rate, steps) for each stretch of equal steps.
        delta: δ of the statement.
        neighbours: "add_remove": one instance more or less; "replace": one instance exchanged.
    """

    runs: tuple[Run, ...]
    delta: float
    neighbours: str = ADD_REMOVE

    def __post_init__(self) -> None:
        """Check and normalise the runs."""
        check.delta(self.delta)
        check.choice("neighbours", self.neighbours, (ADD_REMOVE, REPLACE))
        object.__setattr__(self, "runs", tuple(_checked(self.runs)))

    @property
    def steps(self) -> int:
        """Number of noisy steps."""
        return sum(run[2] for run in self.runs)

    @property
    def bounded(self) -> bool:
        """Whether every step has noise: otherwise nothing is claimed."""
        return all(noise > 0 for noise, _, _ in self.runs)

    @property
    def epsilon(self) -> float:
        """ε at δ, from above, by privacy loss distributions. May be inf."""
        return _tight(self) if self.bounded else math.inf

    def losses(self, scale: float = 1.0) -> Losses:
        """Return what the steps allow, from above, with all noise multiplied by `scale`.

        Args:
            scale: > 0. Larger scales allow less at every ε.

        Raises:
            ValueError: A step without noise, which allows everything.
        """
        if not self.bounded:
            raise ValueError(
                "Expected every step to have noise, got noise_multiplier=0. Such a claim is ε "
                "= inf, and nothing refutes it."
            )
        return _losses(self, scale)

    def epsilon_from_below(self, scale: float, *, delta: float | None = None) -> float:
        """Return a lower bound on the ε of the steps with all noise multiplied by `scale`.

        Args:
            scale: > 0.
            delta: Another δ than the claim's.
        """
        return _from_below(self, scale, self.delta if delta is None else delta)

    def _composed(
        self, scale: float, *, above: bool, spacing: float, distinct: int
    ) -> tuple[LossLaw, ...]:
        """Compose the steps' losses, one law a direction; none where nothing is given away."""
        joined = few(self.runs, private=not above, distinct=distinct)
        runs = [(z * scale, q, n) for z, q, n in joined if q > 0]
        if not runs:
            return ()
        reach = _reach(runs)
        points = _POINTS[above] / (5.0 if reach > _FAR else 1.0)
        composed: tuple[LossLaw, ...] = ()
        for noise, rate, count in runs:
            laws = step_laws(
                noise, rate, spacing=max(spacing, reach / points), above=above,
                neighbours=self.neighbours,
            )  # fmt: skip
            many = tuple(law.repeated(count) for law in laws)
            if composed:
                many = tuple(a.plus(b) for a, b in zip(composed, many, strict=True))
            composed = many
        return composed


# Searches ask for the same few scales again and again, and trainings often have the same steps.
@functools.lru_cache(maxsize=512)
def _losses(claim: Claim, scale: float) -> Losses:
    laws = claim._composed(scale, above=True, spacing=1e-3, distinct=_IN_FAMILY)
    deltas = np.zeros(len(_EPSILONS))
    for law in laws:
        deltas = np.maximum(deltas, law.deltas(_EPSILONS) + _RESERVE)
    epsilon = _epsilon(laws, claim.delta - _RESERVE)
    return Losses(_EPSILONS, np.minimum(deltas, 1.0), epsilon)


@functools.lru_cache(maxsize=512)
def _from_below(claim: Claim, scale: float, delta: float) -> float:
    spacing = min(2e-4, 0.02 / max(claim.steps, 1))  # half a spacing a step is lost
    laws = claim._composed(scale, above=False, spacing=spacing, distinct=_IN_FAMILY)
    return _epsilon(laws, delta + _RESERVE)


@functools.lru_cache(maxsize=512)
def _tight(claim: Claim) -> float:
    runs = few(claim.runs, private=False)
    if claim.neighbours == ADD_REMOVE and len(runs) <= _BY_LIBRARY:
        return tight_epsilon([(1.0, *run) for run in runs], delta=claim.delta)
    laws = claim._composed(1.0, above=True, spacing=1e-4, distinct=_DISTINCT)
    return _epsilon(laws, claim.delta - _RESERVE)


def few(runs: Iterable[Run], *, private: bool, distinct: int = _DISTINCT) -> list[Run]:
    """Join runs of a schedule that are nearly alike, so that few have to be composed.

    Args:
        runs: Any number.
        private: Round towards more privacy (more noise, lower rates) instead of towards less.
        distinct: At most so many are left.
    """
    total: dict[tuple[float, float], int] = {}
    for noise, rate, count in runs:
        total[noise, rate] = total.get((noise, rate), 0) + count
    if len(total) <= distinct:
        return [(noise, rate, count) for (noise, rate), count in total.items()]
    keys, joined = sorted(total), []
    width = math.ceil(len(keys) / distinct)
    for start in range(0, len(keys), width):
        group = keys[start : start + width]
        noises, rates = [k[0] for k in group], [k[1] for k in group]
        noise, rate = (max(noises), min(rates)) if private else (min(noises), max(rates))
        joined.append((noise, rate, sum(total[k] for k in group)))
    return joined


def _checked(runs: Iterable[Any]) -> Iterable[Run]:
    """Yield the runs that count, or name the first bad one."""
    for number, run in enumerate(runs):
        if not isinstance(run, tuple | list) or len(run) != 3:
            raise ValueError(
                check.expected(
                    f"run {number}", "to be (noise_multiplier, sample_rate, steps)", run,
                    "Pass the entries of accountant.history.",
                )
            )  # fmt: skip
        noise = check.real(f"noise_multiplier of run {number}", run[0], low=0.0)
        rate = check.probability(f"sample_rate of run {number}", run[1])
        steps = check.integer(f"steps of run {number}", run[2], low=0)
        if steps > 0:
            yield noise, rate, steps


def _reach(runs: list[Run]) -> float:
    """Width in nats of the losses that the composition may reach, roughly."""
    widest = max(10.0 / z + 1.0 / z**2 for z, _, _ in runs)
    return widest + sum(q * n / z**2 + 12.0 * math.sqrt(n * q) / z for z, q, n in runs)


def _epsilon(laws: tuple[LossLaw, ...], delta: float) -> float:
    if delta <= 0:
        return math.inf
    return max((law.epsilon(delta) for law in laws), default=0.0)
