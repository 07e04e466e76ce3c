"""From a target, or a number of steps, to one of the three kinds of plan; knows no training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn as nn

from .. import _validate as check
from .._validate import IntArray
from ..certificates import (
    BestCertificate,
    Certificate,
    DataProcessingCertificate,
    NoisyFineTuningCertificate,
    PoissonContractionCertificate,
)
from ..errors import CertificateError
from .averaged import require_all_trainable
from .calibration import Calibration
from .grounds import with_codes
from .plan import (
    NOISE_FREE_METHODS,
    CertifiedPlan,
    PredictedPlan,
    RetrainPlan,
    UnlearningPlan,
    certified_steps,
    on_grid,
)
from .search import searching

_STRENGTH = {"l1_sparse": 1e-4, "gradient_difference": 1.0}
_WORST_CASE_SEARCH = 1_000_000
_MEASURED = "the norms are those that the deployed run itself measured"
_SUPPLIED = "; the certificate is the caller's, and that it describes this run was not checked"

Applicable = Callable[[], tuple[Certificate, Certificate | None]]
Codes = Callable[..., tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What every plan of one request has in common.

    Attributes:
        forget_set, ids, method, steps_retrain, batch_size, requests_served: As in UnlearningPlan.
        module: The model as it is.
        noisy: Whether steps of the training's kernel add noise.
        label: Why the ledger's label is not a stronger one; None: there is no ledger.
        progress: Show how long a search takes, when the output is a terminal.
    """

    forget_set: IntArray
    ids: tuple[Any, ...]
    method: str
    steps_retrain: int
    batch_size: float
    requests_served: int
    module: nn.Module
    noisy: bool
    label: tuple[str, ...] | None
    progress: bool

    def common(self, **changes: Any) -> dict[str, Any]:
        """Return the fields of a plan."""
        own = ("module", "noisy", "label", "progress")
        fields = {name: value for name, value in vars(self).items() if name not in own}
        return {**fields, "reasons": self.label or (), **changes}

    def unproved(self, why: str) -> tuple[str, ...]:
        """Return the reasons of a plan without a claim."""
        if self.label is None:
            return (why, "there is no privacy_engine: nothing bounds what training gave away")
        return (why, *self.label)


def make_plan(
    facts: Facts,
    *,
    epsilon: float | None,
    delta: float | None,
    certificate: Certificate | None,
    applicable: Applicable,
    run_codes: Codes,
    training_codes: Codes,
    steps: int | None,
    max_steps: int | None,
    step_grid: int,
    strength: float | None,
    predict: bool,
    adaptive: bool,
) -> UnlearningPlan:
    """Return the plan; arguments, errors and result as in `UnlearningEngine.plan`.

    Args:
        facts: Of the request.
        applicable: Gives the certificate and its worst case, or refuses; called where needed only.
        run_codes: Gives the codes of what a certified run takes for granted, or refuses.
        training_codes: The same of the training and the model, for certificates that speak of it.
    """
    grid = check.integer("step_grid", step_grid, low=1)
    weight = _checked_strength(strength, facts.method)
    target = None if epsilon is None else check.epsilon(epsilon)
    probability = None if delta is None else check.delta(delta)
    budget = None if steps is None else check.integer("steps", steps, low=0)
    if facts.method == "retraining":
        if not (target is None and budget is None and certificate is None):
            raise ValueError(
                "Expected method='retraining' alone, got a target, steps or a certificate. "
                "Retraining takes the steps of training and forgets by construction."
            )
        return RetrainPlan(
            steps=facts.steps_retrain, reason="retraining was asked for", **facts.common()
        )
    if target is not None and budget is not None:
        raise ValueError(
            "Expected either steps or a target epsilon, got both. Pass steps and delta for the "
            "epsilon after so many steps, or epsilon and delta for the steps."
        )
    if facts.method in NOISE_FREE_METHODS and (
        budget is None or probability is not None or certificate is not None or predict
    ):
        raise CertificateError(
            f"Expected steps alone with method={facts.method!r}, got a target or a certificate. "
            "Fine-tuning without noise has no certificate: pass steps, or choose a noisy method."
        )
    if facts.method == "noisy_finetuning":
        _check_noisy_finetuning(certificate, probability, facts.module)
    elif _speaks_of_noisy_finetuning(certificate):
        raise CertificateError(
            f"Expected method='noisy_finetuning' with a NoisyFineTuningCertificate, got method="
            f"{facts.method!r}, whose steps are other ones. Change the method."
        )
    if budget is not None and probability is None:
        if certificate is not None or predict:
            raise ValueError(
                "Expected delta beside steps for a claim, got steps and a certificate or predict. "
                "Pass delta as well, or steps alone."
            )
        return PredictedPlan(
            steps=budget,
            reason="a fixed budget chosen by the caller",
            strength=weight,
            **facts.common(reasons=facts.unproved(_why_not_asked(facts.method))),
        )
    if probability is None or (target is None and budget is None):
        raise ValueError("Expected epsilon and delta, or steps, got neither. Pass a target.")
    if adaptive and not (certificate is None or isinstance(certificate, DataProcessingCertificate)):
        raise CertificateError(
            f"Expected no certificate but data processing for a request chosen after a look at a "
            f"released model, got {type(certificate).__name__}. It speaks of the last model only."
        )
    supplied = certificate is not None and facts.method != "noisy_finetuning"
    if supplied and not facts.noisy:
        raise CertificateError(
            "Expected a privacy_engine with noise for a certified plan, got a certificate and "
            "none: the steps add no noise. Train with PerInstancePrivacyEngine."
        )
    worst: Certificate | None = None
    if certificate is None:
        certificate, worst = applicable()
    elif predict:
        raise ValueError("Expected a certificate or predict=True, got both. Leave one out.")
    if facts.method == "noisy_finetuning":
        facts = replace(facts, label=())  # of any training: no ledger stands behind it
    if not predict:
        codes = run_codes()
        if facts.method != "noisy_finetuning":
            codes += training_codes(rests_on_ledger=not supplied)
        if supplied:
            codes += ("supplied_by_caller",)
        certificate = with_codes(certificate, *codes)
    if budget is not None:
        if predict:
            raise ValueError("Expected epsilon with predict=True, got steps. Pass steps alone.")
        reached = certificate.epsilon(delta=probability, steps=budget)
        return CertifiedPlan(
            steps=budget,
            reason="as many steps as the caller asked for" + (_SUPPLIED if supplied else ""),
            epsilon=reached,
            target_epsilon=reached,
            delta=probability,
            certificate=certificate,
            steps_worst_case=None,
            **facts.common(),
        )
    assert target is not None
    return _for_target(
        facts,
        certificate,
        worst,
        epsilon=target,
        delta=probability,
        limit=max(facts.steps_retrain - 1, 0) if max_steps is None else max_steps,
        grid=grid,
        predict=predict,
        supplied=supplied,
    )


def predicted_plan(
    facts: Facts,
    calibration: Calibration,
    *,
    log_loss: float,
    max_steps: int | None,
    step_grid: int,
) -> UnlearningPlan:
    """Return the plan that the pilot sets predict, or "retrain instead" beyond their reach."""
    grid = check.integer("step_grid", step_grid, low=1)
    limit = calibration.max_steps if max_steps is None else max_steps
    found = calibration.predict(log_loss)
    pilots = f"{len(calibration.times)} pilot sets at mean log privacy loss {log_loss:.3g}"
    if found.extrapolated:
        pilots += " (outside the pilots' range)"
    if found.high > limit:
        return RetrainPlan(
            steps=facts.steps_retrain,
            reason=f"{pilots} put up to {found.high:.0f} steps in the interval, above {limit}.",
            **facts.common(method="retraining"),
        )
    return PredictedPlan(
        steps=on_grid(math.ceil(found.high), step_grid=grid),
        reason=f"upper end of the {found.level:.0%} prediction interval from {pilots}; estimate "
        f"{found.estimate:.0f}",
        interval=(found.low, found.high),
        measured=True,
        **facts.common(
            method=calibration.method,
            reasons=facts.unproved("the steps are those that pilot sets took to be forgotten"),
        ),
    )


def _for_target(
    facts: Facts,
    certificate: Certificate,
    worst: Certificate | None,
    *,
    epsilon: float,
    delta: float,
    limit: int,
    grid: int,
    predict: bool,
    supplied: bool,
) -> UnlearningPlan:
    goal = {"epsilon": epsilon, "delta": delta}
    try:
        with searching(certificate, progress=facts.progress) as watched:
            exact = watched.steps_for(**goal, max_steps=limit)
        needed = on_grid(exact, step_grid=grid)
        if needed > limit:
            raise CertificateError(
                f"Expected a target within max_steps={limit}, got one that takes {needed} steps, "
                f"rounded up to a multiple of step_grid={grid}."
            )
    except CertificateError as error:
        return RetrainPlan(
            steps=facts.steps_retrain,
            reason=str(error),
            target_epsilon=epsilon,
            delta=delta,
            **facts.common(method="retraining"),
        )
    name = type(certificate).__name__
    if predict:
        return PredictedPlan(
            steps=needed,
            reason=f"the formula of {name} with what the deployed run itself measured, for "
            f"epsilon={epsilon:g} at delta={delta:g}; a prediction, no claim",
            measured=True,
            **facts.common(reasons=facts.unproved(_MEASURED)),
        )
    if isinstance(certificate, BestCertificate):
        name = certificate.winner(delta=delta, steps=needed).name
    worst_steps = None
    if worst is not None:
        with searching(worst, progress=facts.progress) as watched:
            worst_steps = certified_steps(watched, **goal, max_steps=max(limit, _searched(worst)))
    return CertifiedPlan(
        steps=needed,
        reason=f"fewest steps at which {name} reaches the target, rounded up to a multiple of "
        f"{grid}" + (_SUPPLIED if supplied else ""),
        epsilon=certificate.epsilon(delta=delta, steps=needed),
        target_epsilon=epsilon,
        delta=delta,
        certificate=certificate,
        steps_worst_case=None if worst_steps is None else on_grid(worst_steps, step_grid=grid),
        **facts.common(),
    )


def _why_not_asked(method: str) -> str:
    if method in NOISE_FREE_METHODS:
        return "steps without noise have no certificate"
    return "steps alone were asked for: with delta= the plan says which ε is certified, or why none"


def _searched(certificate: Certificate) -> int:
    """Return how far to look for the worst case, which is only there to be compared with."""
    slow = PoissonContractionCertificate  # seconds per ε
    return 0 if isinstance(certificate, slow) else _WORST_CASE_SEARCH


def _speaks_of_noisy_finetuning(certificate: Certificate | None) -> bool:
    members = certificate.members if isinstance(certificate, BestCertificate) else (certificate,)
    return any(isinstance(member, NoisyFineTuningCertificate) for member in members)


def _checked_strength(strength: float | None, method: str) -> float | None:
    if method in _STRENGTH:
        value = _STRENGTH[method] if strength is None else strength
        return check.real("strength", value, low=0.0)
    if strength is not None:
        raise ValueError(
            f"Expected strength with {' or '.join(_STRENGTH)} only, got it with {method!r}. "
            "Leave it out."
        )
    return None


def _check_noisy_finetuning(
    certificate: Certificate | None, delta: float | None, module: nn.Module
) -> None:
    if certificate is None or delta is None:
        raise CertificateError(
            "Expected certificate and delta with method='noisy_finetuning', got none. Pass a "
            "NoisyFineTuningCertificate: the run follows its clips, step size, decay and noise."
        )
    if not isinstance(certificate, NoisyFineTuningCertificate):
        raise CertificateError(
            f"Expected a NoisyFineTuningCertificate for method 'noisy_finetuning', got "
            f"{type(certificate).__name__}. Its run would be another one."
        )
    require_all_trainable(module)
