"""Goals: what a caller asks of a plan, checked once and as plain values, both ways.

Knows arguments and which of them contradict each other; no model and no ledger. Whether a goal can
be reached is `planning.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .. import _validate as check
from ..certificates import Certificate, DataProcessingCertificate, NoisyFineTuningCertificate
from ..certificates.fields import constants_of, rebuilt
from ..errors import CertificateError
from .methods import METHOD, METHODS, RETRAINING, WEIGHTED_METHODS, Method
from .pilots import Calibration

STEP_GRID = 10
# As `plan` is called, and as the queue keeps what is asked of it.
_NOTHING = {
    "epsilon": None,
    "delta": None,
    "method": "dp_sgd",
    "steps": None,
    "max_steps": None,
    "step_grid": STEP_GRID,
    "strength": None,
    "predict": False,
    "adaptive": False,
    "certificate": None,
}


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """What all goals have.

    Attributes:
        method: One of `methods.METHODS`.
    """

    method: str

    @cached_property
    def rules(self) -> Method:
        """What the method is."""
        return METHOD[self.method]


@dataclass(frozen=True, kw_only=True)
class _Claim(_Goal):
    """A goal with a claim.

    Attributes:
        delta: δ of the claim.
        certificate: The caller's own, or the one that the run follows; None: the least that holds.
        adaptive: Whoever chose the rows had seen a model released before.
    """

    delta: float
    certificate: Certificate | None = None
    adaptive: bool = False

    @cached_property
    def supplied(self) -> bool:
        """Whether the certificate is the caller's word about steps that it does not govern."""
        return self.certificate is not None and not self.rules.own_constants


@dataclass(frozen=True, kw_only=True)
class Target(_Claim):
    """As few steps as reach ε at δ.

    Attributes:
        epsilon: ε to reach.
        max_steps: Most steps worth running; None: one less than retraining takes.
        step_grid: Steps are rounded up to a multiple of this.
        predict: From the norms that the deployed run's ledger stands at, without a claim.
    """

    epsilon: float
    max_steps: int | None = None
    step_grid: int = STEP_GRID
    predict: bool = False


@dataclass(frozen=True, kw_only=True)
class StepsAtDelta(_Claim):
    """So many steps, and the ε that they reach at δ.

    Attributes:
        steps: How many.
    """

    steps: int


@dataclass(frozen=True, kw_only=True)
class FixedSteps(_Goal):
    """So many steps, without a claim.

    Attributes:
        steps: How many.
        strength: Weight of what the method adds to the loss, where it adds something.
    """

    steps: int
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pilots(_Goal):
    """The steps that pilot sets predict, without a claim.

    Attributes:
        calibration: Fitted to the pilots, whose method is run.
        max_steps: Most steps worth running; None: as many as the pilots ran.
        step_grid: Steps are rounded up to a multiple of this.
    """

    calibration: Calibration
    max_steps: int | None = None
    step_grid: int = STEP_GRID


@dataclass(frozen=True, kw_only=True)
class Retraining(_Goal):
    """Training again from the start."""

    method: str = RETRAINING


Goal = Target | StepsAtDelta | FixedSteps | Pilots | Retraining


def checked_goal(
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    method: str = "dp_sgd",
    steps: int | None = None,
    max_steps: int | None = None,
    step_grid: int = STEP_GRID,
    strength: float | None = None,
    predict: bool = False,
    adaptive: bool = False,
    certificate: Certificate | None = None,
    calibration: Calibration | None = None,
) -> Goal:
    """Return what these arguments of `UnlearningEngine.plan` ask for.

    Raises:
        ValueError: A value outside its range, or arguments that contradict each other.
        CertificateError: A claim about a method that there is no certificate of, or a certificate
            of another method's steps.
    """
    check.choice("method", method, METHODS)
    rules = METHOD[method]
    grid = check.integer("step_grid", step_grid, low=1)
    if calibration is not None:
        _require_alone(epsilon, delta, steps, strength, certificate)
        return Pilots(method=method, calibration=calibration, max_steps=max_steps, step_grid=grid)
    weight = _checked_strength(strength, rules)
    target, probability, budget = _checked_numbers(epsilon, delta, steps)
    if rules.retrains:
        _require_nothing_else(target, budget, certificate)
        return Retraining()
    _require_one_aim(target, budget)
    _require_method_of(rules, certificate, steps=budget, delta=probability, predict=predict)
    if probability is None and budget is not None:
        _require_no_claim(certificate, predict=predict)
        return FixedSteps(method=method, steps=budget, strength=weight)
    _require_an_aim(target, budget, delta=probability)
    _require_fitting_claim(certificate, adaptive=adaptive, predict=predict)
    claim: dict[str, Any] = {
        "method": method, "delta": probability, "certificate": certificate, "adaptive": adaptive
    }  # fmt: skip
    if target is not None:
        return Target(epsilon=target, max_steps=max_steps, step_grid=grid, predict=predict, **claim)
    if predict:
        raise ValueError("Expected epsilon with predict=True, got steps. Pass steps alone.")
    assert budget is not None
    return StepsAtDelta(steps=budget, **claim)


# --- as plain values ------------------------------------------------------------------------------


def plain_wish(**arguments: Any) -> dict[str, Any]:
    """Return arguments of `plan` as JSON values, unchecked; those that are not given by default.

    Raises:
        CertificateError: A certificate that cannot be kept as its constants.
    """
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in {**_NOTHING, **arguments}.items()
    }
    if plain["certificate"] is not None:
        plain["certificate"] = constants_of(plain["certificate"])
    if plain.get("calibration") is not None:
        plain["calibration"] = asdict(plain["calibration"])
    return plain


def goal_from(wish: Mapping[str, Any]) -> Goal:
    """Return the goal of a `plain_wish`, also of one that an earlier release kept.

    Raises:
        ValueError, CertificateError: As checked_goal.
    """
    arguments = {**_NOTHING, **wish}
    if arguments["certificate"] is not None:
        arguments["certificate"] = rebuilt(*arguments["certificate"])
    if arguments.get("calibration") is not None:
        arguments["calibration"] = Calibration.from_plain(arguments["calibration"])
    return checked_goal(**arguments)


def plain_goal(goal: Goal) -> dict[str, Any]:
    """Return a goal as JSON values; `goal_from` gives it back."""
    return plain_wish(**{name: getattr(goal, name) for name in goal.__dataclass_fields__})


# --- what contradicts what ------------------------------------------------------------------------


def _checked_numbers(
    epsilon: float | None, delta: float | None, steps: int | None
) -> tuple[float | None, float | None, int | None]:
    return (
        None if epsilon is None else check.epsilon(epsilon),
        None if delta is None else check.delta(delta),
        None if steps is None else check.integer("steps", steps, low=0),
    )


def _require_alone(*others: Any) -> None:
    if any(value is not None for value in others):
        raise ValueError(
            "Expected calibration alone, got a target, a certificate, steps or strength "
            "beside it. A calibrated plan makes no claim and takes its steps from pilots."
        )


def _checked_strength(strength: float | None, rules: Method) -> float | None:
    if rules.term is not None:
        value = rules.strength if strength is None else strength
        return check.real("strength", value, low=0.0)
    if strength is not None:
        raise ValueError(
            f"Expected strength with {' or '.join(WEIGHTED_METHODS)} only, got it with "
            f"{rules.name!r}. Leave it out."
        )
    return None


def _require_nothing_else(*others: Any) -> None:
    if any(value is not None for value in others):
        raise ValueError(
            "Expected method='retraining' alone, got a target, steps or a certificate. "
            "Retraining takes the steps of training and forgets by construction."
        )


def _require_one_aim(target: float | None, budget: int | None) -> None:
    if target is not None and budget is not None:
        raise ValueError(
            "Expected either steps or a target epsilon, got both. Pass steps and delta for the "
            "epsilon after so many steps, or epsilon and delta for the steps."
        )


def _require_an_aim(target: float | None, budget: int | None, *, delta: float | None) -> None:
    if delta is None or (target is None and budget is None):
        raise ValueError("Expected epsilon and delta, or steps, got neither. Pass a target.")


def _require_method_of(
    rules: Method,
    certificate: Certificate | None,
    *,
    steps: int | None,
    delta: float | None,
    predict: bool,
) -> None:
    """Raise where a method has no certificate, needs one, or is not the one it speaks of."""
    if not rules.noisy and (
        steps is None or delta is not None or certificate is not None or predict
    ):
        raise CertificateError(
            f"Expected steps alone with method={rules.name!r}, got a target or a certificate. "
            "Fine-tuning without noise has no certificate: pass steps, or choose a noisy method."
        )
    if rules.own_constants:
        _require_constants(certificate, delta=delta)
    elif certificate is not None and not rules.described_by(certificate):
        raise CertificateError(
            f"Expected method='noisy_finetuning' with a NoisyFineTuningCertificate, got method="
            f"{rules.name!r}, whose steps are other ones. Change the method."
        )


def _require_constants(certificate: Certificate | None, *, delta: float | None) -> None:
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


def _require_no_claim(certificate: Certificate | None, *, predict: bool) -> None:
    if certificate is not None or predict:
        raise ValueError(
            "Expected delta beside steps for a claim, got steps and a certificate or predict. "
            "Pass delta as well, or steps alone."
        )


def _require_fitting_claim(
    certificate: Certificate | None, *, adaptive: bool, predict: bool
) -> None:
    if certificate is None:
        return
    if adaptive and not isinstance(certificate, DataProcessingCertificate):
        raise CertificateError(
            f"Expected no certificate but data processing for a request chosen after a look at a "
            f"released model, got {type(certificate).__name__}. It speaks of the last model only."
        )
    if predict:
        raise ValueError("Expected a certificate or predict=True, got both. Leave one out.")
