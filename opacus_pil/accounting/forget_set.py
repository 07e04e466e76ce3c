"""What a run gave away about a forget set: its RDP, and a tight ε for a set or one instance.

Composes the members' joint steps (`history`) through one-step bounds. A run with many different
joint states is coarsened upwards first, so that the work stays bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._validate import FloatArray, IntArray
from .groups import group_rdp
from .history import JointSteps
from .pld import tight_epsilon, tight_group_epsilon

_EPS = float(np.finfo(np.float64).eps)
_STATES = 128  # joint states per kernel that a group bound is computed for
_LOSSES = 8  # loss distributions per kernel: each costs about a second


def run_rdp(runs: Sequence[JointSteps], *, orders: FloatArray) -> FloatArray:
    """RDP of adding or removing all members together, over a whole run, shape (orders,).

    Guarantee: at least the sum over steps of `group_rdp` at the members' sensitivities there.
    """
    steps = coarsened(runs, states=_STATES)
    total = np.zeros(len(orders))
    for step in steps:
        single = group_rdp(
            step.sensitivities,
            noise_multiplier=step.noise_multiplier,
            sample_rate=step.sample_rate,
            orders=orders,
        )
        total += step.count * single
    return np.asarray(total * (1.0 + 2.0 * (len(steps) + 1) * _EPS))


def run_epsilon(runs: Sequence[JointSteps], *, delta: float) -> float:
    """ε at δ of adding or removing all members together, by privacy loss distributions.

    Guarantee: at least the exact ε of the fixed sequence of steps.
    """
    steps = coarsened(runs, states=_LOSSES)
    kernels = [(step.noise_multiplier, step.sample_rate, step.count) for step in steps]
    members = [step.sensitivities for step in steps]
    if all(len(step.sensitivities) == 1 for step in steps):
        single = [(float(own[0]), *rest) for own, rest in zip(members, kernels, strict=True)]
        return tight_epsilon(single, delta=delta)
    return tight_group_epsilon(
        [(own, *rest) for own, rest in zip(members, kernels, strict=True)], delta=delta
    )


def coarsened(runs: Sequence[JointSteps], *, states: int) -> list[JointSteps]:
    """Return steps with at most `states` joint states per kernel that charge at least as much.

    A bound from norms depends on the members' sensitivities as a multiset, not on who has which,
    and is nondecreasing in each. So states are sorted, equal ones joined, and neighbours merged by
    taking the larger entry of each rank.
    """
    kernels: dict[tuple[float, float], dict[tuple[float, ...], int]] = {}
    for run in runs:
        counts = kernels.setdefault((run.noise_multiplier, run.sample_rate), {})
        state = tuple(np.sort(run.sensitivities).tolist())
        counts[state] = counts.get(state, 0) + run.count
    return [
        JointSteps(state, *kernel, count)
        for kernel, counts in kernels.items()
        for state, count in _merged(
            np.array(list(counts), dtype=np.float64), np.array(list(counts.values())), states
        )
    ]


def _merged(
    sensitivities: FloatArray, counts: IntArray, states: int
) -> list[tuple[FloatArray, int]]:
    """Merge rows of (rows, members) whose sums are close, relative to their size."""
    totals = sensitivities.sum(axis=1)
    if len(totals) <= states:
        bins = np.arange(len(totals))
    else:
        # The cost is about quadratic in the sum: bins of equal ratio lose alike. What is far below
        # the largest total costs next to nothing even when it is rounded up a thousandfold.
        low = max(float(totals.min()), 1e-3 * float(totals.max()))
        edges = np.geomspace(low, float(totals.max()), states)[:-1]
        bins = np.searchsorted(edges, totals)
    return [
        (sensitivities[bins == b].max(axis=0), int(counts[bins == b].sum()))
        for b in np.unique(bins)
    ]
