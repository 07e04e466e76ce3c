"""One step's Rényi differential privacy for a whole forget set.

Knows the members' sensitivities and, if given, the inner products of their clipped gradients. It
does not know how many steps there are: group steps are composed like single ones. A sum of
single-instance values over the members is *not* a bound for the set; this is.

>>> rdp = group_rdp([1.0] * 10, noise_multiplier=1.0, sample_rate=0.001, orders=[2.0, 8.0])
>>> single = group_rdp([1.0], noise_multiplier=1.0, sample_rate=0.001, orders=[2.0, 8.0])
>>> bool((rdp > 10 * single).all())
True
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from .gram import checked_gram, gram_forward, subset_log_masses, subsets
from .mixtures import ShiftLaw, forward_divergence, mass_moved_right, reverse_divergence
from .quadrature import SMALLEST
from .rdp import sampled_gaussian_rdp

EXACT_MEMBERS = 12  # up to here all 2^members subsets are enumerated
_EPS = float(np.finfo(np.float64).eps)
_WORK = 6e7  # lattice points × members of the convolution
_TILTS = np.geomspace(1e-3, 1e4, 300)  # Chernoff parameters, in units of 1 / largest shift
_FAR = -300.0  # log-probability beyond which the lattice ends and Chernoff's bound takes over


def group_rdp(
    sensitivities: npt.ArrayLike,
    *,
    noise_multiplier: float,
    sample_rate: float,
    orders: npt.ArrayLike,
    gram: npt.ArrayLike | None = None,
) -> FloatArray:
    """RDP of one Poisson-sampled Gaussian step with respect to a set of instances.

    Guarantee: entry [j] bounds from above, at orders[j], the Rényi divergence between the step with
        and without the whole set, in both directions (add or remove all members at once), if the
        clipped gradient norms of the members are at most sensitivities * max_grad_norm and, where
        `gram` is given, their inner products are those. Members are drawn independently; no
        member's clipped gradient depends on another's. Never above orders * sum(sensitivities)**2 /
        (2 * noise_multiplier**2).

    How tight: norms alone bound the divergence by that of collinear gradients. Up to 12 members
        that value is exact to about 1e-9; above, each sensitivity is first rounded up to a lattice
        (exactly on it if all are equal), and orders too large for the quadrature get Minkowski's
        bound. With `gram` and at most 12 members the forward direction is exact at the integer
        orders that are affordable (2 members: up to about 100, 4 members: 7, 8 members: 2), the
        other direction and the other orders use the norms of the 2^members subset sums.

    Args:
        sensitivities: Shape (members,). Gradient norm / max_grad_norm. Unitless, >= 0.
        noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
        sample_rate: Probability that an instance is drawn. In [0, 1].
        orders: Rényi orders, each > 1, shape (orders,).
        gram: Shape (members, members), inner products of the members' clipped gradients in units
            of max_grad_norm**2. Symmetric, positive semidefinite, diagonal = sensitivities**2, all
            up to rounding (1e-6 relative): the larger of two entries counts. None: norms alone.

    Returns:
        RDP in nats, float64, shape (orders,). May be inf, never NaN.

    Raises:
        ValueError: A value outside its range or not finite; a gram matrix that is not one.
        TypeError: Something that is not a number.

    Edge cases (first match wins):
        no members, sample_rate = 0   0
        all sensitivities 0           0
        noise_multiplier = 0          inf
        sample_rate = 1               order * norm**2 / (2 * noise_multiplier**2), norm that of the
                                      sum of the gradients (gram) or the sum of the norms
        one member                    sampled_gaussian_rdp

    Source: Kahane (1986), Une inégalité du type de Slepian et Gordon sur les processus gaussiens,
        for the collinear bound in both directions; the Gram formula is the α-th moment written out
        (integer orders), with linear interpolation of the convex (order − 1) * RDP in between.
    Privacy: this output is itself not private to release.

    >>> group_rdp([0.5, 0.5], noise_multiplier=1.0, sample_rate=1.0, orders=[2.0]).round(12)
    array([1.])
    """
    values = np.atleast_1d(
        _validate.real_array(
            "sensitivities", sensitivities, low=0.0,
            cure="Pass clipped gradient norms / max_grad_norm.",
        )
    )  # fmt: skip
    _validate.same_length("sensitivities", values, "members", values.size)
    noise = _validate.noise_multiplier(noise_multiplier)
    rate = _validate.sample_rate(sample_rate)
    alphas = _validate.orders(orders)
    products = None if gram is None else checked_gram(gram, values)

    members = np.flatnonzero(values > 0)
    if rate == 0 or not members.size:
        return np.zeros(alphas.size)
    if noise == 0:
        return np.full(alphas.size, np.inf)
    if members.size == 1:
        return sampled_gaussian_rdp(
            values[members], noise_multiplier=noise, sample_rate=rate, orders=alphas
        )[0]
    chosen = None if products is None else products[np.ix_(members, members)]
    with np.errstate(over="ignore", under="ignore"):
        return _several(values[members], chosen, noise, rate, alphas)


def _several(
    norms: FloatArray, products: FloatArray | None, noise: float, rate: float, orders: FloatArray
) -> FloatArray:
    """RDP of two members or more, each of a norm > 0, with noise and a rate > 0."""
    members = norms.size
    shifts = norms / noise * (1.0 + _EPS)
    ceiling = orders * (shifts.sum() ** 2 / 2.0) * (1.0 + (members + 8) * _EPS)
    ceiling = np.maximum(ceiling, SMALLEST)
    if rate == 1.0 and products is not None:
        square = float(products.sum() + members**2 * 4.0 * _EPS * np.abs(products).sum())
        square *= 1.0 + 8.0 * _EPS
        return np.minimum(ceiling, np.maximum(orders * (square / noise / noise / 2.0), SMALLEST))
    if rate == 1.0 or ceiling.max() <= SMALLEST or not shifts.sum() < 1e100:
        return ceiling
    inner = None
    if products is not None:
        inner = products / noise / noise
        inner += 4.0 * _EPS * np.abs(inner)
    return np.minimum(ceiling, _sampled(shifts, inner, rate, orders))


def _sampled(
    shifts: FloatArray, inner: FloatArray | None, rate: float, orders: FloatArray
) -> FloatArray:
    """Larger of both directions; shifts and inner products in units of the noise."""
    law = collinear_law(shifts, rate)
    if inner is not None and len(shifts) <= EXACT_MEMBERS:
        law = _subset_law(shifts, inner, rate)
    forward = forward_divergence(law, orders)
    if inner is not None and len(shifts) <= EXACT_MEMBERS:
        forward = np.minimum(forward, gram_forward(inner, rate, orders))
    larger = np.maximum(forward, reverse_divergence(law, orders, ignored=forward))
    # The divergence is nondecreasing in the order, so a bound at a larger order is one here too.
    falling = np.argsort(-orders)
    larger[falling] = np.minimum.accumulate(larger[falling])
    return larger


def collinear_law(shifts: FloatArray, rate: float) -> ShiftLaw:
    """Law of the sum of the drawn members' shifts (each > 0), rounded up; rate in (0, 1)."""
    if len(shifts) > EXACT_MEMBERS:
        return _lattice_law(shifts, rate)
    return _subset_law(shifts, None, rate)


def _subset_law(shifts: FloatArray, inner: FloatArray | None, rate: float) -> ShiftLaw:
    """Law of the norm of the drawn gradients' sum (with `inner`) or of the sum of their norms."""
    drawn = subsets(len(shifts))
    totals = drawn @ shifts * (1.0 + len(shifts) * _EPS)
    if inner is not None:
        squares = np.einsum("sm,mn,sn->s", drawn, inner, drawn)
        size = np.einsum("sm,mn,sn->s", drawn, np.abs(inner), drawn)
        norms = np.sqrt(np.maximum(squares + len(shifts) ** 2 * 4.0 * _EPS * size, 0.0))
        totals = np.minimum(totals, norms * (1.0 + 4.0 * _EPS))
    masses = np.maximum(np.exp(subset_log_masses(drawn, rate)), 1e-300)
    atoms, where = np.unique(totals, return_inverse=True)
    merged = np.bincount(where, weights=masses).astype(np.float64)
    # A logarithm of a mass is good to an ulp of itself, at most 12·745.
    return ShiftLaw(atoms, mass_moved_right(merged, 1e4 * _EPS))


def _lattice_law(shifts: FloatArray, rate: float) -> ShiftLaw:
    """Law of the sum of the drawn shifts, each first rounded up to a multiple of one step."""
    largest = float(shifts.max())
    grid = np.linspace(0.0, float(shifts.sum()), 2049)[1:]
    rare = np.flatnonzero(_log_tail(shifts, rate, grid) < _FAR)
    end = float(grid[rare[0] if rare.size else -1])
    bins = max(2048.0, min(65536.0, _WORK / len(shifts)))
    equal = float(shifts.min()) == largest
    step = largest if equal else largest / math.ceil(largest * bins / end)
    step *= 1.0 + 8.0 * _EPS
    places = np.sort(np.ceil(shifts / step * (1.0 + 2.0 * _EPS)).astype(np.int64))
    size = int(places.sum()) + 1
    if rare.size:
        size = min(size, math.ceil(end / step) + 1)
    masses = np.zeros(size)
    masses[0] = 1.0
    reach = 0
    for place in places:
        moved = masses[: max(0, min(reach + 1, size - place))] * rate
        reach = min(reach + int(place), size - 1)
        masses[: reach + 1] *= 1.0 - rate
        masses[place : place + len(moved)] += moved
    masses = mass_moved_right(masses, (4.0 * len(shifts) + 16.0) * _EPS)
    lattice = np.asarray(step * np.arange(size), dtype=np.float64)
    if size > places.sum():
        return ShiftLaw(lattice, masses, spacing=step)
    # The law whose tail is Chernoff's bound at each lower edge, its mass put on the upper one.
    top = step * float(places.sum()) * (1.0 + 1e-12)
    edges = np.asarray(np.linspace(lattice[-1], top, 1025), dtype=np.float64)
    rounded = np.asarray(step * places, dtype=np.float64)
    tail = np.minimum.accumulate(_log_tail(rounded, rate, edges[:-1]))
    drop = -np.expm1(np.append(tail[1:], -np.inf) - tail)
    return ShiftLaw(lattice, masses, edges[1:], tail + np.log(drop + 1e-12), spacing=step)


def _log_tail(shifts: FloatArray, rate: float, points: FloatArray) -> FloatArray:
    """Chernoff's bound of log P(sum of the drawn shifts >= point), rounded up."""
    tilts = _TILTS / shifts.max()
    scaled = np.outer(tilts, shifts)
    cumulants = np.logaddexp(math.log1p(-rate), math.log(rate) + scaled).sum(axis=1)
    size = np.abs(cumulants)[:, None] + np.outer(tilts, points)
    exponent = cumulants[:, None] - np.outer(tilts, points) + (8.0 * len(shifts) * _EPS) * size
    return np.asarray(np.minimum(exponent.min(axis=0), 0.0))
