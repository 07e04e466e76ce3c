"""Tests on numbers of wrong guesses, for canaries that are independent by construction.

A canary's guess errs with probability at least (1 − TV)/2, whatever the rule. Nearly tight, and
wrong where canaries share randomness: with one shared random number such tests reject a correct
mechanism in 40 % of runs. Knows counts and claims as numbers; no model and no torch.

>>> round(wrong_guess_p_value(300, canaries=1000, total_variation=0.3), 4)  # 350 were expected
0.0005
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from scipy.special import ndtri
from scipy.stats import beta, binom

from .. import _validate as check
from .claim import Claim
from .family import FAMILY, SCALES, family_bound
from .lower_bound import LowerBound

INDEPENDENT = "independent by construction"
ASSUMED = "assumes independence"
_FALSE_ALARMS = 0.1  # share of the level that goes to the false alarms, of which there are many


def wrong_guess_p_value(wrong: int, *, canaries: int, total_variation: float) -> float:
    """Return the p-value of "nobody guesses better than (1 + TV)/2" for so few wrong guesses.

    Guarantee: valid for any rule of guessing that does not see the coins, if the canaries' outputs
        are independent of each other.

    Args:
        wrong: Wrong guesses; every canary is guessed.
        canaries: All of them, each with its own fair coin.
        total_variation: What the claim allows at ε = 0, from above.
    """
    m = check.integer("canaries", canaries, low=1)
    u = check.integer("wrong", wrong, low=0, high=m)
    tv = check.probability("total_variation", total_variation)
    return float(binom.cdf(u, m, (1.0 - tv) / 2.0))


def wrong_guess_bound(
    wrong: int, *, canaries: int, claim: Claim, level: float, null_share: float | None = None
) -> LowerBound:
    """Return the ε of the most private member of the claim's family that the guesses refute.

    Args:
        wrong: Wrong guesses; every canary is guessed.
        canaries: All of them, each with its own fair coin.
        claim: Its p-value needs no condition; the bound needs the training to be in its family.
        level: 1 − confidence.
        null_share: Of the null check, if there was one.
    """

    def p_value(scale: float, errors: int = wrong) -> float:
        tv = claim.losses(scale).total_variation
        return wrong_guess_p_value(errors, canaries=canaries, total_variation=tv)

    bound = family_bound(
        claim,
        rejects=lambda scale: p_value(scale) < level,
        best=lambda scale: p_value(scale, 0) < level,
        level=level,
    )
    return replace(
        bound,
        method="likelihood-ratio guesses, binomial test",
        assumption=INDEPENDENT,
        smallest_detectable=_smallest_detectable(claim, canaries, level),
        null_share=null_share,
        right=canaries - wrong,
        guesses=canaries,
        canaries=canaries,
        p_value=p_value(1.0),
    )


def total_variation_bound(
    wrong: int,
    *,
    canaries: int,
    delta: float,
    level: float,
    independent: bool,
    null_share: float | None = None,
) -> LowerBound:
    """Return ε >= log((1 + TV − 2δ)/(1 − TV)) at the TV that the guesses show. Knows no mechanism.

    Args:
        wrong: Wrong guesses; every canary is guessed.
        canaries: All of them, each with its own fair coin.
        delta: δ of the statement.
        level: 1 − confidence.
        independent: Whether the canaries are independent by construction.
        null_share: Of the null check, if there was one.

    Source: Clopper, Pearson (1934) for the error; Kairouz, Oh, Viswanath (2015) for ε.
    """

    def epsilon(errors: int) -> float:
        tv = 1.0 - 2.0 * upper_proportion(errors, canaries, level=level)
        if tv <= delta:
            return 0.0
        if tv >= 1.0:
            return math.inf
        return max(math.log((1.0 + tv - 2.0 * delta) / (1.0 - tv)), 0.0)

    found = next((u for u in range(canaries // 2, -1, -1) if epsilon(u) > 0.0), None)
    smallest = math.inf
    if found is not None:
        share = (found + 2.0 / 3.0) / (canaries + 1.0 / 3.0)
        smallest = math.log((1.0 - share) / share)
    return LowerBound(
        epsilon=epsilon(wrong),
        delta=delta,
        confidence=1.0 - level,
        method="guesses, Clopper-Pearson and total variation",
        assumption=INDEPENDENT if independent else ASSUMED,
        ceiling=epsilon(0),
        smallest_detectable=smallest,
        null_share=null_share,
        right=canaries - wrong,
        guesses=canaries,
        canaries=canaries,
    )


def gaussian_shift(hits: int, *, of: int, false_alarms: int, among: int, level: float) -> float:
    """Return how many standard deviations two outcomes are apart, at least.

    μ >= Φ⁻¹(1 − FPR) − Φ⁻¹(FNR) at upper confidence limits of both, and never its absolute value: a
    sign slip is no evidence.

    Args:
        hits: Of `of` positives, called positive.
        of: Positives, independent of each other.
        false_alarms: Of `among` negatives, called positive.
        among: Negatives.
        level: Of both limits together.
    """
    missed = upper_proportion(of - hits, of, level=level * (1.0 - _FALSE_ALARMS))
    alarms = upper_proportion(false_alarms, among, level=level * _FALSE_ALARMS)
    if missed >= 1.0 or alarms >= 1.0:
        return 0.0
    return max(float(ndtri(1.0 - alarms) - ndtri(missed)), 0.0)


def step_bound(
    hits: int, *, of: int, false_alarms: int, among: int, claim: Claim, level: float
) -> LowerBound:
    """Return the ε of the claim's steps at the least noise ratio that single steps refute.

    Whoever knows at which steps its canaries were drawn may guess every one of them: thousands of
    guesses where the whole run gives one a canary. They refute multiples of the noise that single
    steps have; composed as accounted, these give ε.

    Guarantee: if rate and steps are as accounted and the noise of a step is independent of other
        steps and entries, as `family_bound`.

    Args:
        hits: Draws of canaries that were called so.
        of: Draws.
        false_alarms: Entries without a draw that were called one.
        among: Entries without a draw.
        claim: What was accounted.
        level: 1 − confidence.
    """
    least = min((noise for noise, _, _ in claim.runs), default=math.inf)

    def shift(found: int, alarms: int, at: float) -> float:
        return gaussian_shift(found, of=of, false_alarms=alarms, among=among, level=at)

    return LowerBound(
        epsilon=_epsilon_of_shift(claim, shift(hits, false_alarms, level), least),
        delta=claim.delta,
        confidence=1.0 - level,
        method="single steps with known draws, Clopper-Pearson and Gaussian noise",
        assumption=INDEPENDENT,
        condition=f"{FAMILY}, and independent from step to step",
        ceiling=_epsilon_of_shift(claim, shift(of, 0, level), least),
        right=hits + among - false_alarms,
        guesses=of + among,
        canaries=of + among,
        p_value=_least_level(lambda at: shift(hits, false_alarms, at) * least > 1.0),
    )


def _epsilon_of_shift(claim: Claim, shift: float, least: float) -> float:
    """ε of the family's member whose least noisy step moves by so many standard deviations."""
    scale = 1.0 / (shift * least) if shift > 0 and least > 0 else math.inf
    return 0.0 if scale > SCALES[1] else claim.epsilon_from_below(max(scale, SCALES[0]))


def _least_level(rejects: Callable[[float], bool]) -> float:
    """Return the least level that rejects, from above; 1 where none does."""
    low, high = math.log(1e-15), 0.0
    if not rejects(1.0 - 1e-9):
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (low, middle) if rejects(math.exp(middle)) else (middle, high)
    return math.exp(high)


def upper_proportion(successes: int, trials: int, *, level: float) -> float:
    """Return the upper Clopper–Pearson limit: exceeded by the truth with at most `level`."""
    n = check.integer("trials", trials, low=0)
    k = check.integer("successes", successes, low=0, high=n)
    return 1.0 if k == n else float(beta.isf(level, k + 1, n - k))


def _smallest_detectable(claim: Claim, canaries: int, level: float) -> float:
    """ε of the member of the family whose median audit just refutes "nothing is given away"."""
    most = int(binom.ppf(level, canaries, 0.5)) - 1  # wrong guesses that still refute TV = 0
    if most < 0:
        return math.inf
    needed = 1.0 - 2.0 * (most + 2.0 / 3.0) / (canaries + 1.0 / 3.0)
    low, high = map(math.log, SCALES)
    if claim.losses(SCALES[1]).total_variation > needed:
        return 0.0
    for _ in range(8):
        middle = (low + high) / 2.0
        enough = claim.losses(math.exp(middle)).total_variation >= needed
        low, high = (middle, high) if enough else (low, middle)
    return claim.losses(math.exp(low)).epsilon
