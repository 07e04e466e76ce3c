"""Many steps of one instance: composition over several independent training runs.

P is the law of a run with the instance, Q without it, D_i the divergence of step T − i at the
parameters that step starts from, h > 1 the Hölder exponent, ρ = h/(h−1). With i counted *back from
the last step*,

    D_α ≤ 1/(α−1) · [ Σ_i ρ^(−i) · (1/h) · log E exp(h·(α_i−1)·D_i)     i < T−1
                      + ρ^(−(T−1)) · log E exp((α_{T−1}−1)·D_{T−1}) ]   first step

(the law of the starting point is the same with and without the instance, so no Hölder factor is
paid for it). Runs *with* the instance give D(P‖Q) with α_i = 1 + (α−1)ρ^i, and D(Q‖P) with
α_i = αρ^i. Takes D as a function of the order; how it comes from gradients is the caller's. Longer
than most files: the theorem, its result and what may be claimed of it are one thing to read.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from .holder_sums import SHORT_RUN, Evidence, HolderSum, StepRdp, StepSource, StepValues, knots_of
from .repeated_runs import RepeatedRuns, repeated_runs

# Candidates for the Hölder exponent, by what they do to the first step's order: ρ^(T−1) = e^κ.
# Neighbours are a factor 1.43 apart, which costs about 1 % of what κ is worth. A κ below 0.001
# would read the largest of the runs, which says nothing about the runs that were not made.
HOLDER_INFLATIONS: tuple[float, ...] = tuple(np.geomspace(0.001, 4.0, 24).tolist())
# Runs short enough that no order is interpolated can afford finer ones, and very large ones: where
# D is bounded, the first step's divergence at infinite order may be the best there is.
SHORT_RUN_INFLATIONS: tuple[float, ...] = tuple(np.geomspace(0.001, 16.0, 64).tolist())
_CONFIDENT = (8, 14, 20)  # of these: κ = 0.019, 0.16, 1.4, few statements to hold together
_ROUNDING = 1e-12  # relative; exponents, powers and sums over steps are good to a fraction of it


@dataclass(frozen=True)
class CompositionResult:
    """Rényi divergence of whole runs, per instance, with what it may claim.

    Attributes:
        rdp: Nats, shape (instances...). The theorem with means over the given runs in place of
            expectations: with few runs more often too low than too high.
        holder_exponent: Shape (instances...), the exponent each value was read at.
        guarantee: "expectation_bound" for two or more distinct runs, else "estimate".
        order: The Rényi order.
        direction: "with_without" or "without_with".
        distinct_runs: How many of the runs count: one that cannot be told from another passed
            again, or from a part of it, counts once.
        reasons: Why the label is not stronger; empty for "expectation_bound", the strongest that a
            composition over runs can have.

    Privacy: these values depend on private data; they are themselves not private to release.
    """

    rdp: FloatArray
    holder_exponent: FloatArray
    guarantee: str
    order: float
    direction: str
    distinct_runs: int
    reasons: tuple[str, ...] = ()
    _evidence: tuple[Evidence, ...] = field(default=(), repr=False)

    def upper_confidence(self, level: float, *, simultaneous: int = 1) -> FloatArray:
        """Upper confidence value of the theorem's bound, per instance.

        Guarantee: if the runs are independent and every divergence is at most `worst_case_rdp`,
            each entry is, with probability at least `level` over the runs, an upper bound on the
            theorem's right-hand side, or on the worst case's plain sum where that is smaller, and
            so on the divergence in `direction` under add or remove one instance, whatever the
            distribution of the runs. Steps and the candidates for the Hölder exponent are covered;
            instances, orders and directions that must hold *together* count in `simultaneous`.

        A run that was passed twice, or shares its history with another, is not a further draw. The
            value is the larger of two: from all runs, which holds if they are independent and
            agree by chance, and from the distinct ones, the first of each kind, which holds if the
            rest repeats them (whichever it repeats: leaving a copy out looks at no new coin).

        Often weak: R runs cannot rule out an event of probability 1 − (1−level)^(1/R) in which the
        worst case is met at every step: 0.63 of the worst case for three runs at 95 %, 0.26 for
        ten, and more for every candidate Hölder exponent. Fix `holder_exponent` (3·steps, or a
        value chosen on other runs) to have one candidate only.

        Method: log m ≤ log a + m/a − 1 with constants a turns the theorem's sum of logarithms into
            the mean of one bounded number per run, so nothing is paid for the number of steps; a
            betting bound (`mean_upper_bound`) holds for that mean. A union bound covers the few
            choices of a and of the Hölder exponent.

        Args:
            level: Confidence, in (0, 1).
            simultaneous: How many values must hold together, for example instances x orders, >= 1.

        Returns:
            Nats, shape (instances...), at least `rdp`, at most the sum of `worst_case_rdp`.

        Raises:
            ValueError: An argument outside its range, or the composition was made without
                `worst_case_rdp`, without which no sample bounds an expectation.

        Edge cases (first match wins):
            worst_case_rdp = inf  inf

        Source: the tangent of the logarithm is ours; the mean's bound is Waudby-Smith, Ramdas
            (2024), arXiv:2010.09686, Sec. 4, see `mean_upper_bound`.
        """
        confidence = _validate.real(
            "level", level, low=0.0, high=1.0, open_low=True, open_high=True,
            cure="Pass a confidence such as 0.95.",
        )  # fmt: skip
        count = _validate.integer("simultaneous", simultaneous, low=1)
        if not self._evidence:
            raise ValueError(
                "Expected a composition with worst_case_rdp, got one without. An expectation of an "
                "unbounded quantity has no upper confidence value; pass compose_per_instance the "
                "RDP of a step at sensitivity 1 or at an enforced cap."
            )
        each = [evidence.upper((1.0 - confidence) / count) for evidence in self._evidence]
        values = np.max(each, axis=0) / (self.order - 1.0)
        return np.minimum(
            np.maximum(values * (1.0 + _ROUNDING), self.rdp), self._evidence[0].worst
        )[()]  # fmt: skip


def order_schedule(
    order: float, *, steps: int, holder_exponent: float, direction: str = "with_without"
) -> FloatArray:
    """Rényi order at which each step enters the composition, in training order.

    The last step is taken at about `order`, every earlier one at a higher order than its successor.

    Guarantee: none by itself, these are orders; the bound they belong to is `compose_per_instance`.

    Args:
        order: Rényi order of the result, > 1.
        steps: Number of steps, >= 1.
        holder_exponent: Hölder exponent h, > 1. 3 * steps inflates orders by at most e^(1/3).
        direction: "with_without": 1 + (order − 1)·ρ^i. "without_with": order·ρ^i. ρ = h/(h−1), i
            steps before the last.

    Returns:
        Shape (steps,), decreasing.

    Raises:
        ValueError: An argument outside its range, or orders that overflow.

    Edge cases (first match wins):
        steps = 1  order, or 1 + (order − 1), which may round

    Source: Thudi et al. (2024), arXiv:2307.00310v3, the composition theorem; constants re-derived
        by Hölder's inequality. The paper's recursion ρ·order − 1/h is valid and larger; its code
        counts from the other end.

    >>> order_schedule(2.0, steps=3, holder_exponent=3.0)
    array([3.25, 2.5 , 2.  ])
    """
    alpha = _order(order)
    count = _validate.integer("steps", steps, low=1)
    exponent = _validate.real(
        "holder_exponent", holder_exponent, low=1.0, open_low=True, cure="Pass about 3 * steps."
    )
    _validate.choice("direction", direction, ("with_without", "without_with"))
    with np.errstate(over="ignore"):
        growth = np.exp(np.arange(count)[::-1] * -math.log1p(-1.0 / exponent))
        result = 1.0 + (alpha - 1.0) * growth if direction == "with_without" else alpha * growth
    if not np.isfinite(result).all():
        raise ValueError(
            _validate.expected(
                "holder_exponent", f"large enough for {count} steps", exponent,
                f"Pass about {3 * count}.",
            )
        )  # fmt: skip
    return result


@_validate.known_keywords
def compose_per_instance(
    step_rdp: StepRdp,
    *,
    order: float,
    holder_exponent: npt.ArrayLike | None = None,
    direction: str = "with_without",
    worst_case_rdp: StepRdp | None = None,
    fixed_start: bool = False,
) -> CompositionResult:
    """Rényi divergence of a whole run, per instance, from independent runs with the instance.

    Guarantee: with expectations in place of means over runs, the result bounds from above the
        divergence of the whole transcript with and without the instance (add or remove one), in
        `direction` only, if runs are independent, contain the instance, and `step_rdp` is at least
        the divergence of each step at the parameters it started from (sensitivities exact or
        capped). For a two-sided claim take the larger of both directions. Means over few runs are
        biased low: `upper_confidence` is the statement that holds with a confidence. One run gives
        an "estimate".
    Runs must be independent, which numbers cannot show; where they speak against it, the label
        falls. Runs that cannot be told from one passed again (equal divergences at `order` at every
        step, or equal to within rounding) or that share a stretch of steps count once; fewer than
        two that count give an "estimate". The mean is over the runs as they are given: a run passed
        twice weighs twice, which leaves the mean of exp(…) right on average if nobody chose by the
        numbers which one to repeat, while the confidence value counts it once. A run cut into
        halves passes for two: only the caller knows.
    Beyond three steps not every order is evaluated: (α−1)·D is convex in α, so its chords, on a
        grid of at least 16 orders, are above it.

    Args:
        step_rdp: order -> RDP in nats of each step, shape (instances..., trajectories, steps),
            steps in training order, non-decreasing in the order; may be inf.
        order: Rényi order of the result, > 1.
        holder_exponent: Hölder exponent, > 1, a number or one per instance. None: the best of
            `HOLDER_INFLATIONS` (and of `SHORT_RUN_INFLATIONS` up to three steps), per instance.
        direction: "with_without" for D(with ‖ without), "without_with" for the reverse, both from
            runs with the instance; `step_rdp` in the same direction (the forward one bounds both).
            For runs *without* it read each name as the other.
        worst_case_rdp: order -> largest RDP any run can have at each step: a number or an array
            that broadcasts to (instances..., steps), fixed before the runs. Bounds the result and
            is what `upper_confidence` needs.
        fixed_start: True if every run started from one and the same parameters: the first step is
            then known, not estimated. False: the start is random, with a law that does not depend
            on the instance.

    Returns:
        CompositionResult, arrays of shape (instances...).

    Raises:
        TypeError, ValueError: A value outside its range, shapes that differ between orders, a
            divergence above `worst_case_rdp`, first steps that differ under `fixed_start`.

    Edge cases (first match wins):
        step_rdp = 0         0
        some step_rdp = inf  inf, or the sum of worst_case_rdp
        one step             (1/(order−1)) log mean exp((order−1)·D); the exponent has no effect

    Source: Thudi et al. (2024), arXiv:2307.00310v3, the composition theorem; see the module for the
        constants, which are ours.
    Privacy: the result depends on private data; it is itself not private to release.

    >>> sensitivities = np.array([[[0.2, 0.4], [0.3, 0.1]]])  # 1 instance, 2 runs, 2 steps
    >>> result = compose_per_instance(lambda order: order * sensitivities**2 / 2, order=4.0)
    >>> result.rdp.shape, result.guarantee
    ((1,), 'expectation_bound')
    """
    alpha = _order(order)
    _validate.choice("direction", direction, ("with_without", "without_with"))

    def composed(runs: StepRdp) -> _Composed:
        return _compose(
            StepSource(runs, worst_case_rdp, fixed_start=fixed_start),
            order=alpha,
            holder_exponent=holder_exponent,
            direction=direction,
        )

    all_runs = composed(step_rdp)
    repeated, evidence = all_runs.repeated, all_runs.evidence
    distinct = len(repeated.distinct)
    if repeated.findings and evidence:
        evidence += composed(
            lambda order: np.asarray(step_rdp(order))[..., repeated.distinct, :]
        ).evidence
    return CompositionResult(
        rdp=all_runs.rdp,
        holder_exponent=all_runs.holder_exponent,
        guarantee="expectation_bound" if distinct > 1 else "estimate",
        order=alpha,
        direction=direction,
        distinct_runs=distinct,
        reasons=() if distinct > 1 else _one_run(repeated),
        _evidence=evidence,
    )


@dataclass(frozen=True)
class _Composed:
    rdp: FloatArray
    holder_exponent: FloatArray
    evidence: tuple[Evidence, ...]
    repeated: RepeatedRuns


def _compose(
    source: StepSource, *, order: float, holder_exponent: npt.ArrayLike | None, direction: str
) -> _Composed:
    """The theorem over all runs of the source."""
    first = source.at(order)
    leading, steps = first.rdp.shape[:-2], first.rdp.shape[-1]
    exponents, allowed, confident = _candidates(holder_exponent, leading, steps)
    sums = [
        HolderSum(
            h,
            order_schedule(order, steps=steps, holder_exponent=h, direction=direction),
            first,
            fixed_start=source.fixed_start,
        )
        for h in exponents.tolist()
    ]
    _fill(sums, source, (order, first), confident=confident)
    totals = np.stack([each.total for each in sums]) / (order - 1.0)
    totals = np.where(allowed, totals * (1.0 + _ROUNDING), np.inf)
    best = totals.argmin(axis=0)
    rdp = totals.min(axis=0)
    found = repeated_runs(first.rdp, worst=first.worst)
    if first.worst is None:
        return _Composed(rdp[()], exponents[best][()], (), found)
    # Constants compose at the order itself: the plain sum, without any Hölder.
    worst = first.worst.sum(axis=-1) * (1.0 + _ROUNDING)
    parts = [each.tangents for each, use in zip(sums, confident, strict=True) if use]
    evidence = Evidence([p for p in parts if p is not None], allowed[confident], worst)
    return _Composed(np.minimum(rdp, worst)[()], exponents[best][()], (evidence,), found)


def _fill(
    sums: list[HolderSum],
    source: StepSource,
    known: tuple[float, StepValues],
    *,
    confident: npt.NDArray[np.bool_],
) -> None:
    """Add the divergences at every order that a sum needs; those at one order are `known`."""
    knots = knots_of(sums)
    low = known[1] if knots[0] == known[0] else source.at(knots[0])
    for knot, next_knot in itertools.pairwise([*knots, math.inf]):
        high = low if next_knot == math.inf else source.at(next_knot)
        for each, use in zip(sums, confident, strict=True):
            each.add(knot, next_knot, low, high, tangents=use)
        low = high


def _one_run(repeated: RepeatedRuns) -> tuple[str, ...]:
    """Say why the runs give an estimate only."""
    return (
        *repeated.findings,
        "Runs that can be told apart: 1. An expectation takes two independent ones or more: train "
        "again with other coins.",
    )


def _candidates(
    holder_exponent: npt.ArrayLike | None, leading: tuple[int, ...], steps: int
) -> tuple[FloatArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return Hölder exponents, to whom each is open, and which are used for the confidence."""
    if holder_exponent is None:
        confident = np.isin(np.arange(len(HOLDER_INFLATIONS)), _CONFIDENT)
        inflations = np.array(HOLDER_INFLATIONS)
        if steps <= SHORT_RUN:
            inflations = np.append(inflations, SHORT_RUN_INFLATIONS)
            confident = np.append(confident, np.zeros(len(SHORT_RUN_INFLATIONS), dtype=bool))
        exponents = -1.0 / np.expm1(-inflations / max(steps - 1, 1))
        return exponents, np.ones((len(exponents), *leading), dtype=bool), confident
    given = _validate.real_array(
        "holder_exponent", holder_exponent, low=1.0, open_low=True, cure="Pass about 3 * steps."
    )
    if given.ndim and given.shape != leading:
        raise ValueError(
            f"Expected holder_exponent to be a number or of shape {leading}, one per instance, "
            f"got shape {given.shape}."
        )
    exponents = np.unique(given)
    allowed = exponents.reshape(-1, *[1] * len(leading)) == np.broadcast_to(given, leading)
    return exponents, allowed, np.ones(len(exponents), dtype=bool)


def _order(value: float) -> float:
    """Return the Rényi order of a result."""
    return _validate.real("order", value, low=1.0, open_low=True)
