"""From a privacy target back: the δ of a given ε, and the noise that reaches (ε, δ).

Constant sensitivity, noise and sample rate over all steps; anything that varies is the
accountant's to add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate
from .rdp import DEFAULT_ORDERS, rdp_to_epsilon, sampled_gaussian_rdp

_EPS = float(np.finfo(np.float64).eps)
_SMALLEST = 1e-300  # a positive δ below this is reported as this
_ROWS = 1 << 14  # rows converted at a time


def rdp_to_delta(rdp: npt.ArrayLike, *, orders: npt.ArrayLike, epsilon: float) -> tuple[Any, Any]:
    """Smallest δ for which the RDP curve implies (ε, δ)-differential privacy, per instance.

    Guarantee: the mechanism is (ε, δ)-DP in the direction and under the neighbouring relation of
        `rdp`, and δ is not below the formula's exact value (rounded up by a few ulps of its
        exponent's terms).

    Args:
        rdp: RDP in nats at each order, >= 0, shape (..., orders). inf says "no bound here".
        orders: Rényi orders, each > 1, shape (orders,).
        epsilon: ε of the statement in nats, finite and >= 0.

    Returns:
        (delta, order), each of shape rdp.shape[:-1]: δ in [0, 1] and the order where it is
        attained. A single curve, shape (orders,), gives two float64 numbers.

    Raises:
        ValueError: A value outside its range, NaN, or a last axis that does not match orders.
        TypeError: Something that is not a number.

    Edge cases (first match wins):
        rdp = 0 at every order    delta 0 (with and without are the same law)
        rdp = inf at every order  delta 1, order nan
        delta below 1e-300        1e-300

    Source: Canonne, Kamath, Steinke (2020), arXiv:2004.00010v4, Prop. 12 solved for δ:
        log δ = (α−1)(D − ε + log(1 − 1/α)) − log α, minimised over the given orders.
    Privacy: a per-instance δ depends on the data; it is itself not private to release.

    >>> delta, order = rdp_to_delta([0.5, 1.0, 2.0], orders=[2.0, 4.0, 8.0], epsilon=3.2145)
    >>> print(f"{delta:.1e} at order {order:g}")
    1.0e-05 at order 8
    """
    alphas = _validate.orders(orders)
    target = _validate.epsilon(epsilon)
    curves = _validate.real_array("rdp", rdp, low=0.0, allow_infinite=True)
    if curves.ndim == 0 or curves.shape[-1] != alphas.size:
        raise ValueError(
            f"Expected rdp to have one value per order on its last axis ({alphas.size}), "
            f"got rdp of shape {curves.shape}. Pass the orders the RDP was computed at."
        )
    shrink = np.log1p(-1.0 / alphas)
    flat = curves.reshape(-1, alphas.size)
    delta = np.empty(len(flat))
    order = np.empty(len(flat))
    for start in range(0, len(flat), _ROWS):
        block = flat[start : start + _ROWS]
        log_delta = (alphas - 1.0) * (block - target + shrink) - np.log(alphas)
        # Every term is good to an ulp or two of its own size.
        size = (alphas - 1.0) * (block + target - shrink) + np.log(alphas)
        log_delta += 4.0 * _EPS * size
        best = log_delta.argmin(axis=1)
        value = np.exp(np.minimum(log_delta[np.arange(len(block)), best], 0.0))
        value = np.clip(value * (1.0 + 4.0 * _EPS), _SMALLEST, 1.0)
        value[block.max(axis=1) == 0] = 0.0
        delta[start : start + _ROWS] = value
        order[start : start + _ROWS] = np.where(
            np.isinf(block.min(axis=1)), np.nan, alphas[best]
        )  # fmt: skip
    shape = curves.shape[:-1]
    return delta.reshape(shape)[()], order.reshape(shape)[()]


def noise_multiplier_for(
    sensitivity: npt.ArrayLike = 1.0,
    *,
    epsilon: float,
    delta: float,
    steps: int,
    sample_rate: float,
    orders: npt.ArrayLike = DEFAULT_ORDERS,
    relative_tolerance: float = 1e-3,
) -> Any:
    """Smallest noise multiplier, rounded up, at which `steps` steps are (ε, δ)-DP for an instance.

    Guarantee: `rdp_to_epsilon(steps * sampled_gaussian_rdp(sensitivity, ...))` at the returned
        value is at most `epsilon`, and at 1 − 2 * relative_tolerance of it exceeds `epsilon`.
    Only noise_multiplier / sensitivity matters: one search serves all instances.

    Args:
        sensitivity: Any shape, the instances. Gradient norm / max_grad_norm. Unitless, >= 0. 1 is
            the worst case.
        epsilon: Target in nats, >= 0.
        delta: δ of the target, in (0, 1).
        steps: Number of steps, >= 0.
        sample_rate: Probability that an instance is drawn. In [0, 1].
        orders: Rényi orders, each > 1, shape (orders,).
        relative_tolerance: How far above the smallest value the result may be, in [1e-6, 0.1].

    Returns:
        Noise std on the gradient sum / max_grad_norm, float64, the shape of `sensitivity`.

    Raises:
        ValueError: A value outside its range, or a target that no noise reaches on these orders;
            the message says what can be reached.
        TypeError: Something that is not a number.

    Edge cases (first match wins):
        steps = 0, sample_rate = 0 or sensitivity = 0    0

    Source: bisection; the divergence falls as the noise grows (arXiv:1908.10530v1, Sec. 3).
    Privacy: computed from a per-instance sensitivity the result is not private to release.

    >>> noise = noise_multiplier_for(epsilon=2.0, delta=1e-5, steps=1000, sample_rate=0.01)
    >>> print(f"{noise:.2f}")
    1.02
    """
    sensitivities = _validate.real_array(
        "sensitivity", sensitivity, low=0.0, cure="Pass clipped gradient norms / max_grad_norm."
    )
    target, probability = _validate.epsilon(epsilon), _validate.delta(delta)
    count = _validate.integer("steps", steps, low=0)
    rate = _validate.sample_rate(sample_rate)
    alphas = _validate.orders(orders)
    tolerance = _validate.real("relative_tolerance", relative_tolerance, low=1e-6, high=0.1)
    if count == 0 or rate == 0.0 or not sensitivities.any():
        return np.zeros(sensitivities.shape)[()]

    # What remains when the noise hides everything: the conversion's own price on these orders.
    floor = float(
        rdp_to_epsilon(np.full(alphas.shape, 1e-290), orders=alphas, delta=probability)[0]
    )
    if target < floor or (target == floor > 0.0):
        raise ValueError(
            _validate.expected(
                "epsilon", f"> {floor:.6g}, the least that orders up to {alphas.max():g} reach at "
                f"delta = {probability:g} with any noise", target, "Pass larger orders.",
            )
        )  # fmt: skip

    def reached(noise: float) -> bool:
        """Whether this noise meets the target at sensitivity 1."""
        rdp = sampled_gaussian_rdp(1.0, noise_multiplier=noise, sample_rate=rate, orders=alphas)
        return bool(rdp_to_epsilon(count * rdp, orders=alphas, delta=probability)[0] <= target)

    low, high = _bracket(reached)
    while high > low * (1.0 + tolerance):
        middle = math.sqrt(low) * math.sqrt(high)
        if reached(middle):
            high = middle
        else:
            low = middle
    # A hair more than the 1e-9 up to which `sampled_gaussian_rdp` is monotone, so that neither its
    # rounding nor that of sensitivity / result puts ε back above the target.
    result = np.nextafter(sensitivities * (high * (1.0 + 1e-9)), np.inf)
    return np.where(sensitivities > 0.0, result, 0.0)[()]


def _bracket(reached: Callable[[float], bool]) -> tuple[float, float]:
    """Return noises, a factor 2 apart, of which the second reaches the target and the first not."""
    noise = 1.0
    if reached(noise):
        while reached(noise / 2.0):  # the divergence is unbounded as the noise goes to 0
            noise /= 2.0
        return noise / 2.0, noise
    while not reached(noise * 2.0):  # and goes to 0 as it grows; the floor was checked
        noise *= 2.0
    return noise, noise * 2.0
