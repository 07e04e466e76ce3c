"""Conformance: whether what ran is what was accounted, measurement by measurement.

Each check has an interval, or says that it is not measurable, and why. Knows measurements and the
ledger's numbers; no optimizer, no model, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import chi2, norm

from .._validate import FloatArray
from .comparison import (
    AGREES,
    DIFFERS,
    UNKNOWN,
    VIOLATES,
    Check,
    correlation_check,
    std_check,
)
from .measurements import Measurements
from .sampling import batch_sizes_check, loader_check, rate_check, rows_check

# The tests that may refuse a correct training by chance; the family-wise level is shared by them.
TESTS = (
    "noise", "noise_per_tensor", "noise_over_steps", "noise_over_entries", "gradient", "rate",
    "batch_sizes", "rows", "canary_hits", "canary_noise", "canary_membership", "canary_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Conformance:
    """All checks of one training.

    Attributes:
        checks: In a fixed order.
        level: Probability that a correct training has a violation by chance, at most.
    """

    checks: tuple[Check, ...]
    level: float

    @property
    def violations(self) -> tuple[Check, ...]:
        """Checks that found less privacy than accounted."""
        return tuple(check for check in self.checks if check.state == VIOLATES)

    def __getitem__(self, name: str) -> Check:
        """Return a check by its code."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def measured(self, name: str) -> bool:
        """Whether a check could be made."""
        return any(c.name == name and c.state != UNKNOWN for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {"level": self.level, "checks": [check.to_json() for check in self.checks]}


def conformance(
    measured: Measurements,
    *,
    sample_rate: float | None,
    ledger_steps: int | None,
    seen_steps: int | None = None,
    level: float,
) -> Conformance:
    """Judge what was measured against what was accounted.

    Guarantee: a training that is as accounted has a violation with probability at most `level`,
        shared equally by TESTS, used or not. Sizes and counts of rows are compared with gamma
        approximations of matched moments.

    Args:
        measured: Of one optimizer's steps.
        sample_rate: Accounted rate per noisy step; None: nobody accounts.
        ledger_steps: Steps that the ledger has counted; None: there is no ledger.
        seen_steps: Steps of all optimizers that the ledger counts; None: those of this one.
        level: Family-wise.
    """
    each = level / len(TESTS)
    failed = measured.notes.get("all")
    noise, per_tensor = _noise(measured, each), _noise_per_tensor(measured, each)
    over_steps = _noise_over_steps(measured, each)
    over_entries = _noise_over_entries(measured, each)
    gradient = _gradient(measured, each)
    # One fault, one reason: what dependent noise does to the other measurements is no news.
    shared = over_entries.state == VIOLATES
    if shared and (over_entries.measured or 0.0) > (over_steps.measured or 0.0) + 1e-6:
        why = "entries share their noise, so that they are no independent measurements"
        noise, per_tensor, over_steps, gradient = (
            replace(c, state=UNKNOWN, reason=why) for c in (noise, per_tensor, over_steps, gradient)
        )
    elif over_steps.state == VIOLATES:
        why = "the same noise comes again, so that steps are no independent measurements"
        noise, per_tensor, over_entries, gradient = (
            replace(c, state=UNKNOWN, reason=why)
            for c in (noise, per_tensor, over_entries, gradient)
        )
    checks: tuple[Check, ...] = (
        noise,
        per_tensor,
        over_steps,
        over_entries,
        _all_noised(measured),
        _clip(measured),
        gradient,
        _divisor(measured),
        _changed(measured),
        loader_check(measured),
        rate_check(measured, sample_rate, each),
        batch_sizes_check(measured, sample_rate, each),
        rows_check(measured, each),
        _steps(measured, ledger_steps, seen_steps),
    )
    if failed:
        why = f"measuring failed ({failed})"
        checks = tuple(replace(c, measured=None, state=UNKNOWN, reason=why) for c in checks)
    return Conformance(checks, level)


# --- noise ------------------------------------------------------------------------------------


def _noise(m: Measurements, each: float) -> Check:
    what = "noise std / accounted"
    if "noise" in m.notes:
        return Check("noise", what, 1.0, state=UNKNOWN, reason=m.notes["noise"])
    return std_check(
        "noise", what, squares=float(m.squares.sum()), count=float(m.counts.sum()), each=each
    )


def _noise_per_tensor(m: Measurements, each: float) -> Check:
    name, what = "noise_per_tensor", "noise std / accounted, the least tensor"
    if not len(m.squares) or m.counts.min() < 1:
        return Check(name, what, 1.0, state=UNKNOWN, reason="no noise was seen")
    ratios = np.sqrt(m.squares / m.counts)
    worst = int(np.argmin([chi2.cdf(s, c) for s, c in zip(m.squares, m.counts, strict=True)]))
    if (m.squares == 0).any():
        worst = int(np.argmax(m.squares == 0))
    found = std_check(
        name, what, squares=float(m.squares[worst]), count=float(m.counts[worst]), each=each,
        tests=len(ratios),
    )  # fmt: skip
    if found.state != VIOLATES:
        return found
    less = [m.tensors[i] for i in np.flatnonzero(ratios < 0.5 * (1.0 + ratios[worst]))]
    shown = ", ".join(less[:3]) + (", …" if len(less) > 3 else "")
    reason = f"{found.reason} on {len(less)} of {len(ratios)} tensors ({shown})"
    return Check(name, what, 1.0, found.measured, found.low, found.high, found.p_value,
                 VIOLATES, reason)  # fmt: skip


def _noise_over_steps(m: Measurements, each: float) -> Check:
    name, what = "noise_over_steps", "largest correlation of two steps' noise"
    rows = _kept(m)
    if len(rows) < 2 or rows.shape[1] < 8 or not rows.any():
        return Check(name, what, 0.0, state=UNKNOWN, reason="fewer than two noisy steps were seen")
    squared = _squared_cosines(rows)
    pairs = len(squared) + len(m.repeated)
    largest = max([float(squared.max()), *m.repeated])
    return correlation_check(name, what, largest, rows.shape[1], pairs, each,
                        "the same noise at more than one step")  # fmt: skip


def _noise_over_entries(m: Measurements, each: float) -> Check:
    name, what = "noise_over_entries", "largest correlation of two entries' noise"
    rows = _kept(m)
    if len(rows) < 8 or not rows.any():
        return Check(
            name, what, 0.0, state=UNKNOWN, reason="fewer than eight noisy steps were seen"
        )
    squared = _squared_cosines(rows.T)
    if not len(squared):
        return Check(name, what, 0.0, state=UNKNOWN, reason="noise on fewer than two entries")
    return correlation_check(name, what, float(squared.max()), len(rows), len(squared), each,
                        "entries share their noise")  # fmt: skip


def _kept(m: Measurements) -> FloatArray:
    width = {len(k) for k in m.kept}
    if len(width) != 1:
        return np.zeros((0, 0))
    rows = np.array(m.kept, dtype=np.float64)
    return rows[:, np.abs(rows).sum(axis=0) > 0]  # entries that have noise at all


def _squared_cosines(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1)
    rows = rows[norms > 0] / norms[norms > 0, None]
    gram = np.minimum((rows @ rows.T) ** 2, 1.0)
    return gram[np.triu_indices(len(rows), 1)]


def _all_noised(m: Measurements) -> Check:
    name, what = "all_noised", "parameter tensors that moved without noise"
    if not m.moves:
        return Check(name, what, 0.0, state=UNKNOWN, reason="no step was seen")
    count = len(m.unnoised)
    shown = ", ".join(list(m.unnoised)[:3]) + (", …" if count > 3 else "")
    return Check(
        name, what, 0.0, float(count), state=VIOLATES if count else AGREES,
        reason=f"{shown} moved by a gradient without noise" if count else "",
    )  # fmt: skip


# --- the gradient -----------------------------------------------------------------------------


def _clip(m: Measurements) -> Check:
    name = "clip"
    what = "‖sum‖ above Σ min(‖g‖, C)" if m.bound_only else "clipped sum, largest deviation"
    if "clip" in m.notes or not m.clip_steps:
        reason = m.notes.get("clip", "per-sample gradients were not seen")
        return Check(name, what, 0.0, state=UNKNOWN, reason=reason)
    state = VIOLATES if m.clip_errors else AGREES
    reason = ""
    if m.clip_errors:
        of = "what clipping allows" if m.bound_only else "Σ min(1, C/‖g‖)·g"
        reason = f"not {of} at {m.clip_errors} of {m.clip_steps} steps"
    elif not m.clipped_rows:
        reason = f"none of {m.rows} gradients was above the bound, so clipping was never needed"
    elif m.bound_only:
        reason = "only this inequality is seen: ghost clipping forms no per-sample gradients"
    return Check(name, what, 0.0, m.clip_error, 0.0, m.clip_slack, None, state, reason)


def _gradient(m: Measurements, each: float) -> Check:
    name, what = "gradient", "times the clipped sum is in what moves weights"
    if m.weight_base <= 0 or m.weight_noise < 0 or not m.clip_steps:
        return Check(name, what, 1.0, state=UNKNOWN, reason="the applied gradient was not seen")
    weight = m.weight_sum / m.weight_base
    spread = math.sqrt(m.weight_noise) / m.weight_base
    reach = float(norm.isf(each / 2)) * spread
    off = max(abs(weight - 1.0) - 2e-3, 0.0)
    p = 2.0 * float(norm.sf(off / spread)) if spread > 0 else float(off == 0)
    state = AGREES if p >= each else VIOLATES if weight > 1 else DIFFERS
    reason = "" if state == AGREES else f"the clipped gradient is in the step {weight:.3g} times"
    return Check(name, what, 1.0, weight, weight - reach, weight + reach, p, state, reason)


def _divisor(m: Measurements) -> Check:
    name, what = "divisor", "divisor of the sum"
    if m.divisors is None or m.divisor is None:
        return Check(
            name, what, m.divisor, state=UNKNOWN, reason="the applied gradient was not seen"
        )
    low, high = m.divisors
    off = max(abs(low / m.divisor - 1.0), abs(high / m.divisor - 1.0))
    state, reason = (AGREES, "") if off < 1e-3 else (VIOLATES, "another divisor than accounted")
    if high / low > 1.001:
        reason = "the divisor changes from step to step, which tells how many rows were drawn"
    worst = low if abs(low - m.divisor) > abs(high - m.divisor) else high
    return Check(name, what, m.divisor, worst, low, high, None, state, reason)


def _changed(m: Measurements) -> Check:
    name, what = "after_noise", "steps whose gradient changed after the noise"
    if m.divisors is None:
        return Check(name, what, 0.0, state=UNKNOWN, reason="the applied gradient was not seen")
    count, most = m.changed
    reason = f"something was added after the noise, up to {most:.2g} of it" if count else ""
    return Check(name, what, 0.0, float(count), state=VIOLATES if count else AGREES, reason=reason)


def _steps(m: Measurements, ledger: int | None, seen: int | None) -> Check:
    name, what = "steps", "noisy steps"
    if ledger is None:
        return Check(name, what, None, float(m.moves), state=UNKNOWN, reason="nobody counts them")
    count = m.moves if seen is None else seen
    state = AGREES if count == ledger else VIOLATES if count > ledger else DIFFERS
    reason = ""
    if state != AGREES:
        reason = f"weights moved {count} times, the ledger counts {ledger}"
    return Check(name, what, float(ledger), float(count), None, None, None, state, reason)
