"""An upper confidence bound on the mean of a bounded variable, for few independent samples.

Knows numbers in [0, 1] only; what they measure is the caller's business.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray

_NEWTON_STEPS = 40
_SMALLEST = 1e-12  # a lower bound on 1 − mean below this is not worth telling from 0
_ROUNDING = 1e-12  # more than the logarithms of a thousand samples are off by


def mean_upper_bound(samples: npt.ArrayLike, *, failure: npt.ArrayLike) -> FloatArray:
    """Upper confidence bound on the mean of a variable in [0, 1].

    Guarantee: if the samples on the last axis are independent copies of a variable in [0, 1] with
        mean m, then P(m > bound) <= failure, whatever the distribution. Entries are separate
        statements; divide `failure` by their number where they must hold together.

    Against a mean m, a gambler who stakes the fraction c of his wealth on "samples are low" holds
    W_c(m) = prod_r (1 − c + c·(1 − x_r)/(1 − m)), and so does, on average, one who splits his purse
    over several c. W(m) has expectation 1 under the true mean, so P(W(m) >= 1/failure) <= failure
    (Markov), and W grows with m: the bound is where W reaches 1/failure. The whole stake, c = 1,
    gives 1 − (failure · prod (1 − x_r))^(1/R), for samples at 0 the Clopper–Pearson limit; it is
    the best one may hope for with few samples. With more of them c = 1/2, 1/4, … down to about
    R^(−1/2) share half the purse, so that the bound tends to the mean.

    Args:
        samples: In [0, 1], shape (..., samples), at least one.
        failure: Allowed probability of failure, in (0, 1], broadcast against samples.shape[:-1].

    Returns:
        Shape samples.shape[:-1], in [mean of the samples, 1].

    Raises:
        ValueError: A value outside its range.

    Edge cases (first match wins):
        any failure = 1   a bound that may fail always: about the mean of the samples
        a sample = 1      1 with fewer than four samples, since only c = 1 is played

    Source: Waudby-Smith, Ramdas (2024), arXiv:2010.09686, Sec. 4 (betting with constant bets, here
        a mixture of a few at a fixed number of samples).

    >>> mean_upper_bound([[0.0, 0.0, 0.0]], failure=0.05).round(4)  # 1 − 0.05^(1/3)
    array([0.6316])
    """
    x = _validate.real_array("samples", samples, low=0.0, high=1.0)
    chance = _validate.real_array("failure", failure, low=0.0, high=1.0, open_low=True)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            _validate.expected("samples", "to have at least one entry on its last axis", x.shape)
        )
    gaps = 1.0 - x
    target = np.broadcast_to(-np.log(chance), x.shape[:-1])
    stakes, log_shares = _stakes(x.shape[-1])

    # Newton's method for log W(1 − e^s) = target. The left side is convex and falls in s, so that
    # iterates from the left never pass the root: stopping early is safe.
    position = np.full(x.shape[:-1], math.log(_SMALLEST))
    for _ in range(_NEWTON_STEPS):
        wealth, slope = _log_wealth(gaps, position, stakes, log_shares)
        excess = wealth - target
        moving = (excess > 0.0) & (slope < 0.0)
        if not moving.any():
            break
        position = np.where(moving, position - excess / np.where(moving, slope, 1.0), position)
        position = np.minimum(position, 0.0)
        if (excess[moving] < 1e-9).all():
            break
    wealth, _ = _log_wealth(gaps, position, stakes, log_shares)
    # Where even the smallest gap is not ruled out, nothing below 1 can be said.
    gap = np.where(wealth >= target - 1e-9, np.exp(position - 1e-9), 0.0)
    return np.clip(1.0 - gap + _ROUNDING, np.minimum(x.mean(axis=-1), 1.0), 1.0)


def _stakes(count: int) -> tuple[FloatArray, FloatArray]:
    """Return the stakes c and the logarithms of their shares of the purse."""
    halvings = int(math.log2(count) / 2.0)
    stakes = np.asarray(0.5 ** np.arange(halvings + 1), dtype=np.float64)
    shares = np.full(halvings + 1, 0.5 / max(halvings, 1))
    shares[0] = 0.5 if halvings else 1.0
    return stakes, np.log(shares)


def _log_wealth(
    gaps: FloatArray, position: FloatArray, stakes: FloatArray, log_shares: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Log wealth at 1 − m = exp(position), and its slope in the position."""
    logs, slopes = [], []
    ratio = gaps / np.exp(position)[..., None]
    for stake, share in zip(stakes, log_shares, strict=True):
        won = stake * ratio
        held = (1.0 - stake) + won
        with np.errstate(divide="ignore", invalid="ignore"):
            logs.append(share + np.log(held).sum(axis=-1))
            slopes.append(-np.where(held > 0.0, won / held, 0.0).sum(axis=-1))
    log_terms = np.stack(logs)
    top = log_terms.max(axis=0)
    safe = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(log_terms - safe)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(total > 0.0, (weights * np.stack(slopes)).sum(axis=0) / total, 0.0)
        return safe + np.log(total), slope
