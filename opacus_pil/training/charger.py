"""What one training step charges each instance: the policies that turn norms into sensitivities.

Here captured norms meet the accountant, as plain arrays. Knows no optimizer, loader or engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._validate import FloatArray, IntArray
from ..accounting import PerInstanceAccountant
from ..capture.recorder import Fact, StepRecord
from ..capture.sweep import Sweep
from ..errors import LedgerError, UnsupportedError
from .evidence import BEST
from .full_pass import attempted, differing
from .norms import KnownNorms
from .step import Policy, Step
from .verdict import Verdict, joined, judged


class Charger:
    """Charges a PerInstanceAccountant once per noisy step, by one norm policy.

    Guarantee: the label of every charge is at most what `training/evidence.py` leaves of the
        policy's best, given what was seen of the step.

    Attributes:
        findings: Code of a fact -> number of steps with it.
        unbounded: Whether a gradient was not finite, so that no ε holds for the worst case.
    """

    def __init__(self, accountant: PerInstanceAccountant, *, policy: Policy) -> None:
        self.accountant = accountant
        self.policy = policy
        self.norms = KnownNorms(accountant.num_instances)
        self.findings: dict[str, int] = {}
        self.unbounded = False
        self.largest_norm = 0.0  # of any gradient that was clipped
        self.caps_changed = False
        self.update = ""  # how a noisy gradient becomes a step; see `note_update`
        self._since_refresh = 0
        self._warned: set[str] = set()

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
        if self.policy.enforced and step.verdict.broken:
            raise UnsupportedError(
                "Expected a step that caps and budgets hold for, got one where they do not: "
                f"{step.verdict.broken}. The step was not made: the model is as it was."
            )

    def charge(self, step: Step) -> None:
        """Charge everyone for one step."""
        record, verdict = step.record, step.verdict
        self.norms.rounding = max(self.norms.rounding, record.rounding)
        self.norms.released_count = step.released_count
        finite = record.norms[np.isfinite(record.norms)]
        self.largest_norm = max(self.largest_norm, float(finite.max(initial=0.0)))
        changes = self.policy.history(self)
        if changes:
            verdict = joined(self.policy.judged_as, verdict, changes)
        if verdict.unbounded:
            self._charge_infinitely(verdict)
            return
        self._note(self.policy.charge(self, step, verdict))
        self._lose(record)

    def find_later(self, fact: Fact) -> None:
        """Lower the label of the steps that were charged, by what showed after them.

        Raises:
            UnsupportedError: Caps or budgets would not hold. The model has not moved.
        """
        verdict = judged(self.policy.judged_as, [fact])
        if self.policy.enforced and verdict.broken:
            raise UnsupportedError(
                "Expected a step that caps and budgets hold for, got one where they do not: "
                f"{verdict.broken}. It was charged and not made: the model is as it was."
            )
        for reason in verdict.reasons:
            if reason != BEST[self.policy.judged_as][1]:
                self.accountant.weaken(verdict.label, reason=reason)
        self._note(verdict)

    def charge_unnoised(self, verdict: Verdict) -> None:
        """Charge a step of the plain optimizer by gradients without noise: infinitely.

        Raises:
            UnsupportedError: Caps or budgets are enforced. The model has not moved.
        """
        if self.policy.enforced:
            raise UnsupportedError(
                "Expected steps of the private optimizer under caps, got one of the plain "
                f"optimizer: {verdict.broken}. Step with what make_private returned."
            )
        self._charge_infinitely(verdict)

    def set_caps(self, caps: FloatArray) -> None:
        """Charge at other caps from the next step on; they must be enforced from there on too."""
        self.accountant.set_caps(caps)
        # Under a budget caps need only be known before each step; without, before the run.
        self.caps_changed = self.accountant.steps > 0 and not self.accountant.budgeted

    def observe(self, found: Sweep, *, max_grad_norm: float) -> None:
        """Set every measured instance's level from a full pass."""
        self.norms.max_grad_norm = max_grad_norm
        self.norms.rounding = max(self.norms.rounding, float(np.finfo(np.float32).eps))
        self.norms.all()[found.indices] = found.norms
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
        self.norms.drop(rows)

    def active_rows(self) -> IntArray:
        """Return the rows still in the training set."""
        return np.flatnonzero(self.accountant.active)

    # --- how policies charge ------------------------------------------------------------------

    def at_levels(self, step: Step, verdict: Verdict) -> None:
        """Charge everyone at the level they stand on: caps, or the worst case."""
        self.accountant.step(
            indices=[], sensitivities=[], noise_multiplier=step.noise_multiplier,
            sample_rate=step.sample_rate, guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip

    def at_top(self, step: Step, verdict: Verdict) -> None:
        """Charge everyone as for the largest gradient: whose rows these are is not known."""
        self.accountant.step(
            indices=None, sensitivities=None, noise_multiplier=step.noise_multiplier,
            sample_rate=step.sample_rate, guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip

    def at_norms(self, step: Step, verdict: Verdict) -> Verdict:
        """Charge everyone at the norm that was measured or seen last; return label and why."""
        record, every = step.record, self.policy.refresh_every
        self.follow_clip_bound(record.max_grad_norm)
        measured = every is not None and self._since_refresh % every == 0
        if measured:
            facts = self._refresh(record, step)
            verdict = joined(self.policy.judged_as, verdict, facts) if facts else verdict
        self._since_refresh += every is not None
        if record.indices is None:
            self._warn_unattributed(record)
            self.at_top(step, verdict)
        elif measured:
            self.at_levels(step, verdict)
        else:
            rows, sensitivities = self._seen(record)
            self.accountant.step(
                indices=rows, sensitivities=sensitivities,
                noise_multiplier=step.noise_multiplier, sample_rate=step.sample_rate,
                guarantee=verdict.label, reasons=verdict.reasons,
            )  # fmt: skip
        return verdict

    def participants(self, step: Step, verdict: Verdict) -> None:
        """Charge the batch's rows only: fixed batches are not amplified by sampling."""
        record = step.record
        self.norms.max_grad_norm = record.max_grad_norm  # of this batch alone: no level stays
        rows, sensitivities = None, None
        if record.indices is None:
            self._warn_unattributed(record)
        else:
            rows, sensitivities = self._seen(record)
        self.accountant.participate(
            indices=rows,
            sensitivities=sensitivities,
            noise_multiplier=step.noise_multiplier, guarantee=verdict.label,
            reasons=verdict.reasons,
        )  # fmt: skip

    def follow_clip_bound(self, max_grad_norm: float) -> None:
        """Levels are in units of the clip bound: restate them when a schedule changes it."""
        changed = self.norms.max_grad_norm not in (0.0, max_grad_norm)
        self.norms.max_grad_norm = max_grad_norm
        if changed and self.norms.seen is not None:
            self._set_levels()

    def warn(self, kind: str, message: str) -> None:
        """Warn once per kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # --- inside -------------------------------------------------------------------------------

    def _seen(self, record: StepRecord) -> tuple[IntArray, FloatArray]:
        """Return the rows of a batch that are charged, and their sensitivities; note their norms.

        The forgotten pay nothing more.
        """
        assert record.indices is not None
        rows, norms = record.indices, record.norms
        if self.accountant.num_forgotten:
            here = ~self.accountant.forgotten[rows]
            rows, norms = rows[here], norms[here]
        return rows, self._sensitivities(self.norms.note(rows, norms))

    def _sensitivities(self, norms: FloatArray) -> FloatArray:
        return self.norms.sensitivities(norms, top=float(self.accountant.levels[-1]))

    def _set_levels(self) -> None:
        self.accountant.observe_all(self._sensitivities(self.norms.all()))

    def _refresh(self, record: StepRecord, step: Step) -> list[Fact]:
        """Measure everyone at the current parameters; return what takes away from the claim.

        Where that fails training goes on, as with Opacus, and everyone is charged the clip bound.
        """
        known, found = self.norms.all(), attempted(step.measure)
        if isinstance(found, Fact):
            known[:] = np.inf
            self._set_levels()
            self.warn("criterion", f"A full pass failed ({found.detail}): everyone is charged the "
                      "clip bound. Name the loss that the loop trains with (criterion= or "
                      "loss_of=), and the loader's own collate_fn.")  # fmt: skip
            return [found]
        known[found.indices] = found.norms
        fact = None
        if step.random_forward() or not found.deterministic:
            fact = Fact("random_gradient")
        else:
            fact = differing(record, found, known)
            if fact is not None:
                self.warn(
                    "criterion",
                    "The full pass finds other gradient norms than training did for the same "
                    f"instances ({fact.detail or fact.code.replace('_', ' ')}): refreshed norms "
                    "are estimates. Name the loss that the loop trains with (criterion= or "
                    "loss_of=).",
                )
        if record.indices is not None:
            before = known[record.indices]
            known[record.indices] = np.maximum(
                before, self.norms.note(record.indices, record.norms)
            )
        self._set_levels()
        return [] if fact is None else [fact]

    def _charge_infinitely(self, verdict: Verdict) -> None:
        self.accountant.step(
            indices=None, sensitivities=None, noise_multiplier=0.0, sample_rate=1.0,
            guarantee=verdict.label, reasons=verdict.reasons,
        )  # fmt: skip
        self._note(verdict)

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
        best, _ = BEST[self.policy.judged_as]
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

    # --- saved form ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything later charges depend on: arrays and plain values."""
        norms = self.norms
        return {
            "ledger": self.accountant.state_dict(),
            "norms": None if norms.seen is None else norms.seen.copy(),
            "rounding": norms.rounding,
            "max_grad_norm": norms.max_grad_norm,
            "since_refresh": self._since_refresh,
            "caps_changed": self.caps_changed,
            "released_count": norms.released_count,
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
        norms, size = state["norms"], self.accountant.num_instances
        if norms is not None and np.shape(norms) != (size,):
            raise LedgerError(
                f"Expected norms of {size} instances, got shape {np.shape(norms)}. Load the ledger "
                "of the same data set."
            )
        self.accountant.load_state_dict(state["ledger"])
        self.norms.seen = None if norms is None else np.array(norms, dtype=np.float64)
        self.norms.rounding = float(state["rounding"])
        self.norms.max_grad_norm = float(state["max_grad_norm"])
        self.norms.released_count = float(state["released_count"])
        self._since_refresh = int(state["since_refresh"])
        self.caps_changed = bool(state["caps_changed"])
        self.update = str(state.get("update", ""))  # "": not known, where there are steps
        if "findings" in state:
            self.findings = {str(code): int(n) for code, n in state["findings"].items()}
        else:  # a release that did not look at what ran
            steps = self.accountant.steps
            self.findings = {"earlier_release": steps} if steps else {}
        self.unbounded = bool(state.get("unbounded", False))
        self.largest_norm = float(state.get("largest_norm", np.inf))
