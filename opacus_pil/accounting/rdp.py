"""One step's Rényi differential privacy at a per-instance sensitivity, and RDP -> (ε, δ).

Knows one instance and one step. It does not know how many steps there are, whom a step charges or
what a sum over steps may be called: that is `composition` and `accountant`.

>>> import numpy as np
>>> rdp = sampled_gaussian_rdp(
...     np.array([0.1, 1.0]), noise_multiplier=1.0, sample_rate=0.01, orders=DEFAULT_ORDERS
... )
>>> epsilon, order = rdp_to_epsilon(1000 * rdp, orders=DEFAULT_ORDERS, delta=1e-5)
>>> bool(epsilon[0] < epsilon[1] / 5)
True
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from .quadrature import SMALLEST, renyi_divergence

# ε falls with every order until D takes over. A smooth curve such as D = aα wants steps of at most
# 1.28 in (order − 1): half a step off its optimum costs less than 1 %. Where D jumps (rare sampling
# meets a large order) ε is about log(1/δ) / (order − 1) at the jump, so one step's ratio is what
# can be lost: hence steps of 1.15 from 4 to 256, where DP-SGD has its jumps.
DEFAULT_ORDERS: tuple[float, ...] = (
    1.01, 1.0128, 1.0164, 1.021, 1.027, 1.034, 1.044, 1.056, 1.072, 1.092, 1.118, 1.15, 1.19, 1.245,
    1.315, 1.4, 1.52, 1.66, 1.85, 2.0, 2.25, 2.6, 3.0, 3.5, 4.0, 4.5, 5.0, 5.7, 6.4, 7.2, 8.0, 9.2,
    10.5, 12.0, 13.8, 16.0, 18.0, 20.5, 23.5, 27.0, 32.0, 36.0, 41.0, 47.0, 54.0, 64.0, 72.0, 82.0,
    94.0, 108.0, 128.0, 147.0, 168.0, 192.0, 222.0, 256.0, 320.0, 400.0, 512.0, 640.0, 800.0,
    1024.0, 1280.0, 1600.0, 2048.0, 2560.0, 3200.0, 4096.0,
)  # fmt: skip

_EPS = float(np.finfo(np.float64).eps)
_ROWS = 1 << 14  # rows converted at a time, so that a million instances need no large temporary


def sampled_gaussian_rdp(
    sensitivity: npt.ArrayLike,
    *,
    noise_multiplier: float,
    sample_rate: float,
    orders: npt.ArrayLike,
    direction: str = "with_without",
) -> FloatArray:
    """RDP of one Poisson-sampled Gaussian step, per instance.

    Guarantee: entry [i, j] bounds from above, at orders[j], the Rényi divergence between the step
        with and without instance i (add or remove one), if its clipped gradient norm is at most
        sensitivity[i] * max_grad_norm. "with_without" bounds both directions, "without_with" the
        reverse one only. The bound is rounded up: for orders in [1.01, 4096] and
        noise_multiplier / sensitivity >= 1e-2 it is at most 1e-9 (relative) above the divergence
        of the two-point Gaussian mixture, and non-decreasing in sensitivity, sample_rate and order
        up to that.

    Args:
        sensitivity: Any shape, the instances. Gradient norm / max_grad_norm. Unitless, >= 0.
        noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
        sample_rate: Probability that an instance is drawn. In [0, 1].
        orders: Rényi orders, each > 1, shape (orders,).
        direction: "with_without" for D(with ‖ without), which is the larger; "without_with" for
            D(without ‖ with).

    Returns:
        RDP in nats, float64, shape sensitivity.shape + (orders,). May be inf, never NaN.

    Raises:
        ValueError: A value outside its range or not finite; names the first row.
        TypeError: Something that is not a number.

    Edge cases (first match wins):
        sample_rate = 0       0
        sensitivity = 0       0
        noise_multiplier = 0  inf
        sample_rate = 1       order * sensitivity**2 / (2 * noise_multiplier**2), rounded up
        below 1e-290          1e-290

    Source: Mironov, Talwar, Zhang (2019), arXiv:1908.10530v1, Sec. 3.3; here at
        noise_multiplier / sensitivity[i] and for any real order, by quadrature. Thm. 5 there:
        the forward direction is the larger.
    Privacy: this output is itself not private to release.

    >>> sampled_gaussian_rdp([0.5], noise_multiplier=1.0, sample_rate=1.0, orders=[2.0]).round(12)
    array([[0.25]])
    """
    sensitivities = _validate.real_array(
        "sensitivity", sensitivity, low=0.0, cure="Pass clipped gradient norms / max_grad_norm."
    )
    noise = _validate.noise_multiplier(noise_multiplier)
    rate = _validate.sample_rate(sample_rate)
    alphas = _validate.orders(orders)
    _validate.choice("direction", direction, ("with_without", "without_with"))

    result = np.zeros((sensitivities.size, alphas.size))
    flat = sensitivities.reshape(-1)
    rows = np.flatnonzero(flat > 0)
    if rate > 0 and rows.size:
        if noise == 0:
            result[rows] = np.inf
        else:
            with np.errstate(over="ignore", under="ignore"):
                shifts = flat[rows] / noise
                if rate == 1:
                    gaussian = alphas * (shifts * shifts)[:, None] / 2.0
                    values = np.maximum(gaussian * (1.0 + 4.0 * _EPS), SMALLEST)
                else:
                    values = renyi_divergence(
                        np.repeat(shifts, alphas.size), np.tile(alphas, rows.size), rate,
                        forward=direction == "with_without",
                    ).reshape(rows.size, alphas.size)  # fmt: skip
            result[rows] = values
    return result.reshape(*sensitivities.shape, alphas.size)


def rdp_to_epsilon(rdp: npt.ArrayLike, *, orders: npt.ArrayLike, delta: float) -> tuple[Any, Any]:
    """Smallest ε for which the RDP curve implies (ε, δ)-differential privacy, per instance.

    Guarantee: the mechanism is (ε, δ)-DP in the direction and under the neighbouring relation of
        `rdp`, and ε is not below the formula's exact value (rounded up by a few ulps of its terms).

    Args:
        rdp: RDP in nats at each order, >= 0, shape (..., orders). inf says "no bound here".
        orders: Rényi orders, each > 1, shape (orders,).
        delta: δ of the statement, strictly between 0 and 1.

    Returns:
        (epsilon, order), each of shape rdp.shape[:-1]: ε in nats, >= 0, and the order where it is
        attained. A single curve, shape (orders,), gives two float64 numbers.

    Raises:
        ValueError: A value outside its range, NaN, or a last axis that does not match orders.
        TypeError: Something that is not a number.

    Edge cases (first match wins):
        rdp = 0 at every order    epsilon 0 (with and without are the same law)
        rdp = inf at every order  epsilon inf, order nan

    Source: Canonne, Kamath, Steinke (2020), arXiv:2004.00010v4, Prop. 12, minimised over the given
        orders and clipped at 0.
    Privacy: a per-instance ε depends on the data; it is itself not private to release.

    >>> epsilon, order = rdp_to_epsilon([0.5, 1.0, 2.0], orders=[2.0, 4.0, 8.0], delta=1e-5)
    >>> print(f"{epsilon:.3f} at order {order:g}")
    3.214 at order 8
    """
    alphas = _validate.orders(orders)
    probability = _validate.delta(delta)
    curves = np.asarray(rdp)
    if curves.ndim == 0 or curves.shape[-1] != alphas.size:
        raise ValueError(
            f"Expected rdp to have one value per order on its last axis ({alphas.size}), "
            f"got rdp of shape {curves.shape}. Pass the orders the RDP was computed at."
        )
    offset = epsilon_offset(alphas, delta=probability)

    flat = curves.reshape(-1, alphas.size)
    epsilon = np.empty(len(flat))
    order = np.empty(len(flat))
    for start in range(0, len(flat), _ROWS):
        block = flat[start : start + _ROWS]
        if block.dtype != np.float64 or not (block >= 0).all():
            block = _validate.real_array("rdp", flat, low=0.0, allow_infinite=True)[
                start : start + _ROWS
            ]
        total = block + offset
        best = total.argmin(axis=1)
        value = total[np.arange(len(block)), best]
        value += 4.0 * _EPS * np.abs(value)
        value[block.max(axis=1) == 0] = 0.0
        epsilon[start : start + _ROWS] = np.maximum(value, 0.0)
        order[start : start + _ROWS] = np.where(np.isinf(value), np.nan, alphas[best])
    shape = curves.shape[:-1]
    return epsilon.reshape(shape)[()], order.reshape(shape)[()]


def epsilon_offset(orders: FloatArray, *, delta: float) -> FloatArray:
    """What `rdp_to_epsilon` adds to the RDP at each order, rounded up: shape (orders,), in nats."""
    quotient = (math.log(delta) + np.log(orders)) / (orders - 1.0)
    offset = np.log1p(-1.0 / orders) - quotient
    # Each logarithm and quotient is good to an ulp or two of its own size.
    size = 1.0 - math.log(delta) + np.log(orders)
    return np.asarray(offset + 4.0 * _EPS * (np.abs(offset) + size / (orders - 1.0)))
