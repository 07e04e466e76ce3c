"""Several independent runs of one training composed to one account per instance.

Steps whose start nobody kept are charged the worst case, so that a gap costs tightness and never
the claim. Knows sensitivities and the theorem; no model and no file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .._validate import FloatArray
from ..accounting import PerInstanceAccountant, compose_per_instance, sampled_gaussian_rdp
from ..accounting.guarantee import weakest

# Few orders are composed: each is one more statement that must hold together with the others. At
# all others the account holds the worst case, which needs no run.
ORDERS: tuple[float, ...] = (1.66, 3.0, 6.4, 13.8, 32.0, 72.0, 147.0, 1280.0)
_WORK = 2_000_000  # instances x runs x steps composed at a time
_DIRECTIONS = ("with_without", "without_with")


class RunLevels:
    """Levels of every instance at every step of every run; the highest where nobody looked.

    Args:
        size: Instances.
        runs, steps: How many.
        levels: Shape (levels,), sensitivities ascending to 1.
    """

    def __init__(self, size: int, *, runs: int, steps: int, levels: FloatArray) -> None:
        self.levels = levels
        shape = (runs, steps, size)
        with tempfile.TemporaryFile() as file:  # nameless: gone with the table
            self._table: Any = np.memmap(file, dtype=np.uint16, mode="w+", shape=shape)
        for run in range(runs):
            self._table[run] = len(levels) - 1
        self.looked = np.zeros((runs, steps), dtype=bool)

    def set(self, run: int, step: int, sensitivities: FloatArray) -> None:
        """Note one pass, rounded up to the levels."""
        self._table[run, step] = np.searchsorted(self.levels, sensitivities, side="left")
        self.looked[run, step] = True

    def of(self, rows: slice) -> npt.NDArray[np.uint16]:
        """Return shape (rows, runs, steps)."""
        return np.ascontiguousarray(np.moveaxis(self._table[..., rows], -1, 0))


def composed(
    table: RunLevels,
    *,
    accountant: PerInstanceAccountant,
    orders: Sequence[float],
    noises: FloatArray,
    rates: FloatArray,
    confidence: float | None,
    reasons: Sequence[str],
    progress: bool,
) -> PerInstanceAccountant:
    """Return an account of the composed runs.

    Guarantee: if the runs are independent, each with every instance, and were made as described,
        each instance's RDP at all orders and in both directions is, with probability at least
        `confidence` over the runs, an upper bound of the theorem's right-hand side
        (`CompositionResult.upper_confidence`): "expectation_bound". Instances are not held
        together: of a thousand values some may fail.

    Args:
        table: Levels of every run.
        accountant: Without steps; it is charged and returned.
        orders: Of the accountant's, those that are composed.
        noises: Shape (steps,), noise multiplier, > 0.
        rates: Shape (steps,), sampling rate.
        confidence: In (0, 1). None: means in place of expectations, an "estimate".
        reasons: What it takes for granted, or what takes away from it.
        progress: Show a bar.

    Source: Thudi et al. (2024), arXiv:2307.00310, by `compose_per_instance`.
    """
    kernels, place = np.unique(np.stack([noises, rates], axis=1), axis=0, return_inverse=True)
    place = place.reshape(-1)
    columns = [(int(np.flatnonzero(accountant.orders == o)[0]), float(o)) for o in orders]
    size, (runs, steps) = accountant.num_instances, table.looked.shape
    cache: dict[float, FloatArray] = {}

    def of_levels(order: float) -> FloatArray:
        """RDP of each kernel and level, shape (kernels, levels)."""
        if order not in cache:
            cache[order] = np.stack(
                [
                    sampled_gaussian_rdp(
                        table.levels, noise_multiplier=float(z), sample_rate=float(q),
                        orders=[order],
                    )[:, 0]
                    for z, q in kernels
                ]
            )  # fmt: skip
        return cache[order]

    def worst(order: float) -> FloatArray:
        return np.asarray(of_levels(order)[place, -1])

    _charge_worst(accountant, noises, rates)
    values = np.tile(accountant.worst_case_rdp(), (size, 1))
    label = "expectation_bound" if confidence is not None else "estimate"
    found = list(reasons)
    chunk = max(_WORK // (runs * steps), 1)
    together = len(columns) * len(_DIRECTIONS)
    for start in tqdm(range(0, size, chunk), desc="composing", disable=not progress, leave=False):
        rows = slice(start, min(start + chunk, size))
        levels = table.of(rows)

        def step_rdp(order: float, levels: npt.NDArray[np.uint16] = levels) -> FloatArray:
            return np.asarray(of_levels(order)[place, levels])

        for column, order in columns:
            largest = np.zeros(len(levels))
            for direction in _DIRECTIONS:
                result = compose_per_instance(
                    step_rdp, order=order, direction=direction, worst_case_rdp=worst
                )
                upper = result.rdp
                if confidence is not None:
                    upper = result.upper_confidence(confidence, simultaneous=together)
                largest = np.maximum(largest, upper)
                label = weakest([label, result.guarantee])
                found += [reason for reason in result.reasons if reason not in found]
            values[rows, column] = np.minimum(values[rows, column], largest)
    return _account(accountant, values, label=label, reasons=found)


def _charge_worst(accountant: PerInstanceAccountant, noises: FloatArray, rates: FloatArray) -> None:
    """Let an account see the steps; what anybody was charged is put in by hand afterwards."""
    accountant.observe_all(np.zeros(accountant.num_instances))
    for noise, rate in zip(noises.tolist(), rates.tolist(), strict=True):
        accountant.step(
            indices=[], sensitivities=[], noise_multiplier=noise, sample_rate=rate,
            reasons=("composed over several runs",),
        )  # fmt: skip


def _account(
    accountant: PerInstanceAccountant, values: FloatArray, *, label: str, reasons: Sequence[str]
) -> PerInstanceAccountant:
    """Put composed values into an account that has seen the steps at sensitivity 0."""
    state = accountant.state_dict()
    state["offset"] = np.where(np.isfinite(values), values, 0.0)
    state["infinite"] = state["infinite"] | ~np.isfinite(values).all(axis=1)
    state["guarantee"] = label
    state["reasons"] = dict.fromkeys(reasons, 0)
    accountant.load_state_dict(state)
    return accountant
