"""(ε, δ) of a fixed sequence of steps by privacy loss distributions, tighter than RDP.

Needs dp-accounting, imported only when a function is called. Knows sensitivities, noise and counts
as plain numbers; whether they were fixed before the run is the caller's to say, and the result
inherits that label.

>>> epsilon = tight_epsilon([(1.0, 10.0, 1.0, 25)], delta=1e-5)  # as one Gaussian with noise 2
>>> round(epsilon, 2)
1.99
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from .groups import collinear_law, group_rdp
from .rdp import DEFAULT_ORDERS, rdp_to_epsilon

ATOMS = 128  # points that the drawn members' total sensitivity is rounded up to, at most
_EPS = float(np.finfo(np.float64).eps)
_RESERVE = 1e-11  # part of δ kept for the round-off of dp-accounting's Fourier transforms
_POINTS = 1e6  # discretised losses of one composition, at most about this many

Step = tuple[FloatArray, float, float, int]


def tight_epsilon(
    runs: Sequence[tuple[float, float, float, int]],
    *,
    delta: float,
    value_discretization_interval: float = 1e-4,
) -> float:
    """ε at δ of one instance over a fixed sequence of Poisson-sampled Gaussian steps.

    Guarantee: an upper bound, for adding or removing the instance, if its sensitivity in each step
        is at most the one given and the sequence does not depend on the run: "bound" for constants
        and caps fixed before the run, otherwise no more than the label of the numbers passed.
        Never above the ε of the RDP curve at DEFAULT_ORDERS. Losses are discretised
        pessimistically; 1e-11 of δ and 4 ulps per step are kept back for round-off in
        dp-accounting's Fourier transforms (an allowance, not a proof).

    Args:
        runs: One (sensitivity, noise_multiplier, sample_rate, count) for each stretch of `count`
            equal steps; order does not matter. Units as in `sampled_gaussian_rdp`.
        delta: δ of the statement, strictly between 0 and 1.
        value_discretization_interval: Spacing of privacy losses in nats, > 0. Smaller is tighter
            and slower; widened where a composition would need more than about a million points.

    Returns:
        ε in nats, >= 0. May be inf.

    Raises:
        ImportError: dp-accounting is missing.
        ValueError: A value outside its range or not finite.
        TypeError: Something that is not a number.

    Edge cases (first match wins):
        no run with sensitivity, sample_rate and count > 0   0
        noise_multiplier = 0 in such a run                   inf
        delta not above twice the reserves (about 2e-11)     ε of the RDP curve
        losses that may exceed 1e4                           ε of the RDP curve

    Source: Koskela, Jälkö, Honkela (2020), arXiv:1906.03049; Doroshenko et al. (2022),
        arXiv:2207.04380 (connect the dots), as implemented in dp-accounting.
    Privacy: a per-instance ε depends on the data; it is itself not private to release.
    """
    steps = []
    for number, run in enumerate(runs):
        sensitivity, *rest = _unpacked(run, number)
        value = _validate.real(f"sensitivity of run {number}", sensitivity, low=0.0)
        steps.append(_step(np.array([value]), rest, number))
    return _epsilon(steps, delta, value_discretization_interval)


def tight_group_epsilon(
    runs: Sequence[tuple[npt.ArrayLike, float, float, int]],
    *,
    delta: float,
    value_discretization_interval: float = 1e-3,
) -> float:
    """ε at δ of a forget set over a fixed sequence of Poisson-sampled Gaussian steps.

    Guarantee: as `tight_epsilon`, for adding or removing all members at once, whatever the angles
        between their gradients: collinear ones have the larger E[F(density ratio)] for every convex
        F (Kahane), hence the larger δ at every ε and after composition. Never above the ε of the
        `group_rdp` curve at DEFAULT_ORDERS.

    How tight: up to 127 members of equal sensitivity are exact up to the discretisation of losses;
        otherwise the total sensitivity of the drawn members is rounded up to at most 128 points.

    Args:
        runs: One (sensitivities, noise_multiplier, sample_rate, count) for each stretch of `count`
            equal steps; sensitivities of shape (members,).
        delta: δ of the statement, strictly between 0 and 1.
        value_discretization_interval: As in `tight_epsilon`; 1e-3 takes a second or two per run.

    Returns:
        ε in nats, >= 0. May be inf.

    Raises:
        ImportError: dp-accounting is missing.
        ValueError: A value outside its range or not finite.
        TypeError: Something that is not a number.

    Edge cases (first match wins): as `tight_epsilon`, for runs with any sensitivity > 0.

    Source: Kahane (1986) as in `groups`; Zhu, Dong, Wang (2022), arXiv:2106.08567, Thm. 10:
        dominating pairs compose; mixture of Gaussians as implemented in dp-accounting.
    Privacy: this output is itself not private to release.

    >>> epsilon = tight_group_epsilon([([0.6, 0.4], 10.0, 1.0, 25)], delta=1e-5)  # one of noise 2
    >>> round(epsilon, 1)
    2.0
    """
    steps = []
    for number, run in enumerate(runs):
        sensitivities, *rest = _unpacked(run, number)
        name = f"sensitivities of run {number}"
        values = np.atleast_1d(_validate.real_array(name, sensitivities, low=0.0))
        _validate.same_length(name, values, "members", values.size)
        steps.append(_step(values, rest, number))
    return _epsilon(steps, delta, value_discretization_interval)


def _unpacked(run: Any, number: int) -> tuple[Any, ...]:
    """Return the four parts of a run."""
    if not isinstance(run, Sequence) or len(run) != 4:
        raise ValueError(
            _validate.expected(
                f"run {number}", "to be (sensitivity, noise_multiplier, sample_rate, count)", run
            )
        )
    return tuple(run)


def _step(sensitivities: FloatArray, rest: Sequence[Any], number: int) -> Step:
    """Return a checked run, its members of sensitivity 0 left out."""
    noise, rate, count = rest
    return (
        sensitivities[sensitivities > 0],
        _validate.real(f"noise_multiplier of run {number}", noise, low=0.0),
        _validate.probability(f"sample_rate of run {number}", rate),
        _validate.integer(f"count of run {number}", count, low=0),
    )


def _epsilon(steps: list[Step], delta: float, interval: float) -> float:
    """Smaller of the RDP and the PLD value."""
    distributions = _distributions()
    probability = _validate.delta(delta)
    spacing = _validate.real("value_discretization_interval", interval, low=0.0, open_low=True)
    steps = [step for step in steps if _costs(*step)]
    if not steps:
        return 0.0
    if any(noise == 0 for _, noise, _, _ in steps):
        return math.inf

    rdp = _composed_rdp(steps)
    bound = float(rdp_to_epsilon(rdp, orders=DEFAULT_ORDERS, delta=probability)[0])
    total = sum(step[3] for step in steps)
    kept = probability - _RESERVE - 4.0 * _EPS * total
    widest = max(_widest_loss(values, noise) for values, noise, _, _ in steps)
    reach = max(float(rdp_to_epsilon(rdp, orders=DEFAULT_ORDERS, delta=1e-15)[0]), widest)
    if kept < probability / 2.0 or not reach < 1e4:
        return bound
    negligible = probability * 1e-4
    composed = _composed(
        distributions, steps, max(spacing, reach / _POINTS), negligible=negligible / total
    )
    return min(bound, float(composed.get_epsilon_for_delta(kept - negligible)))


def _costs(sensitivities: FloatArray, noise: float, rate: float, count: int) -> bool:
    """Whether a run gives anything away, if only without noise."""
    return bool(sensitivities.size and rate > 0 and count > 0)


def _composed_rdp(steps: Sequence[Step]) -> FloatArray:
    """Sum of the RDP of all steps at DEFAULT_ORDERS, rounded up."""
    rdp = np.zeros(len(DEFAULT_ORDERS))
    for values, noise, rate, count in steps:
        rdp += count * group_rdp(
            values, noise_multiplier=noise, sample_rate=rate, orders=DEFAULT_ORDERS
        )
    return np.asarray(rdp * (1.0 + 2.0 * len(steps) * _EPS))


def _composed(
    distributions: Any, steps: Sequence[Step], spacing: float, *, negligible: float
) -> Any:
    """Loss distribution of all steps, each up to `negligible` total variation."""
    composed = None
    for values, noise, rate, count in steps:
        single = _single(distributions, values, noise, rate, spacing, negligible)
        many = single.self_compose(count) if count > 1 else single
        composed = many if composed is None else composed.compose(many)
    return composed


def _widest_loss(sensitivities: FloatArray, noise: float) -> float:
    """Privacy loss that one step with everyone drawn stays below, up to 12 standard deviations."""
    shift = float(sensitivities.sum()) / noise
    return shift * shift / 2.0 + 12.0 * shift


def _single(
    distributions: Any,
    sensitivities: FloatArray,
    noise: float,
    rate: float,
    spacing: float,
    negligible: float,
) -> Any:
    """Pessimistic privacy loss distribution of one step, up to `negligible` total variation."""
    options = {"pessimistic_estimate": True, "value_discretization_interval": spacing}
    create: Callable[..., Any] = distributions.from_gaussian_mechanism
    if len(sensitivities) == 1 or rate == 1:
        deviation = noise / float(sensitivities.sum()) * (1.0 - (len(sensitivities) + 2) * _EPS)
        return create(standard_deviation=deviation, sampling_prob=rate, **options)
    create = distributions.from_mixture_gaussian_mechanism
    shifts, masses = _few_atoms(sensitivities / noise * (1.0 + _EPS), rate, negligible)
    return create(
        standard_deviation=1.0,
        sensitivities=shifts.tolist(),
        sampling_probs=masses.tolist(),
        **options,
    )


def _few_atoms(shifts: FloatArray, rate: float, negligible: float) -> tuple[FloatArray, FloatArray]:
    """Law of the drawn members' total shift, rounded up to at most ATOMS points."""
    law = collinear_law(shifts, rate)
    far = float(np.exp(law.far_log_masses).sum())
    beyond = np.append(np.cumsum(law.masses[::-1])[::-1][1:], 0.0) + far
    cut = int(np.argmax(beyond <= negligible)) if (beyond <= negligible).any() else -1
    atoms, masses = law.shifts[: cut % len(beyond) + 1], law.masses[: cut % len(beyond) + 1].copy()
    masses /= masses.sum()  # what is beyond has been taken out of δ
    if len(atoms) > ATOMS:
        # Rounding up costs Σ mass·gap, least for points as dense as the root of the mass.
        rank = np.cumsum(np.sqrt(masses))
        rank = np.ceil(rank / rank[-1] * (ATOMS - 1))
        rank[0] = 0.0  # 0 stays 0
        last = np.append(np.flatnonzero(np.diff(rank)), len(atoms) - 1)
        points = atoms[last]
        places = np.searchsorted(points, atoms)
        masses = np.bincount(places, weights=masses).astype(np.float64)
        atoms = points
    return atoms[masses > 0], masses[masses > 0]


def _distributions() -> Any:
    """Import dp-accounting's loss distributions."""
    try:
        from dp_accounting.pld import (  # type: ignore[import-untyped]
            privacy_loss_distribution,
        )
    except ImportError as error:
        raise ImportError(
            "Expected dp-accounting to be installed, got an ImportError. "
            "Run `pip install dp-accounting`."
        ) from error
    return privacy_loss_distribution
