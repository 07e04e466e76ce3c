"""What a watched script's trainings claimed, what was measured, and the verdict.

Knows records of both; no optimizer and no torch. The verdict looks at bounds and checks that are
valid whatever the data; family-wise over all trainings and tests a correct script is a red flag
with probability at most `level`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.stats import norm

from ..accounting.shown import rounded_up
from .canary_record import CanaryEvidence, CanaryRecord, evidence
from .claim import Claim
from .comparison import AGREES, DIFFERS, UNKNOWN, VIOLATES, Check, std_check
from .conformance import TESTS, Conformance, conformance
from .lower_bound import plain
from .measurements import Measurements

RED, CONSISTENT, POWERLESS = "red flag", "consistent", "no power"


@dataclass(frozen=True)
class TrainingCheck:
    """One watched training.

    Attributes:
        claim: Runs of the ledger at δ, (noise_multiplier, sample_rate, steps); empty: none.
        epsilon: ε of the claim by privacy loss distributions; inf where nothing is claimed.
        delta: δ of the claim.
        evidence: What gradient canaries say; None with `why_no_canaries`.
        why_no_canaries: Why there were none.
        conformance: What ran beside what was accounted.
        verdict: "red flag", "consistent" or "no power".
        reasons: Why, a half sentence each.
        optimizer, mode: Class of the optimizer; how per-sample gradients were formed.
        seconds: Of the whole step calls, of which `watching` were spent on canaries and measuring;
            and of the analysis.
    """

    claim: tuple[tuple[float, float, int], ...]
    epsilon: float
    delta: float
    evidence: CanaryEvidence | None
    why_no_canaries: str
    conformance: Conformance
    verdict: str
    reasons: tuple[str, ...]
    optimizer: str
    mode: str
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return plain(vars(self))

    def __str__(self) -> str:
        """Say what was claimed, measured and concluded."""
        runs = ", ".join(f"{n} steps of noise {z:g} at rate {q:.4g}" for z, q, n in self.claim[:4])
        more = f" and {len(self.claim) - 4} more runs" if len(self.claim) > 4 else ""
        counted = (runs or "nothing") + more
        lines = [
            f"{self.optimizer} ({self.mode})",
            f"  claimed    ε = {rounded_up(self.epsilon, digits=4)} at "
            f"δ = {rounded_up(self.delta)} ({counted})",
        ]
        if self.evidence is None:
            lines.append(f"  canaries   none: {self.why_no_canaries}")
        else:
            canaries = self.evidence
            lines.append(
                f"  canaries   {canaries.canaries} and {canaries.controls} controls, "
                f"{canaries.steps} steps; p-value of the claim {canaries.refuted_p:.2g}"
            )
            lines += [f"  lower      {bound}" for bound in canaries.lower]
        lines += [f"  {check}" for check in self.conformance.checks]
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return "\n".join([*lines, f"  verdict    {self.verdict.upper()}{why}"])


@dataclass(frozen=True)
class ScriptCheck:
    """All trainings of one watched process.

    Attributes:
        trainings: One for each private optimizer that made a step.
        level: Probability that a correct script is a red flag, at most, over everything.
        printed: Lines of the script's own output that speak of ε.
        notes: What else was seen.
        seconds: Of the script, and of the analysis.
    """

    trainings: tuple[TrainingCheck, ...]
    level: float
    printed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The worst of the trainings' verdicts; "no power" where none was seen."""
        found = [training.verdict for training in self.trainings]
        for verdict in (RED, POWERLESS, CONSISTENT):
            if verdict in found:
                return verdict
        return POWERLESS

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, of all trainings with that verdict."""
        found = [r for t in self.trainings if t.verdict == self.verdict for r in t.reasons]
        return tuple(found or self.notes)

    def to_json(self) -> dict[str, Any]:
        """Return plain types, the verdict included."""
        return plain({**vars(self), "verdict": self.verdict, "reasons": self.reasons})

    def __str__(self) -> str:
        """Say everything, the verdict last."""
        lines = [str(training) for training in self.trainings]
        if self.printed:
            lines += ["the script printed", *(f"  | {line}" for line in self.printed)]
        lines += [f"note: {note}" for note in self.notes]
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        lines.append(
            f"{self.verdict.upper()}{why}\n(a correct script is a red flag once in "
            f"{round(1 / self.level)} at most; nothing here proves privacy)"
        )
        return "\n".join(lines)


def judge(
    measured: Measurements,
    *,
    runs: Sequence[tuple[float, float, int]] | None,
    seen_steps: int,
    record: CanaryRecord | None,
    why_no_canaries: str,
    delta: float,
    level: float,
    confidence: float,
    trainings: int,
    names: tuple[str, str],
    bits: str = "own",
    seconds: dict[str, float] | None = None,
) -> TrainingCheck:
    """Put together what one training claimed and what was measured.

    Args:
        measured: Of its steps.
        runs: What the ledger counted; None: nobody counts.
        seen_steps: Steps seen of all optimizers that this ledger counts.
        record: What the canaries saw; None: there were none.
        why_no_canaries: Why there were none.
        delta: δ of the claim.
        level: Family-wise, over all trainings.
        confidence: Of each lower bound.
        trainings: How many share the level.
        names: Class of the optimizer, and how per-sample gradients were formed.
        bits: Which generator the canaries' noise came from.
        seconds: Measured times.
    """
    share = level / max(trainings, 1)
    each = share / len(TESTS)
    claim = None if runs is None else Claim(tuple(runs), delta=delta)
    rate = _mean_rate(claim)
    found = conformance(
        measured,
        sample_rate=rate,
        ledger_steps=None if claim is None else claim.steps,
        seen_steps=seen_steps,
        level=share,
    )
    proof = None
    if claim is None:
        why_no_canaries = why_no_canaries or "no accountant counts this optimizer's steps"
    elif not claim.bounded:
        why_no_canaries = why_no_canaries or "the ledger has steps without noise: ε = inf"
    elif record is not None and record.steps > 0:
        proof = evidence(
            record, claim=claim, level=1.0 - confidence, refutation_level=each, bits=bits
        )
    elif record is not None and record.faults > 0:
        why_no_canaries = why_no_canaries or "their gradients were not finite at any step"
    if proof is not None and record is not None:
        found = Conformance((*found.checks, *_of_canaries(record, proof, each)), share)
    reasons = [f"{check.what}: {check.reason}" for check in found.violations]
    if claim is None:
        reasons.append("no accountant counts the steps, so nothing is claimed")
    elif not claim.bounded:
        reasons.append("the ledger itself says ε = inf: it has steps without noise")
    verdict = RED if reasons else CONSISTENT
    if not reasons:
        seen = all(found.measured(n) for n in ("noise", "rate", "steps", "clip"))
        if not (seen or (proof is not None and proof.powerful)):
            verdict = POWERLESS
            reasons = [f"{c.what}: {c.reason}" for c in found.checks if c.state == UNKNOWN]
    return TrainingCheck(
        claim=() if claim is None else claim.runs,
        epsilon=math.inf if claim is None else claim.epsilon,
        delta=delta,
        evidence=proof,
        why_no_canaries="" if proof is not None else why_no_canaries,
        conformance=found,
        verdict=verdict,
        reasons=tuple(reasons),
        optimizer=names[0],
        mode=names[1],
        seconds=dict(seconds or {}),
    )


def _mean_rate(claim: Claim | None) -> float | None:
    if claim is None or not claim.steps:
        return None
    return sum(q * n for _, q, n in claim.runs) / claim.steps


def _of_canaries(record: CanaryRecord, proof: CanaryEvidence, each: float) -> tuple[Check, ...]:
    """The canaries' own tests, in the form of checks."""
    mean, low, high = proof.hit
    spread = math.sqrt(max(record.hit_noise, 1e-300)) / max(record.draws, 1)
    what = "a drawn canary's part in the sum / clip bound"
    if record.draws:
        p = min(2.0 * float(norm.sf(max(abs(mean - 1.0) - 1e-3, 0.0) / spread)), 1.0)
        state = AGREES if p >= each else VIOLATES if mean > 1.0 else DIFFERS
        why = "" if state == AGREES else f"a clipped gradient counts {mean:.3g} clip bounds"
        hits = Check("canary_hits", what, 1.0, mean, low, high, p, state, why)
    else:
        hits = Check("canary_hits", what, 1.0, state=UNKNOWN, reason="no canary was drawn")
    noise = std_check(
        "canary_noise", "noise std on canaries / accounted", squares=record.noise_squares,
        count=float(record.undrawn), each=each,
    )  # fmt: skip
    return (
        hits,
        noise,
        _refutation(
            "canary_membership", "p-value of the claim, whole run", proof.refuted_p, each,
            f"members are told from others with {proof.wrong} errors among {proof.canaries}: the "
            "claim is refuted",
        ),
        _refutation(
            "canary_steps", "p-value of the claim, single steps", proof.steps_p, each,
            "single draws stand out more than the accounted noise allows",
        ),
    )  # fmt: skip


def _refutation(name: str, what: str, p: float, each: float, reason: str) -> Check:
    bad = p < each
    return Check(name, what, None, p, None, None, p, VIOLATES if bad else AGREES,
                 reason if bad else "")  # fmt: skip
