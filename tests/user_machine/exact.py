"""Exact Rényi divergences between what is released with a row and without it, by quadrature.

A row is in a batch or not by coins; if it is, it shifts what is noised. In units of the noise that
is a mixture of N(m, 1), one m for each outcome of the coins, against N(0, 1). Knows shifts and
coins; nothing of opacus_pil, and no bound: the integrals as they stand in the definition.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import NDArray

_REACH = 12.0  # exp(-72) is left out on either side of all modes
_FAR = 3000.0  # order · shift above which a grid is too long
MOST_COINS = 6  # that may meet in one direction: 64 outcomes

Coin = tuple[float, float]  # probability to be drawn, shift if so


@functools.lru_cache(maxsize=1 << 16)
def divergence(coins: tuple[Coin, ...], order: float) -> tuple[float, float]:
    """Return D(with ‖ without) and D(without ‖ with) where coins shift one common direction.

    Args:
        coins: Independent; a coin of probability 1 is a row put there by hand.
        order: Rényi order, > 1.

    >>> forward, reverse = divergence(((1.0, 0.5),), 4.0)  # the Gaussian mechanism: order · m² / 2
    >>> abs(forward - 0.5) < 1e-12 and abs(reverse - 0.5) < 1e-12
    True
    """
    weights, means = _outcomes(coins)
    return (
        max(_log_moment(weights, means, order), 0.0) / (order - 1.0),
        max(_log_moment(weights, means, 1.0 - order), 0.0) / (order - 1.0),
    )


def skipped_if_empty(rate: float, others: int, order: float) -> tuple[float, float]:
    """Return both divergences of a draw of which all see whether it was empty, and nothing else.

    With the row it is empty if neither it nor one of `others` was drawn.
    """
    alone = (1.0 - rate) ** others
    a, b = (
        np.array([(1.0 - rate) * alone, 1.0 - (1.0 - rate) * alone]),
        np.array([alone, 1 - alone]),
    )
    with np.errstate(divide="ignore"):  # an outcome that one of the two never has
        one = math.log(float((a**order * b ** (1.0 - order)).sum()))
        two = math.log(float((b**order * a ** (1.0 - order)).sum()))
    return max(one, 0.0) / (order - 1.0), max(two, 0.0) / (order - 1.0)


@functools.lru_cache(maxsize=1 << 12)
def told_by_size(rate: float, others: int, size: int, order: float) -> tuple[float, float]:
    """Return both divergences of noise alone, divided by the number of rows that were drawn.

    Args:
        others: Rows beside the one that is there or not; an empty draw is divided by 1.
        size: Numbers that are noised and hold nobody's gradient.
    """
    drawn = np.arange(others + 1)
    chance = scipy.stats.binom.pmf(drawn, others, rate)
    r = (np.arange(14000) + 0.5) / 1000.0  # the length of the noise; exp(-98) is left out

    def density(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        n = np.maximum(counts, 1)[:, None]
        return chance @ (n**size * np.exp(-(n**2) * r**2 / 2.0))

    without, shell = np.log(density(drawn)), (size - 1) * np.log(r)
    with_it = np.log((1.0 - rate) * np.exp(without) + rate * density(drawn + 1))

    def log_mean(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        moment = scipy.special.logsumexp(order * a + (1.0 - order) * b + shell)
        return float(moment - scipy.special.logsumexp(b + shell))

    one, two = log_mean(with_it, without), log_mean(without, with_it)
    return max(one, 0.0) / (order - 1.0), max(two, 0.0) / (order - 1.0)


def joint_divergence(
    coins: Sequence[tuple[float, NDArray[np.float64]]], order: float
) -> tuple[float, float]:
    """Return both divergences where coins shift vectors with standard noise in every entry.

    Exact for one coin and for parallel shifts. Else that of the projection on the sum of all
    shifts, which is below it (data processing); nothing is claimed for more than MOST_COINS.
    """
    coins = [(rate, shift) for rate, shift in coins if shift.any()]
    if not coins or len(coins) > MOST_COINS:
        return 0.0, 0.0
    total = np.sum([shift for _, shift in coins], axis=0)
    length = float(np.linalg.norm(total))
    if length == 0.0:
        return 0.0, 0.0
    along = tuple((rate, float(shift @ total) / length) for rate, shift in coins)
    return divergence(along, order)


def _outcomes(coins: tuple[Coin, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    weights, means = [], []
    for drawn in itertools.product((False, True), repeat=len(coins)):
        weight = math.prod(
            rate if here else 1.0 - rate for here, (rate, _) in zip(drawn, coins, strict=True)
        )
        if weight > 0.0:
            weights.append(weight)
            means.append(sum(shift for here, (_, shift) in zip(drawn, coins, strict=True) if here))
    return np.array(weights), np.array(means, dtype=np.float64)


def _log_moment(weights: NDArray[np.float64], means: NDArray[np.float64], power: float) -> float:
    """Return log E_{t~N(0,1)}[ L(t)^power ], L the likelihood ratio of the mixture to N(0, 1)."""
    largest = float(np.abs(means).max())
    if largest == 0.0:
        return 0.0
    if abs(power) * largest > _FAR:
        return _far(weights, means, power)
    modes = power * means
    low, high = min(0.0, float(modes.min())) - _REACH, max(0.0, float(modes.max())) + _REACH
    step = min(0.02, 0.3 / largest)  # poles of log L lie π/m off the line: exp(-2π²/(m·step))
    t = np.arange(low, high + step, step)
    parts = np.log(weights)[:, None] + means[:, None] * t - means[:, None] ** 2 / 2.0
    top = parts.max(axis=0)
    ratio = top + np.log(np.exp(parts - top).sum(axis=0))
    exponent = power * ratio - t * t / 2.0
    peak = float(exponent.max())
    return peak + math.log(float(np.exp(exponent - peak).sum()) * step / math.sqrt(2.0 * math.pi))


def _far(weights: NDArray[np.float64], means: NDArray[np.float64], power: float) -> float:
    """Return a lower bound for shifts that no grid spans: of the mixture its farthest part."""
    if power < 0.0:
        return 0.0
    k = int(np.abs(means).argmax())
    return power * math.log(weights[k]) + power * (power - 1.0) * float(means[k]) ** 2 / 2.0
