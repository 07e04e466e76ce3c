"""Lower bounds on ε from one training run, whatever the canaries have to do with each other.

Both take only how many guesses were right; each canary's fair coin was thrown before training.
Knows counts, and claims as numbers; no model and no torch.

>>> bound = one_run_lower_bound(range(100), included=[False] * 50 + [True] * 50, delta=1e-5)
>>> bound.assumption, bound.right, round(bound.epsilon, 2)  # every guess right: the ceiling
('none', 100, 3.49)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from .. import _validate as check
from .._validate import FloatArray
from .claim import Claim
from .family import family_bound
from .guesses import Guesses, by_rank
from .lower_bound import LowerBound

STEINKE = "one run, Steinke et al. 2023"
MAHLOUJIFAR = "one run, Mahloujifar et al. 2024"
_EPSILONS = np.concatenate([[0.0], np.linspace(0.02, 30.0, 1500)])


class TradeOff(Protocol):
    """What a claim allows."""

    def trade(self, false_positives: npt.ArrayLike) -> FloatArray:
        """Return the least of one hypothesis's probability for so much of the other's."""
        ...


@dataclass(frozen=True)
class GaussianTradeOff:
    """The trade-off curve of one Gaussian of unit noise whose mean moves by `mu`.

    Attributes:
        mu: >= 0. DP-SGD is not Gaussian; for it take `Claim.losses`.
    """

    mu: float

    def trade(self, false_positives: npt.ArrayLike) -> FloatArray:
        """Return Φ(Φ⁻¹(x) − μ)."""
        return np.asarray(ndtr(ndtri(np.asarray(false_positives, dtype=np.float64)) - self.mu))


def one_run_lower_bound(
    scores: Mapping[Any, float] | npt.ArrayLike,
    *,
    included: Mapping[Any, bool] | npt.ArrayLike,
    delta: float,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> LowerBound:
    """Return a lower bound on ε from one training run with m canaries, assuming nothing of them.

    Guarantee: a training that is (ε, δ)-DP for adding or removing one record gets a bound above its
        ε with probability at most 1 − confidence, over the coins and the training; canaries may
        share randomness, and scores may be any function of the trained model.

    Args:
        scores: Of each canary, higher meaning member: {id: score}, or shape (canaries,).
        included: Whether its own fair coin, thrown before training, put it into the training set:
            {id: bool} with the same ids, or an array in the same order.
        delta: δ of the statement, well below 1 / canaries.
        guesses: How many are guessed, half from each end; fixed before the scores are seen. None:
            all. Fewer help where few canaries are remembered.
        confidence: In (0, 1).
        seed: Of the order of equal scores and of the null check.

    Returns:
        LowerBound with assumption "none".

    Raises:
        ValueError: Ids or lengths that do not match, NaN scores, δ not below 1 / canaries.

    Edge cases:
        half of the guesses right or fewer    0
        a large delta                         the ceiling may be 0: nothing can be found

    Source: Steinke, Nasr, Jagielski (2023), arXiv:2305.08846, Thm. 5.2 with the p-value of THM 3.1.
    Privacy: computed from the training's outputs on private canaries; a released bound is one more
        output.
    """
    level = 1.0 - _confidence(confidence)
    probability = check.delta(delta)
    found = by_rank(scores, included=included, guesses=guesses, seed=seed)
    require_small_delta(probability, found.canaries)
    return steinke_bound(found, delta=probability, level=level)


def require_small_delta(delta: float, canaries: int) -> None:
    """Raise where δ lets all canaries be revealed, so that nothing can ever be rejected."""
    if check.delta(delta) * canaries >= 1.0:
        raise ValueError(
            f"Expected delta well below 1 / canaries = {1 / canaries:.3g}, got delta={delta:g}. "
            "With more, all canaries may be revealed by chance and nothing can be rejected. Pass "
            "a smaller delta or use fewer canaries."
        )


def steinke_bound(found: Guesses, *, delta: float, level: float) -> LowerBound:
    """Return Steinke's lower bound from counts."""

    def epsilon(right: int) -> float:
        return _steinke_epsilon(right, found.count, found.canaries, delta=delta, level=level)

    def detects(right: int) -> bool:
        p = steinke_p_value(
            right, guesses=found.count, canaries=found.canaries, epsilon=0.0, delta=delta
        )
        return bool(p < level)

    return LowerBound(
        epsilon=epsilon(found.right),
        delta=delta,
        confidence=1.0 - level,
        method=STEINKE,
        assumption="none",
        ceiling=epsilon(found.count),
        smallest_detectable=_smallest_detectable(found, detects),
        null_share=found.null_share(detects),
        right=found.right,
        guesses=found.count,
        canaries=found.canaries,
    )


def steinke_p_value(
    right: int, *, guesses: int, canaries: int, epsilon: npt.ArrayLike, delta: float
) -> FloatArray:
    """Return the p-value of "(ε, δ)-DP" when so many of the guesses were right.

    Args:
        right: 0 to `guesses`.
        guesses: Fixed before the scores were seen.
        canaries: All, guessed or not.
        epsilon: Any shape, >= 0.
        delta: In [0, 1).

    Returns:
        Shape of `epsilon`; valid for any dependence between canaries.
    """
    eps = np.atleast_1d(np.asarray(epsilon, dtype=np.float64))
    chance = 1.0 / (1.0 + np.exp(-eps))[:, None]
    beta = binom.sf(right - 1, guesses, chance[:, 0])
    p = beta.copy()
    if delta > 0 and right > 0:
        i = np.arange(1, right + 1)
        gain = (binom.sf(right - i - 1, guesses, chance) - beta[:, None]) / i
        p = p + 2.0 * canaries * delta * np.maximum(gain.max(axis=1), 0.0)
    return np.minimum(p, 1.0).reshape(np.shape(epsilon))


def steinke_expected(found: Guesses, *, delta: float, level: float) -> float:
    """Return the bound on ε alone, for planning how many guesses to make."""
    return _steinke_epsilon(found.right, found.count, found.canaries, delta=delta, level=level)


def _steinke_epsilon(right: int, r: int, m: int, *, delta: float, level: float) -> float:
    """Smallest ε that is not rejected, from below."""

    def rejected(epsilon: FloatArray) -> Any:
        return steinke_p_value(right, guesses=r, canaries=m, epsilon=epsilon, delta=delta) < level

    if not rejected(np.zeros(1))[0]:
        return 0.0
    coarse = rejected(_EPSILONS[::50])  # ascending: everything below the first one kept is rejected
    if coarse.all():
        return float(_EPSILONS[-1])
    first = int(np.argmin(coarse))
    low, high = float(_EPSILONS[::50][first - 1]), float(_EPSILONS[::50][first])
    for _ in range(30):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rejected(np.array([middle]))[0] else (low, middle)
    return low


def _smallest_detectable(found: Guesses, detects: Callable[[int], bool]) -> float:
    """ε of randomised responses of which the median run has just enough right guesses."""
    r = found.count
    low, high = r // 2, r
    if not detects(r):
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detects(middle) else (middle, high)
    share = (high - 1.0 / 3.0) / (r + 1.0 / 3.0)  # p whose binomial has median `high`
    return math.log(share / (1.0 - share))


# --- a trade-off curve ------------------------------------------------------------------------


def mahloujifar_rejects(
    right: int, *, guesses: int, canaries: int, curve: TradeOff, level: float
) -> bool:
    """Whether so many right guesses reject a trade-off curve at a level.

    Args:
        right: 0 to `guesses`.
        guesses: Fixed before the scores were seen.
        canaries: All, guessed or not.
        curve: What the claim allows, from above.
        level: Probability of rejecting a training that keeps to the curve, at most.

    Source: Mahloujifar, Melis, Chaudhuri (2024), arXiv:2410.22235, Alg. 1, with the curve as a
        function x -> max_ε e^{−ε}(x − δ(ε)) in the place of Φ(Φ⁻¹(x) − μ).
    """
    m, r = canaries, guesses
    hit, miss = level * right / m, level * (r - right) / m
    for i in range(right - 1, -1, -1):
        grown = max(miss, float(curve.trade(hit)))
        if grown == miss:
            break
        hit = min(1.0, hit + (grown - miss) * i / (r - i))
        miss = grown
    return hit + miss > r / m


def mahloujifar_p_value(right: int, *, guesses: int, canaries: int, curve: TradeOff) -> float:
    """Return the smallest level that rejects, from above; 1 where none does."""
    low, high = math.log(1e-12), 0.0
    if not mahloujifar_rejects(
        right, guesses=guesses, canaries=canaries, curve=curve, level=1.0 - 1e-9
    ):
        return 1.0
    for _ in range(24):
        middle = (low + high) / 2.0
        hit = mahloujifar_rejects(
            right, guesses=guesses, canaries=canaries, curve=curve, level=math.exp(middle)
        )
        low, high = (low, middle) if hit else (middle, high)
    return math.exp(high)


def mahloujifar_bound(found: Guesses, *, claim: Claim, level: float) -> LowerBound:
    """Return the ε of the least private member of the claim's family that is not refuted.

    The family is the claim's steps with all noise multiplied by one number. That the training is in
    it is the condition of the bound; the p-value of the claim itself needs none.
    """

    def rejects(scale: float, right: int) -> bool:
        return mahloujifar_rejects(
            right, guesses=found.count, canaries=found.canaries, curve=claim.losses(scale),
            level=level,
        )  # fmt: skip

    bound = family_bound(
        claim,
        rejects=lambda scale: rejects(scale, found.right),
        best=lambda scale: rejects(scale, found.count),
        level=level,
    )
    return replace(
        bound,
        method=MAHLOUJIFAR,
        assumption="none",
        null_share=found.null_share(lambda v: _rejects_nothing(v, found, level)),
        right=found.right,
        guesses=found.count,
        canaries=found.canaries,
        p_value=mahloujifar_p_value(
            found.right, guesses=found.count, canaries=found.canaries, curve=claim.losses()
        ),
    )


def _rejects_nothing(right: int, found: Guesses, level: float) -> bool:
    """Whether "gives nothing away at all" is rejected."""
    return mahloujifar_rejects(
        right, guesses=found.count, canaries=found.canaries, curve=GaussianTradeOff(0.0),
        level=level,
    )  # fmt: skip


def _confidence(value: float) -> float:
    return check.real(
        "confidence", value, low=0.0, high=1.0, open_low=True, open_high=True, cure="Pass 0.95."
    )
