"""What is going to be done about a deletion request, said before anything runs.

Three types, so that nobody can take one for another: a certified plan carries an ε and the
certificate it comes from, a predicted plan carries neither, a retraining plan says why the other
two are out of reach. Knows numbers only, no model.
"""

from __future__ import annotations

import abc
import hashlib
from dataclasses import dataclass, field
from typing import Any

from .. import _validate as check
from .._validate import IntArray
from ..accounting.shown import rounded_up
from ..certificates import Certificate, OnProbe
from ..errors import CertificateError
from .methods import METHOD


@dataclass(frozen=True, kw_only=True)
class UnlearningPlan(abc.ABC):
    """Which instances go, how, and at which cost against retraining.

    Attributes:
        forget_set: Rows of the data set that leave, ascending, shape (members,).
        method: One of `methods.METHODS`.
        steps: Steps that will be run; of an adaptive run the most.
        steps_retrain: Steps that retraining from scratch takes.
        batch_size: Expected number of per-instance gradients in a step, for both.
        reason: Why these steps.
        ids: What the rows of the forget set are called, in their order: the caller's instance ids,
            or the rows themselves.
        reasons: What the claim takes for granted, or why there is none: a sentence each, among
            them those of the label of the ledger that the plan rests on.
        strength: Weight of what the method adds to the loss, where it adds something.
        requests_served: Requests the engine had served when it made the plan.
        basis: Digest of the model, ledger and settings that the plan was made for.
    """

    forget_set: IntArray
    method: str
    steps: int
    steps_retrain: int
    batch_size: float
    reason: str
    ids: tuple[Any, ...] = ()
    reasons: tuple[str, ...] = ()
    strength: float | None = None
    requests_served: int = 0
    basis: str = field(default="", repr=False)

    @property
    @abc.abstractmethod
    def status(self) -> str:
        """ "certified", "predicted" or "retrain instead"."""

    @property
    def fixed_length(self) -> bool:
        """Whether the number of steps was chosen without measurements of the deployed run."""
        return True

    @property
    def cost(self) -> float:
        """Per-instance gradients of this plan as a fraction of those of retraining."""
        return self.steps / self.steps_retrain if self.steps_retrain else float("inf")

    def __str__(self) -> str:
        """Return the plan as a person reads it."""
        gradients = self.steps * self.batch_size
        lines = [
            f"Forget {len(self.forget_set)} instances by {self.method}: {self.status}",
            f"  steps             {self.steps}",
            f"  steps, retraining {self.steps_retrain}",
            f"  gradients         {gradients:,.0f} ({self.cost:.1%} of retraining)",
            f"  why               {self.reason}",
            *self._details(),
        ]
        if self.reasons:
            lines += [f"  {self._because}", *[f"    - {reason}" for reason in self.reasons]]
        if not METHOD[self.method].noisy and self.steps:
            lines.append(
                "  afterwards        every retained instance's privacy loss is infinite: these "
                "steps add no noise"
            )
        return "\n".join(lines)

    _because = "label of the ledger"

    def _details(self) -> list[str]:
        return []


@dataclass(frozen=True, kw_only=True)
class CertifiedPlan(UnlearningPlan):
    """Steps that a certificate proves sufficient under its assumptions.

    Attributes:
        epsilon: ε reached after `steps`, at most `target_epsilon`.
        target_epsilon: ε asked for.
        delta: δ of both.
        certificate: The claim, with its assumptions.
        steps_worst_case: Steps with every member at the full clipping bound; None if even
            `max_steps` are too few, or if the certificate knows no worst case.
        noise_burst: Noise of the first step, as a multiple of that of training and of the others.
    """

    epsilon: float
    target_epsilon: float
    delta: float
    certificate: Certificate
    steps_worst_case: int | None
    noise_burst: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no certificate speaks of."""
        if not METHOD[self.method].certifiable:
            raise CertificateError(
                f"Expected a method with noise for a certified plan, got {self.method!r}. Nothing "
                "is proved about its steps."
            )
        if not self.epsilon < float("inf"):
            raise CertificateError(
                f"Expected a finite epsilon to certify, got {self.epsilon} after {self.steps} "
                "steps. It says nothing: run more steps."
            )

    @property
    def status(self) -> str:
        """Always "certified"."""
        return "certified"

    def _details(self) -> list[str]:
        worst = "not known" if self.steps_worst_case is None else str(self.steps_worst_case)
        return [
            f"  steps, worst case {worst}",
            f"  epsilon           {rounded_up(self.epsilon, digits=4)} (asked for "
            f"{self.target_epsilon:g}) at delta {rounded_up(self.delta)}",
            f"  certificate       {type(self.certificate).__name__}",
            f"  directions        {'both' if self.certificate.two_sided else 'one'}",
            *([f"  noise, first step {self.noise_burst:g} x"] if self.noise_burst != 1.0 else []),
            "  assumptions",
            *[f"    - {sentence}" for sentence in self.certificate.assumptions],
        ]


@dataclass(frozen=True, kw_only=True)
class PredictedPlan(UnlearningPlan):
    """Steps that nothing is proved about: no ε, no certificate.

    Attributes:
        interval: Where the measured time to unlearn is expected, for a plan from `calibrate`; the
            upper end may be inf.
        measured: Whether the steps come from measurements of the deployed run.
    """

    interval: tuple[float, float] | None = None
    measured: bool = False

    _because = "not certified because"

    @property
    def fixed_length(self) -> bool:
        """Whether the number of steps was chosen without measurements of the deployed run."""
        return not self.measured

    @property
    def status(self) -> str:
        """Always "predicted"."""
        return "predicted"

    def _details(self) -> list[str]:
        lines = ["  epsilon           none: no certificate is claimed"]
        if self.interval is not None:
            low, high = self.interval
            lines.insert(0, f"  steps, predicted  {low:.0f} to {high:.0f}")
        return lines


@dataclass(frozen=True, kw_only=True)
class RetrainPlan(UnlearningPlan):
    """Train again without the forget set: asked for, or because nothing cheaper reaches the target.

    Attributes:
        target_epsilon: ε asked for; None where retraining itself was asked for.
        delta: Its δ.
        best: (ε, steps): the least ε that so many steps at most reach; None: not known.
    """

    target_epsilon: float | None = None
    delta: float | None = None
    best: tuple[float, int] | None = None

    @property
    def status(self) -> str:
        """Always "retrain instead"."""
        return "retrain instead"


def on_grid(steps: int, *, step_grid: int) -> int:
    """Round a number of steps up to a multiple of a public grid; 0 stays 0.

    The number of steps shows how much the forget set weighs; a grid limits what it shows.
    """
    return -(-steps // step_grid) * step_grid


def certified_steps(
    certificate: Certificate,
    *,
    epsilon: float,
    delta: float,
    max_steps: int,
    on_probe: OnProbe | None = None,
) -> int | None:
    """Return the smallest sufficient number of steps, or None if `max_steps` are too few."""
    check.integer("max_steps", max_steps, low=0)
    try:
        return certificate.steps_for(
            epsilon=epsilon, delta=delta, max_steps=max_steps, on_probe=on_probe
        )
    except CertificateError:
        return None


def bound_to(plan: UnlearningPlan, state: str) -> str:
    """Return a digest of what a plan says and of the state it was made for.

    Args:
        plan: Its own `basis` is left out.
        state: Digest of the state.
    """
    claim = ""
    if isinstance(plan, CertifiedPlan):
        claim = f"{plan.epsilon!r} {plan.delta!r} {type(plan.certificate).__name__}"
        if plan.noise_burst != 1.0:
            claim += f" {plan.noise_burst!r}"
        if METHOD[plan.method].own_constants:
            claim += repr(plan.certificate)  # the run follows its constants
    text = (
        f"{state} {type(plan).__name__} {plan.method} {plan.steps} {plan.strength} "
        f"{plan.fixed_length} {plan.forget_set.tolist()} {claim}"
    )
    if list(plan.ids) not in ([], plan.forget_set.tolist()):  # what the certificate will name
        text += f" {list(plan.ids)!r}"
    return hashlib.sha256(text.encode()).hexdigest()
