"""What a deletion's page says: plan, what ran, certificate or none, gap to retrained models.

Puts results into the report's plain records. Computes no privacy number: ε and assumptions are the
certificate's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from scipy import stats

from .. import __version__
from ..accounting.best_guess import best_guess
from ..certificates import Certificate
from ..report import Claim, Report, Request, Table, write_page
from ..report.numbers import plain, up
from ..report.page import pairs
from .methods import METHOD
from .plan import CertifiedPlan, PredictedPlan, RetrainPlan, UnlearningPlan

_MOST_IDS = 50
_LEVEL = 0.95
COPIES = (
    "Copies of the data, of earlier models, checkpoints and logs: whoever had them still can read "
    "what was in them."
)
_MEASUREMENT = (
    "Being close to retrained models is evidence of forgetting, never proof: other tests may tell "
    "the models apart."
)


class Ran(Protocol):
    """What a result says of a run; `UnlearningResult` is one."""

    @property
    def plan(self) -> UnlearningPlan:
        """What was asked for."""

    @property
    def steps(self) -> int:
        """Steps that ran."""

    @property
    def certificate(self) -> Certificate | None:
        """What the run satisfies."""

    @property
    def epsilon(self) -> float | None:
        """Its ε."""


def write_deletion(
    result: Ran,
    path: str | os.PathLike[str],
    *,
    gap: Mapping[str, Any] | None = None,
    public: bool = False,
) -> None:
    """Write the page of one deletion; see `UnlearningResult.write_report`."""
    report = deletion_report(result, gap=gap)  # a wrong gap is refused on either page
    write_page(path, public_deletion(result) if public else report)


def deletion_report(
    result: Ran, *, gap: Mapping[str, Any] | None = None
) -> Report:  # fmt: skip
    """Return one deletion as plain records of the report."""
    plan = result.plan
    request = request_of(result, gap=gap)
    return Report(
        title=f"Deletion of {_size(plan)}: {request.claim}",
        subtitle=f"Evidence of one request, by opacus_pil {__version__}",
        verdict=(
            ("Was it forgotten?", _forgotten(result)),
            ("What did it cost?",
             f"{result.steps:,} steps of {plan.method} ran, where retraining from scratch takes "
             f"{plan.steps_retrain:,}."),
            ("What may be claimed?", _may_be_claimed(result, measured=bool(gap))),
        ),
        tone="good" if _certified(result) or _retrained(result) else "careful",
        requests=(request,),
        claims=claims_of([result], titles=[request.title]),
        constants=_constants(result),
        limits=_limits(result, measured=bool(gap)),
    )  # fmt: skip


def public_deletion(result: Ran) -> Report:
    """Return what may be shown of one deletion: method, target, claim and its assumptions.

    Who was forgotten, how many, in how many steps, the ε that was reached and every number of an
    assumption depend on the forgotten data, and are not here.
    """
    plan = result.plan
    delta = None if _delta(plan) is None else up(_delta(plan), digits=3)
    answer = _forgotten(result)
    claims: tuple[Claim, ...] = ()
    target = None
    if isinstance(plan, CertifiedPlan) and result.certificate is not None:
        target = plan.target_epsilon
        answer = _indistinguishable(result, target)
        claims = (
            Claim(
                title="This deletion",
                kind=type(result.certificate).__name__,
                statement=answer,
                assumptions=tuple(c.without_numbers for c in result.certificate.assumption_codes),
            ),
        )
    return Report(
        title=f"A deletion: {'certified' if claims else _claim(result)}",  # not: in no step
        subtitle=f"Evidence of one request, by opacus_pil {__version__}",
        verdict=(
            ("Was it forgotten?", answer),
            ("What did it cost?",
             "This page does not say: how many steps a deletion takes depends on who is deleted."),
            ("What may be claimed?",
             "The first sentence, if every assumption below holds." if claims
             else _may_be_claimed(result, measured=False)),
        ),
        tone="good" if claims or _retrained(result) else "careful",
        claims=claims,
        constants=pairs({
            "method": plan.method,
            "ε asked for": None if target is None else up(target),
            "δ": delta,
            "opacus_pil": __version__,
        }),
        limits=_limits(result, measured=True),
        public=True,
        depends="Whether a certificate was reached is the one word that depends on the data.",
    )  # fmt: skip


def request_of(result: Ran, *, gap: Mapping[str, Any] | None = None) -> Request:
    """Return one deletion as a part of a report.

    Args:
        result: What ran.
        gap: Split name -> SplitGap of `evaluation.oracle_gap`; None: not measured.

    Raises:
        TypeError: `gap` is no mapping of such gaps.
    """
    plan = result.plan
    interval = plan.interval if isinstance(plan, PredictedPlan) else None
    facts = pairs({
        "forgotten": first_of(plan.ids or plan.forget_set.tolist()),
        "instances": f"{len(plan.forget_set):,}",
        "method": plan.method,
        "plan": plan.status,
        "why these steps": plan.reason,
        "steps planned": f"{plan.steps:,}",
        "steps predicted": None if interval is None else " to ".join(map(plain, interval)),
        "steps that ran": f"{result.steps:,}",
        "steps of retraining": f"{plan.steps_retrain:,}",
        **_of_certificate(result),
        "requests served before": f"{plan.requests_served:,}",
    })  # fmt: skip
    notes = list(plan.reasons)
    if not METHOD[plan.method].noisy and result.steps and not _retrained(result):
        notes.append(
            "These steps add no noise: every retained instance's privacy loss is infinite now."
        )
    return Request(
        title=f"{plan.method}, {_size(plan)}",
        claim=_claim(result),
        facts=facts,
        tables=(_gaps(gap),) if gap else (),
        notes=tuple(notes),
    )


def _of_certificate(result: Ran) -> dict[str, str]:
    plan = result.plan
    if not isinstance(plan, CertifiedPlan) or not _certified(result):
        return {"ε": "none: nothing is certified"}
    worst = plan.steps_worst_case
    return {
        "steps, worst case": "not known" if worst is None else f"{worst:,}",
        "ε reached": f"{up(result.epsilon)} at δ = {up(plan.delta, digits=3)}",
        "ε asked for": up(plan.target_epsilon),
    }


def first_of(ids: Sequence[Any]) -> str:
    """Return the first ids in words, and how many more there are."""
    more = f" and {len(ids) - _MOST_IDS:,} more" if len(ids) > _MOST_IDS else ""
    return ", ".join(map(str, ids[:_MOST_IDS])) + more


def claims_of(results: Sequence[Ran], *, titles: Sequence[str]) -> tuple[Claim, ...]:
    """Return the certificates of results, in their order; those without one have none."""
    return tuple(
        Claim(
            title=title,
            kind=type(result.certificate).__name__,
            statement=_statement(result),
            assumptions=tuple(result.certificate.assumptions),
        )
        for result, title in zip(results, titles, strict=True)
        if result.certificate is not None
    )


def _size(plan: UnlearningPlan) -> str:
    number = len(plan.forget_set)
    return f"{number:,} instance{'' if number == 1 else 's'}"


def _delta(plan: UnlearningPlan) -> float | None:
    return plan.delta if isinstance(plan, CertifiedPlan | RetrainPlan) else None


def _certified(result: Ran) -> bool:
    return result.certificate is not None


def _retrained(result: Ran) -> bool:
    return isinstance(result.plan, RetrainPlan)


def _claim(result: Ran) -> str:
    if _certified(result):
        return "certified" if result.steps else "certified: by the training alone"
    if _retrained(result):
        return "no claim needed: retrained"
    return "no claim"


def _statement(result: Ran) -> str:
    when = f"After {result.steps:,} steps the model"
    if not result.steps:
        when = "No step was run, and none is needed: training alone bounds what is known. The model"
    return f"{when}{_indistinguishable(result, result.epsilon).removeprefix('The model')}"


def _indistinguishable(result: Ran, epsilon: float | None) -> str:
    """Say what a certificate claims at an ε, and how often a guess is right then."""
    delta = _delta(result.plan)
    if result.certificate is None or epsilon is None or delta is None:
        raise ValueError("Expected a certified run, got one without a certificate.")
    two_sided = result.certificate.two_sided
    way = "in both directions" if two_sided else "in one direction, from model to reference"
    right = best_guess(epsilon, delta=delta, two_sided=two_sided)
    return (
        "The model and its reference, which the assumptions name, are, "
        f"{way}, indistinguishable up to ε = {up(epsilon)} at δ = {up(delta, digits=3)}, if every "
        f"assumption holds: shown one of the two by the toss of a coin, the best guess which it is "
        f"is right in at most {up(100 * right)} % of all cases."
    )


def _forgotten(result: Ran) -> str:
    if _certified(result):
        return _statement(result)
    if _retrained(result):
        return "The model was trained again without the forgotten instances: none of them was read."
    return "Nothing is proved: no certificate covers what ran, so there is no ε."


def _may_be_claimed(result: Ran, *, measured: bool) -> str:
    if _certified(result):
        return "The sentence above with its assumptions, and the certificate file as its evidence."
    if _retrained(result):
        return "That this model was trained without them; not what was chosen with them at hand."
    if measured:
        return "How close the model came to retrained ones on the splits below; no guarantee."
    return "That these steps ran; neither a guarantee nor how close they came to retraining."


def _gaps(gap: Mapping[str, Any]) -> Table:
    """Return the gap to retrained models, split by split, with the spread of the retrained."""
    rows = []
    for split, found in gap.items():
        for name in ("accuracy", "loss"):
            one = getattr(found, name, None)
            oracle = getattr(one, "oracle", None)
            if one is None or oracle is None:
                raise TypeError(
                    f"Expected gap to map a split to its SplitGap, got gap[{split!r}]="
                    f"{type(found).__name__}. Pass evaluation.oracle_gap(...)."
                )
            rows.append(
                (f"{name}, {split}", plain(one.value), plain(oracle.mean),
                 _signed(one.difference), _interval(oracle), str(oracle.count))
            )  # fmt: skip
    return Table(
        caption="Measured beside models retrained without the forget set",
        head=("statistic, split", "unlearned", "retrained, mean", "gap", "another retrained model",
              "retrained models"),
        rows=tuple(rows),
        note=f"“Another retrained model” is where one more would lie with {_LEVEL:.0%} (Student's "
        f"t, which takes them as normal). {_MEASUREMENT}",
    )  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:+.4g}".replace("-", "−")


def _interval(oracle: Any) -> str:
    """Return the prediction interval of one more retrained model."""
    if oracle.std is None or oracle.count < 2:
        return "unknown"
    times = float(stats.t.ppf(0.5 + _LEVEL / 2, oracle.count - 1))
    half = times * oracle.std * math.sqrt(1.0 + 1.0 / oracle.count)
    return f"{plain(oracle.mean - half)} to {plain(oracle.mean + half)}"


def _constants(result: Ran) -> tuple[tuple[str, str], ...]:
    plan = result.plan
    found = pairs({
        "method": plan.method,
        "strength": None if plan.strength is None else plain(plan.strength),
        "noise of the first step": f"{plan.noise_burst:g} times that of the others"
        if isinstance(plan, CertifiedPlan) and plan.noise_burst != 1.0 else None,
        "expected batch size": plain(plan.batch_size),
        "number of steps fixed beforehand": "yes" if plan.fixed_length else "no",
        "opacus_pil": __version__,
        "plan made for (digest)": plan.basis or None,
    })  # fmt: skip
    hashes = [(when, getattr(result, f"model_{when}", None)) for when in ("before", "after")]
    return found + tuple((f"model {when}, SHA-256", one) for when, one in hashes if one)


def _limits(result: Ran, *, measured: bool) -> tuple[str, ...]:
    found = [
        COPIES,
        "What the number of steps gives away: it depends on the forget set.",
    ]
    if _certified(result):
        found.append("Anything, where an assumption of the certificate does not hold.")
    else:
        found.append("A privacy guarantee for the forgotten instances: there is no certificate.")
    if not measured:
        found.append("How close the model is to retrained ones: it was not measured here.")
    return tuple(found)
