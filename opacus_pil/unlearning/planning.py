"""Planning: from rows and a goal to one of the three kinds of plan.

Looks at the state of a model and moves nothing; what a goal may ask for is `goal.py`, which
certificates there are `applicable.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

from .._validate import IntArray
from ..certificates import (
    BestCertificate,
    Certificate,
    ContractionCertificate,
    PoissonContractionCertificate,
)
from ..certificates.burst import with_burst
from ..errors import CertificateError, OutOfReachError
from .applicable import AndWorst, Question, certificates_for
from .drowned import warn_if_drowned
from .goal import Burst, FixedSteps, Goal, Pilots, Retraining, StepsAtDelta, Target
from .grounds import require_plain_descent, require_still_weights, training_codes, with_codes
from .methods import METHOD, RETRAINING
from .noise_burst import least_burst
from .pilots import mean_log_loss
from .plan import (
    CertifiedPlan,
    PredictedPlan,
    RetrainPlan,
    UnlearningPlan,
    bound_to,
    certified_steps,
    on_grid,
)
from .rehearsal import Rehearsal, Rehearsals
from .search import searching
from .state import TrainedState
from .step_size import require_moving_steps
from .steps.averaged import require_all_trainable

_WORST_CASE_SEARCH = 1_000_000
_MEASURED = "the norms are those that the deployed run itself measured"
_SUPPLIED = "; the certificate is the caller's, and that it describes this run was not checked"


class Planning:
    """What forgetting some rows takes, for one goal.

    Args:
        state: Of the model; looked at only.
        rows: To be forgotten, ascending.
        goal: What the caller asks for.
        rehearsals: Of this state, where some were seen before.
        progress: Show how long a search takes, when the output is a terminal.
    """

    def __init__(
        self,
        state: TrainedState,
        rows: IntArray,
        goal: Goal,
        *,
        rehearsals: Rehearsals | None = None,
        progress: bool,
    ) -> None:
        self._state, self._rows, self._goal = state, rows, goal
        self._rehearsals = Rehearsals(state) if rehearsals is None else rehearsals
        self._progress = progress

    def plan(self) -> UnlearningPlan:
        """Return the plan; whether the data are the training's is not asked.

        Raises:
            CertificateError, UnsupportedError, ValueError, LedgerError: As `UnlearningEngine.plan`.
        """
        self._require_fitting_model()
        plan = self._unbound()
        self._require_rehearsed()
        self._require_moving(plan)
        if isinstance(plan, CertifiedPlan):
            warn_if_drowned(self._state.module, plan.certificate, steps=plan.steps)
        return replace(plan, basis=bound_to(plan, self._state.basis()))

    def _unbound(self) -> UnlearningPlan:
        match self._goal:
            case Pilots():
                return self._of_pilots(self._goal)
            case Retraining():
                return self._retraining("retraining was asked for", method=self._goal.method)
            case FixedSteps():
                return self._of_fixed_steps(self._goal)
            case StepsAtDelta():
                return self._at_delta(self._goal)
            case Burst():
                return self._with_burst(self._goal)
            case Target():
                return self._for_target(self._goal)

    # --- without a claim ----------------------------------------------------------------------

    def _of_pilots(self, goal: Pilots) -> UnlearningPlan:
        """Return the steps that the pilots predict, or "retrain instead" beyond their reach."""
        calibration = goal.calibration
        limit = calibration.max_steps if goal.max_steps is None else goal.max_steps
        log_loss = mean_log_loss_of(self._state, self._rows, order=calibration.order)
        found = calibration.predict(log_loss)
        pilots = f"{len(calibration.times)} pilot sets at mean log privacy loss {log_loss:.3g}"
        if found.extrapolated:
            pilots += " (outside the pilots' range)"
        if found.high > limit:
            return self._retraining(
                f"{pilots} put up to {found.high:.0f} steps in the interval, above {limit}."
            )
        return PredictedPlan(
            steps=on_grid(math.ceil(found.high), step_grid=goal.step_grid),
            reason=f"upper end of the {found.level:.0%} prediction interval from {pilots}; "
            f"estimate {found.estimate:.0f}",
            interval=(found.low, found.high),
            measured=True,
            **self._common(
                method=calibration.method,
                reasons=self._unproved("the steps are those that pilot sets took to be forgotten"),
            ),
        )

    def _of_fixed_steps(self, goal: FixedSteps) -> UnlearningPlan:
        why = "steps without noise have no certificate"
        if goal.rules.noisy:
            why = (
                "steps alone were asked for: with delta= the plan says which ε is certified, or "
                "why none"
            )
        return PredictedPlan(
            steps=goal.steps,
            reason="a fixed budget chosen by the caller",
            strength=goal.strength,
            **self._common(reasons=self._unproved(why)),
        )

    def _retraining(self, reason: str, **other: Any) -> RetrainPlan:
        return RetrainPlan(
            steps=self._state.training_steps,
            reason=reason,
            **self._common(**{"method": RETRAINING, **other}),
        )

    # --- with a claim -------------------------------------------------------------------------

    def _at_delta(self, goal: StepsAtDelta) -> UnlearningPlan:
        certificate, _ = self._grounded(goal)
        reached = certificate.epsilon(delta=goal.delta, steps=goal.steps)
        return CertifiedPlan(
            steps=goal.steps,
            reason="as many steps as the caller asked for" + (_SUPPLIED if goal.supplied else ""),
            epsilon=reached,
            target_epsilon=reached,
            delta=goal.delta,
            certificate=certificate,
            steps_worst_case=None,
            **self._common(),
        )

    def _with_burst(self, goal: Burst) -> UnlearningPlan:
        certificate, _ = self._grounded(goal)
        if not isinstance(certificate, ContractionCertificate):
            raise CertificateError(
                "Expected full batches for a first step with more noise, got "
                f"{type(certificate).__name__}. Pass epsilon and delta alone."
            )
        burst = least_burst(
            certificate, epsilon=goal.epsilon, delta=goal.delta, steps=goal.steps
        )  # fmt: skip
        chosen = with_burst(certificate, burst)
        return CertifiedPlan(
            steps=goal.steps,
            reason="as many steps as the caller asked for; the least noise in the first one that "
            f"reaches the target, {burst:g} times the others', rounded up on a public grid",
            epsilon=chosen.epsilon(delta=goal.delta, steps=goal.steps),
            target_epsilon=goal.epsilon,
            delta=goal.delta,
            certificate=chosen,
            steps_worst_case=None,
            noise_burst=burst,
            **self._common(),
        )

    def _for_target(self, goal: Target) -> UnlearningPlan:
        if goal.predict:
            certificate, worst = self._applicable(goal)
        else:
            certificate, worst = self._grounded(goal)
        limit = max(self._state.training_steps - 1, 0) if goal.max_steps is None else goal.max_steps
        try:
            needed = self._needed(certificate, goal, limit=limit)
        except CertificateError as error:
            best = (error.best, error.max_steps) if isinstance(error, OutOfReachError) else None
            return self._retraining(
                str(error), target_epsilon=goal.epsilon, delta=goal.delta, best=best
            )
        if goal.predict:
            return self._predicted(certificate, goal, steps=needed)
        name = type(certificate).__name__
        if isinstance(certificate, BestCertificate):
            name = certificate.winner(delta=goal.delta, steps=needed).name
        return CertifiedPlan(
            steps=needed,
            reason=f"fewest steps at which {name} reaches the target, rounded up to a multiple of "
            f"{goal.step_grid}" + (_SUPPLIED if goal.supplied else ""),
            epsilon=certificate.epsilon(delta=goal.delta, steps=needed),
            target_epsilon=goal.epsilon,
            delta=goal.delta,
            certificate=certificate,
            steps_worst_case=self._needed_at_worst(worst, goal, limit=limit),
            **self._common(),
        )

    def _predicted(self, certificate: Certificate, goal: Target, *, steps: int) -> PredictedPlan:
        return PredictedPlan(
            steps=steps,
            reason=f"the formula of {type(certificate).__name__} with what the deployed run itself "
            f"measured, for epsilon={goal.epsilon:g} at delta={goal.delta:g}; a prediction, no "
            "claim",
            measured=True,
            **self._common(reasons=self._unproved(_MEASURED)),
        )

    def _needed(self, certificate: Certificate, goal: Target, *, limit: int) -> int:
        """Return the fewest steps, on the public grid.

        Raises:
            CertificateError: More than the limit.
        """
        with searching(progress=self._progress) as on_probe:
            exact = certificate.steps_for(
                epsilon=goal.epsilon, delta=goal.delta, max_steps=limit, on_probe=on_probe
            )
        needed = on_grid(exact, step_grid=goal.step_grid)
        if needed > limit:
            raise CertificateError(
                f"Expected a target within max_steps={limit}, got one that takes {needed} steps, "
                f"rounded up to a multiple of step_grid={goal.step_grid}."
            )
        return needed

    def _needed_at_worst(
        self, worst: Certificate | None, goal: Target, *, limit: int
    ) -> int | None:
        """Return the same with every member at the clip bound, which is there to compare with."""
        if worst is None:
            return None
        slow = isinstance(worst, PoissonContractionCertificate)  # up to seconds per ε
        with searching(progress=self._progress) as on_probe:
            found = certified_steps(
                worst,
                epsilon=goal.epsilon,
                delta=goal.delta,
                max_steps=max(limit, 0 if slow else _WORST_CASE_SEARCH),
                on_probe=on_probe,
            )
        return None if found is None else on_grid(found, step_grid=goal.step_grid)

    # --- what a claim stands on ---------------------------------------------------------------

    def _grounded(self, goal: Target | Burst | StepsAtDelta) -> AndWorst:
        """Return the certificate, which names what it takes for granted, and its worst case."""
        if goal.supplied and not self._noisy:
            raise CertificateError(
                "Expected a privacy_engine with noise for a certified plan, got a certificate and "
                "none: the steps add no noise. Train with PerInstancePrivacyEngine."
            )
        worst: Certificate | None = None
        certificate = goal.certificate
        if certificate is None:
            certificate, worst = self._applicable(goal)
        codes = self._run_codes()
        if not goal.rules.own_constants:
            codes += training_codes(
                None if goal.supplied else self._state.account,
                module=self._state.module,
                weights=self._state.weights,
            )
        if goal.supplied:
            codes += ("supplied_by_caller",)
        return with_codes(certificate, *codes), worst

    def _applicable(self, goal: Target | Burst | StepsAtDelta) -> AndWorst:
        asked = Question(
            rows=self._rows,
            method=goal.rules,
            measured=isinstance(goal, Target) and goal.predict,
            adaptive=goal.adaptive,
            evidence=self._require_evidence,
            random_rows=lambda: self._rehearsal.random_rows,
        )
        return certificates_for(self._state, asked)

    def _require_evidence(self) -> None:
        self._require_rehearsed()  # what cannot be run at all is said first
        assert self._state.account is not None
        self._state.account.require_evidence()

    def _run_codes(self) -> tuple[str, ...]:
        """Return what a certified run takes for granted: codes of a context."""
        self._rehearsal.require_independent_rows()
        require_still_weights(self._state.module)
        return (*self._state.data.codes(), *self._rehearsal.codes)

    def _require_rehearsed(self) -> None:
        """Raise where the training cannot be run as it is described."""
        _ = self._rehearsal

    @cached_property
    def _rehearsal(self) -> Rehearsal:
        """What two rows show that stay."""
        return self._rehearsals.without(self._rows)

    # --- what all plans share -----------------------------------------------------------------

    @property
    def _noisy(self) -> bool:
        """Whether steps of the training's kernel add noise."""
        kernel = self._state.kernel
        return kernel is not None and kernel.noise_multiplier > 0.0

    def _common(self, **changes: Any) -> dict[str, Any]:
        """Return the fields that every plan has."""
        state = self._state
        return {
            "forget_set": self._rows,
            "ids": tuple(state.data.ids.of(self._rows)),
            "method": self._goal.method,
            "steps_retrain": state.training_steps,
            "batch_size": state.batch_size,
            "requests_served": state.requests_served,
            "reasons": self._label(),
            **changes,
        }

    def _label(self) -> tuple[str, ...]:
        """Return why the label that a plan rests on is not a stronger one."""
        goal, ledger = self._goal, self._state.ledger
        claim = isinstance(goal, Target | Burst | StepsAtDelta)
        if ledger is None or (claim and goal.rules.own_constants):
            return ()  # of any training: no ledger stands behind it
        return tuple(ledger.reasons)

    def _unproved(self, why: str) -> tuple[str, ...]:
        """Return the reasons of a plan without a claim."""
        ledger = self._state.ledger
        if ledger is None:
            return (why, "there is no privacy_engine: nothing bounds what training gave away")
        return (why, *ledger.reasons)

    # --- what is required of the model --------------------------------------------------------

    def _require_fitting_model(self) -> None:
        """Raise where the model or its ledger cannot take steps of this method."""
        self._state.require_chargeable(self._goal.rules)
        if not isinstance(self._goal, Target | Burst | StepsAtDelta):
            return
        if self._goal.certificate is not None:
            require_plain_descent(self._goal.certificate, self._state.optimizer)
        if self._goal.rules.own_constants:
            require_all_trainable(self._state.module)

    def _require_moving(self, plan: UnlearningPlan) -> None:
        """Raise where the plan's steps would leave the model where it is."""
        method, kernel = METHOD[plan.method], self._state.kernel
        if plan.steps == 0 or method.retrains or method.own_constants:
            return
        noise = None
        if kernel is not None and method.noisy:
            share = kernel.expected_batch_size if kernel.loss_reduction == "mean" else 1
            noise = kernel.noise_multiplier * kernel.max_grad_norm / share or None
        require_moving_steps(self._state.optimizer, noise_std=noise)


def mean_log_loss_of(state: TrainedState, rows: IntArray, *, order: float) -> float:
    """Return the mean over some rows of the log of their privacy losses.

    Raises:
        ValueError: No privacy_engine, an order the ledger does not have, losses of 0 or inf.
    """
    ledger = state.ledger
    if ledger is None:
        raise ValueError("Expected privacy_engine for privacy losses, got None. Pass it.")
    return mean_log_loss(ledger.rdp(rows), orders=ledger.orders, order=order)
