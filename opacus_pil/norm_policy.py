"""What one training step charges each instance: the policies that turn norms into sensitivities.

Here captured norms meet the accountant, as plain arrays. Knows no optimizer, loader or engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _validate as check
from ._validate import FloatArray, IntArray
from .accounting import PerInstanceAccountant
from .capture.recorder import Fact, StepRecord
from .capture.sweep import Sweep
from .errors import LedgerError, UnsupportedError
from .training.evidence import BEST, Verdict, joined, judged
from .training.probe import explained

NORM_POLICIES = ("worst_case", "last_seen", "refresh", "full", "capped", "participation")

# Float32 norms err by a few units in the last place; charged sensitivities are raised by as many.
_ROUNDING_STEPS = 16
# Norms of the same batch by two exact methods agree far better than this in float32.
_SAME_NORM = 1e-3


def checked_policy(
    norm_policy: str, *, refresh_every: int | None, caps: object | None, budget: object | None
) -> tuple[str, int | None]:
    """Return the policy and its refresh interval, or raise if its arguments do not fit it."""
    policy = check.choice("norm_policy", norm_policy, NORM_POLICIES)
    if (policy == "refresh") != (refresh_every is not None):
        raise ValueError(
            f"Expected refresh_every with norm_policy='refresh' only, got {refresh_every=} with "
            f"{norm_policy=}. Pass both or neither."
        )
    given = [n for n, v in (("caps", caps), ("budget", budget)) if v is not None]
    if (policy == "capped") != bool(given):
        raise ValueError(
            f"Expected caps or budget with norm_policy='capped' only, got "
            f"{' and '.join(given) or 'none'} with {norm_policy=}. Pass them together."
        )
    if policy == "full":
        return policy, 1
    if refresh_every is not None:
        refresh_every = check.integer("refresh_every", refresh_every, low=1)
    return policy, refresh_every


def raised(values: FloatArray, *, rounding: float) -> FloatArray:
    """Raise sensitivities by a few rounding errors, to at most 1; exact zeros stay zero."""
    return np.minimum(values * (1.0 + _ROUNDING_STEPS * rounding), 1.0)


def _differing(record: StepRecord, swept: FloatArray, ran: FloatArray) -> Fact | None:
    """Say how norms in a step are not those of a full pass, each row's by itself; None: they are.

    Args:
        swept: Shape (instances,), of the full pass.
        ran: Shape (batch,), of the step. Whose is whose matters where it is known.
    """
    if record.drawn is None or len(ran) != len(record.drawn):
        return None
    ordered = record.indices is not None
    swept = swept[record.indices if ordered else record.drawn]
    ran, swept = (ran, swept) if ordered else (np.sort(ran), np.sort(swept))
    tolerance = max(_SAME_NORM, _ROUNDING_STEPS * record.rounding)
    with np.errstate(invalid="ignore"):
        same = (swept == ran) | (
            np.abs(swept - ran) <= tolerance * (np.abs(ran) + record.max_grad_norm)
        )
    differ = np.isfinite(ran) & ~same
    if not differ.any():
        return None
    return Fact(*explained(ran[differ], swept[differ], tolerance=tolerance))


@dataclass(frozen=True)
class Step:
    """One noisy step, ready to be charged.

    Attributes:
        record: Rows, norms and clip bound of the step.
        verdict: What may be claimed for it, and whether it is charged as usual.
        noise_multiplier: Noise std on the gradient sum / the most that one row moves it by.
        sample_rate: Probability that an instance was drawn.
        measure: Runs a full pass at the current parameters.
        random_forward: Says whether the training's forward pass is random.
        released_count: Shift of a count that adaptive clipping releases at this step, which
            every drawn instance moves by 1: 1 / its noise std, in units of the gradient noise.
    """

    record: StepRecord
    verdict: Verdict
    noise_multiplier: float
    sample_rate: float
    measure: Callable[[], Sweep]
    random_forward: Callable[[], bool]
    released_count: float = 0.0


class Charger:
    """Charges a PerInstanceAccountant once per noisy step, by one norm policy.

    Guarantee: the label of every charge is at most what `training/evidence.py` leaves of the
        policy's best, given what was seen of the step.

    Attributes:
        findings: Code of a fact -> number of steps with it.
        unbounded: Whether a gradient was not finite, so that no ε holds for the worst case.
    """

    def __init__(
        self, accountant: PerInstanceAccountant, *, norm_policy: str, refresh_every: int | None
    ) -> None:
        self.accountant = accountant
        self.norm_policy = norm_policy
        self.refresh_every = refresh_every
        self.findings: dict[str, int] = {}
        self.unbounded = False
        self.largest_norm = 0.0  # of any gradient that was clipped
        self._norms: FloatArray | None = None  # last known per instance; inf: never seen
        self._rounding = 0.0
        self._max_grad_norm = 0.0  # clip bound that the accountant's levels are in units of
        self._since_refresh = 0
        self._caps_changed = False
        self._released_count = 0.0
        self.update = ""  # how a noisy gradient becomes a step; see `note_update`
        self._warned: set[str] = set()

    @property
    def claims_as(self) -> str:
        """The policy by whose rules labels are judged: a full pass at every step is "full"."""
        return "full" if self.refresh_every == 1 else self.norm_policy

    @property
    def moment(self) -> int:
        """Number of charges that budgets were tested after; without budgets nothing depends on it.

        A step of another training on this ledger spends what this one's caps were found from.
        """
        return self.accountant.steps if self.accountant.budgeted else 0

    def require_enforced(self, step: Step) -> None:
        """Raise where caps or budgets would not hold for a step.

        Raises:
            UnsupportedError: Names what breaks them. Nothing was charged.
        """
        if self.norm_policy == "capped" and step.verdict.broken:
            raise UnsupportedError(
                "Expected a step that caps and budgets hold for, got one where they do not: "
                f"{step.verdict.broken}. The step was not made: the model is as it was."
            )

    def charge(self, step: Step) -> None:
        """Charge everyone for one step."""
        record, verdict = step.record, step.verdict
        self._rounding = max(self._rounding, record.rounding)
        self._released_count = step.released_count
        finite = record.norms[np.isfinite(record.norms)]
        self.largest_norm = max(self.largest_norm, float(finite.max(initial=0.0)))
        changes = self._policy_facts()
        if changes:
            verdict = joined(self.claims_as, verdict, changes)
        if verdict.unbounded:
            self._charge_infinitely(verdict)
            return
        if self.norm_policy == "capped":
            self._charge_levels(step, verdict)
        elif self.norm_policy == "worst_case":
            if self._norms is not None:  # a fork of an engine that had moved the levels
                top = self.accountant.levels[-1]
                self.accountant.observe_all(np.full(self.accountant.num_instances, top))
            if verdict.unamplified or max(record.draws, record.copies) > 1:
                self._charge_top(step, verdict)
            else:
                self._charge_levels(step, verdict)
        else:
            self._follow_clip_bound(record.max_grad_norm)
            if self.norm_policy == "participation":
                self._participate(step, verdict)
            else:
                verdict = self._charge_measured(step, verdict)
        self._note(verdict)
        self._lose(record)

    def find_later(self, fact: Fact) -> None:
        """Lower the label of the steps that were charged, by what showed after them.

        Raises:
            UnsupportedError: Caps or budgets would not hold. The model has not moved.
        """
        verdict = judged(self.claims_as, [fact])
        if self.norm_policy == "capped" and verdict.broken:
            raise UnsupportedError(
                "Expected a step that caps and budgets hold for, got one where they do not: "
                f"{verdict.broken}. It was charged and not made: the model is as it was."
            )
        for reason in verdict.reasons:
            if reason != BEST[self.claims_as][1]:
                self.accountant.weaken(verdict.label, reason=reason)
        self._note(verdict)

    def charge_unnoised(self, verdict: Verdict) -> None:
        """Charge a step of the plain optimizer by gradients without noise: infinitely.

        Raises:
            UnsupportedError: Caps or budgets are enforced. The model has not moved.
        """
        if self.norm_policy == "capped":
            raise UnsupportedError(
                "Expected steps of the private optimizer under caps, got one of the plain "
                f"optimizer: {verdict.broken}. Step with what make_private returned."
            )
        self._charge_infinitely(verdict)

    def set_caps(self, caps: FloatArray) -> None:
        """Charge at other caps from the next step on; they must be enforced from there on too."""
        self.accountant.set_caps(caps)
        # Under a budget caps need only be known before each step; without, before the run.
        self._caps_changed = self.accountant.steps > 0 and not self.accountant.budgeted

    def observe(self, found: Sweep, *, max_grad_norm: float) -> None:
        """Set every measured instance's level from a full pass."""
        self._max_grad_norm = max_grad_norm
        self._rounding = max(self._rounding, float(np.finfo(np.float32).eps))
        self._known()[found.indices] = found.norms
        self._set_levels()

    def note_update(self, update: str) -> None:
        """Remember how this step moves the model; "varied" once two steps did it differently.

        Certificates of the last model count every step at the settings of the last one.
        """
        if self.accountant.steps == 0 or self.update == "anew":
            self.update = update
        elif self.update != update:
            self.update = "varied"

    def note_new_model(self) -> None:
        """A model is trained from the start: what moved the old one is over."""
        self.update = "anew"

    def forget(self, rows: IntArray) -> None:
        """Charge these rows no more, and drop what was measured of them."""
        self.accountant.forget(rows)
        if self._norms is not None:
            self._norms[rows] = np.inf

    def active_rows(self) -> IntArray:
        """Return the rows still in the training set."""
        return np.flatnonzero(self.accountant.active)

    # --- inside -------------------------------------------------------------------------------

    def _known(self) -> FloatArray:
        if self._norms is None:
            self._norms = np.full(self.accountant.num_instances, np.inf)
        return self._norms

    def _sensitivities(self, norms: FloatArray) -> FloatArray:
        bound = self._max_grad_norm
        gradient = raised(np.minimum(norms, bound) / bound, rounding=self._rounding)
        if not self._released_count:
            return gradient
        # Gradient and count are released with independent noise: one vector, one joint shift.
        joint = np.hypot(gradient, self._released_count)
        return np.minimum(joint, self.accountant.levels[-1])

    def _policy_facts(self) -> list[Fact]:
        """Return what this policy's own history takes away from the label."""
        facts = []
        if self.norm_policy == "capped" and self._caps_changed:
            facts.append(Fact("caps_changed"))
        if self.norm_policy == "worst_case" and self._norms is not None:
            facts.append(Fact("levels_changed"))
        return facts

    def _charge_levels(self, step: Step, verdict: Verdict) -> None:
        """Charge everyone at the level they stand on: caps, or the worst case."""
        self.accountant.step(
            indices=[], sensitivities=[], noise_multiplier=step.noise_multiplier,
            sample_rate=step.sample_rate, guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip

    def _charge_top(self, step: Step, verdict: Verdict) -> None:
        """Charge everyone as for the largest gradient: whose rows these are is not known."""
        self.accountant.step(
            indices=None, sensitivities=None, noise_multiplier=step.noise_multiplier,
            sample_rate=step.sample_rate, guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip

    def _charge_infinitely(self, verdict: Verdict) -> None:
        self.accountant.step(
            indices=None, sensitivities=None, noise_multiplier=0.0, sample_rate=1.0,
            guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip
        self._note(verdict)

    def _charge_measured(self, step: Step, verdict: Verdict) -> Verdict:
        """Charge everyone at the norm that was measured or seen last; return the label and why."""
        record = step.record
        refreshed = False
        if self.refresh_every is not None:
            refreshed = self._since_refresh % self.refresh_every == 0
            if refreshed:
                facts = self._refresh(record, step)
                verdict = joined(self.claims_as, verdict, facts) if facts else verdict
            self._since_refresh += 1
        if record.indices is None:
            self._warn_unattributed(record)
            self._charge_top(step, verdict)
        elif refreshed:
            self._charge_levels(step, verdict)  # just measured
        else:
            rows, norms = self._charged(record)
            self._known()[rows] = norms
            self.accountant.step(
                indices=rows, sensitivities=self._sensitivities(norms),
                noise_multiplier=step.noise_multiplier, sample_rate=step.sample_rate,
                guarantee=verdict.label, reasons=verdict.reasons,
            )  # fmt: skip
        return verdict

    def _participate(self, step: Step, verdict: Verdict) -> None:
        """Charge the batch's rows only: fixed batches are not amplified by sampling."""
        record, rows, sensitivities = step.record, None, None
        if record.indices is None:
            self._warn_unattributed(record)
        else:
            rows, norms = self._charged(record)
            self._known()[rows] = norms
            sensitivities = self._sensitivities(norms)
        self.accountant.participate(
            indices=rows, sensitivities=sensitivities, noise_multiplier=step.noise_multiplier,
            guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip

    def _charged(self, record: StepRecord) -> tuple[IntArray, FloatArray]:
        """Return the rows of a step that are charged, and norms; the forgotten pay nothing more."""
        assert record.indices is not None
        finite = np.where(np.isfinite(record.norms), record.norms, np.inf)
        here = ~self.accountant.forgotten[record.indices]
        return record.indices[here], finite[here]

    def _lose(self, record: StepRecord) -> None:
        """Charge whoever had a gradient that is not finite everything; from here on ε is too."""
        if record.unfinite is None or not record.unfinite.any():
            return
        count = int(record.unfinite.sum())
        rows = None if record.indices is None else record.indices[record.unfinite]
        self.accountant.lose_everything(rows)
        self.unbounded = True
        who = "every instance" if rows is None else f"{len(rows)} (first: instance {int(rows[0])})"
        self.warn(
            "not finite",
            f"{count} of {len(record.norms)} per-sample gradients were not finite, which no clip "
            f"bounds: from now on get_epsilon is infinite, and so is the loss of {who}. Training "
            "goes on; check its loss.",
        )

    def _note(self, verdict: Verdict) -> None:
        """Count what was found, and warn once where it takes a label away."""
        for code in verdict.codes:
            self.findings[code] = self.findings.get(code, 0) + 1
        best, _ = BEST[self.claims_as]
        if best != verdict.label and not verdict.chosen:
            self.warn(
                f"label {verdict.label}",
                f"Per-instance losses of this training are '{verdict.label}' from now on, not "
                f"'{best}': {'; '.join(verdict.reasons)}.",
            )

    def _warn_unattributed(self, record: StepRecord) -> None:
        self.warn(
            "unattributed",
            "A step could not be matched with rows of the data set "
            f"({record.mismatch}): every instance is charged the worst case for it. "
            "See per_instance.unattributed_steps.",
        )

    def _set_levels(self) -> None:
        self.accountant.observe_all(self._sensitivities(self._known()))

    def _follow_clip_bound(self, max_grad_norm: float) -> None:
        """Levels are in units of the clip bound: restate them when a schedule changes it."""
        changed = self._max_grad_norm not in (0.0, max_grad_norm)
        self._max_grad_norm = max_grad_norm
        if changed and self._norms is not None and self.norm_policy != "participation":
            self._set_levels()

    def _refresh(self, record: StepRecord, step: Step) -> list[Fact]:
        """Measure everyone at the current parameters; return what takes away from the claim.

        Where that fails training goes on, as with Opacus, and everyone is charged the clip bound.
        """
        facts: list[Fact] = []
        known = self._known()
        try:
            found = step.measure()
        except Exception as error:  # a foreign model, loss or data set may fail in any way
            words = str(error).splitlines()[0] if str(error) else "no message"
            fact = Fact("not_measured", f"{type(error).__name__}: {words[:200]}")
            known[:] = np.inf
            self._set_levels()
            self.warn("criterion", f"A full pass failed ({fact.detail}): everyone is charged the "
                      "clip bound. Name the loss that the loop trains with (criterion= or "
                      "loss_of=), and the loader's own collate_fn.")  # fmt: skip
            return [fact]
        known[found.indices] = found.norms
        random = step.random_forward() or not found.deterministic
        if random:
            facts.append(Fact("random_gradient"))
        else:
            differs = _differing(record, known, record.norms)
            if differs is None and record.whole is not None:  # clipped layers hide a factor
                whole = np.full(len(known), np.inf)
                whole[found.indices] = found.whole
                differs = _differing(record, whole, record.whole)
            if differs is not None:
                facts.append(differs)
                self.warn(
                    "criterion",
                    "The full pass finds other gradient norms than training did for the same "
                    f"instances ({differs.detail or differs.code.replace('_', ' ')}): refreshed "
                    "norms are estimates. Name the loss that the loop trains with (criterion= or "
                    "loss_of=).",
                )
        if record.indices is not None:
            finite = np.where(np.isfinite(record.norms), record.norms, np.inf)
            known[record.indices] = np.maximum(known[record.indices], finite)
        self._set_levels()
        return facts

    def warn(self, kind: str, message: str) -> None:
        """Warn once per kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # --- saved form ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything later charges depend on: arrays and plain values."""
        return {
            "ledger": self.accountant.state_dict(),
            "norms": None if self._norms is None else self._norms.copy(),
            "rounding": self._rounding,
            "max_grad_norm": self._max_grad_norm,
            "since_refresh": self._since_refresh,
            "caps_changed": self._caps_changed,
            "released_count": self._released_count,
            "update": self.update,
            "findings": dict(self.findings),
            "unbounded": self.unbounded,
            "largest_norm": self.largest_norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            LedgerError: It does not fit these instances. Nothing is changed.
        """
        norms = state["norms"]
        if norms is not None and np.shape(norms) != (self.accountant.num_instances,):
            raise LedgerError(
                f"Expected norms of {self.accountant.num_instances} instances, got shape "
                f"{np.shape(norms)}. Load the ledger of the same data set."
            )
        self.accountant.load_state_dict(state["ledger"])
        self._norms = None if norms is None else np.array(norms, dtype=np.float64)
        self._rounding = float(state["rounding"])
        self._max_grad_norm = float(state["max_grad_norm"])
        self._since_refresh = int(state["since_refresh"])
        self._caps_changed = bool(state["caps_changed"])
        self._released_count = float(state["released_count"])
        self.update = str(state.get("update", ""))  # "": not known, where there are steps
        if "findings" in state:
            self.findings = {str(code): int(n) for code, n in state["findings"].items()}
        else:  # a release that did not look at what ran
            steps = self.accountant.steps
            self.findings = {"earlier_release": steps} if steps else {}
        self.unbounded = bool(state.get("unbounded", False))
        self.largest_norm = float(state.get("largest_norm", np.inf))
