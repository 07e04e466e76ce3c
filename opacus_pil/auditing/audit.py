"""audit: one call from a trained model to claim, upper and lower numbers, and a verdict.

Looks at what a training left: checkpoints, its data, rows that were held out at random or canaries
thrown before. Nobody watched it; where somebody did (`opacus-pil check`), pass what was seen.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy.typing as npt
from torch import nn

from .. import _validate as check
from .._validate import FloatArray
from ..accounting.shown import rounded_down
from ..capture.row_losses import LossOf
from ..evaluation.attack import attack_summary
from ..exposure import PerInstanceEpsilon
from ..replaying.described_run import sample_rate_of
from ..replaying.replay import replay
from ..replaying.row_norms import each_step
from ..replaying.saved_weights import SavedWeights, fit_weights
from ..replaying.trajectory import Trajectory, trajectories
from ..training.task import Task
from .audit_record import Audit
from .checked import CONSISTENT, POWERLESS, RED, ScriptCheck, TrainingCheck
from .claim import Claim
from .comparison import AGREES, UNKNOWN, Check
from .conformance import Conformance
from .exposed import most_exposed
from .membership_test import Tested, shares_of, tested
from .natural_canaries import CanarySplit, Shadow

_UNSEEN = "nobody watched the training; `opacus-pil check` measures it while it trains"


@check.known_keywords
def audit(
    make_model: Callable[[], nn.Module] | nn.Module,
    *,
    checkpoints: Any,
    dataset: Any,
    noise_multiplier: float | Sequence[float],
    max_grad_norm: float | Sequence[float],
    sample_rate: float | Sequence[float] | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    delta: float,
    criterion: Any = None,
    loss_of: LossOf | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    loss_reduction: str = "mean",
    held_out: Any = None,
    split: str | None = None,
    strata: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    canaries: CanarySplit | None = None,
    trained_at: float | None = None,
    shadows: Sequence[Shadow] = (),
    watched: TrainingCheck | ScriptCheck | None = None,
    instance_ids: npt.ArrayLike | None = None,
    held_out_ids: npt.ArrayLike | None = None,
    before_first: str = "worst_case",
    confidence: float = 0.95,
    level: float = 0.01,
    seed: int = 0,
    exposed: int = 5,
    per_record: bool = False,
    work_dir: str | os.PathLike[str] | None = None,
    chunk_size: int = 256,
    progress: bool = False,
) -> Audit:
    """Audit a model that was trained with Opacus.

    Guarantee: a correct training is a red flag with probability at most `level`, if the split was
        random as declared (or the canaries' coins were fair). "consistent" is no proof: it says
        that nothing was found by tests that could have found twice the claimed ε.

    Args:
        make_model: Builds the model that was trained, or the model.
        checkpoints: As in `replay`; the latest one is the model that is audited. Of several runs
            the first.
        dataset: Private training set; with canaries `canaries.dataset`.
        noise_multiplier: As accounted.
        max_grad_norm: As accounted.
        sample_rate: As accounted; or
        batch_size: From which Opacus's rate 1 / ceil(rows / batch size) follows.
        steps: Noisy steps; None: as the checkpoints' accountant says.
        delta: δ of the claim.
        criterion: The training's loss; or
        loss_of: loss_of(module, batch) -> one loss per row.
        collate_fn: As in training.
        loss_reduction: As in training.
        held_out: Rows that the same random split left out, and that nobody used: not for stopping,
            selection or tuning.
        split: How the split was made; "random" or nothing can be concluded.
        strata: Stratum of each row of `dataset` and of `held_out`, if the split was stratified.
        canaries: From `canary_split`, before training; then held_out is not needed.
        trained_at: When training began, if it ran in another process.
        shadows: Models trained on `canaries.again(...)`, for likelihood-ratio scores in place of
            losses; the loss must be a cross entropy. Their configuration has the keys
            noise_multiplier, max_grad_norm, sample_rate and steps.
        watched: What `opacus-pil check` or `watch` saw of this training.
        instance_ids: Of `dataset`.
        held_out_ids: Of `held_out`.
        before_first: As in `replay`, which says when "as_first" is of use.
        confidence: Of each lower bound, and of values over several runs.
        level: Of the verdict: probability that a correct training is a red flag, over all tests.
            Bounds that hold for any dependence refute slowly: at 0.01 some 3,000 pairs can see
            twice the claimed ε, at 0.001 some 10,000.
        seed: Public, of the matching of pairs; fix it before you look.
        exposed: Most exposed instances that get a tight ε.
        per_record: Keep scores and ε of single records in the result.
        work_dir: As in `replay`.
        chunk_size: Rows per forward pass.
        progress: Show bars.

    Returns:
        Audit.

    Raises:
        ValueError: A split that was not random, coins thrown after training, scores or shadows
            that do not match, checkpoints of another network or ledger; with its cure.
        LedgerError, UnsupportedError: As in `replay`.
        ImportError: The extras `audit` or `evaluation` are missing.

    Privacy: reads private data; with `per_record` it keeps them. A released audit is one more
        output that no ε covers.
    """
    clock = _Clock()
    check.real("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
    _require_design(held_out, split, canaries, shadows, trained_at)
    if (sample_rate is None) == (batch_size is None):
        raise ValueError("Expected sample_rate or batch_size, got both or none. Pass one.")
    rate = sample_rate if sample_rate is not None else sample_rate_of(len(dataset), batch_size or 0)
    task = Task(criterion, loss_of, collate_fn, loss_reduction)
    account = replay(
        checkpoints, module=make_model, dataset=dataset, criterion=criterion, loss_of=loss_of,
        collate_fn=collate_fn, loss_reduction=loss_reduction, noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm, sample_rate=rate, steps=steps, before_first=before_first,
        confidence=confidence, instance_ids=instance_ids, history=True, chunk_size=chunk_size,
        work_dir=work_dir, progress=progress,
    )  # fmt: skip
    clock.stop("upper")
    run = trajectories(checkpoints, steps=steps)[0]
    claim = Claim(_runs(noise_multiplier, rate, account.steps), delta=delta)
    spent = PerInstanceEpsilon.of(account, delta=delta, rows=None, norms=None)
    top = most_exposed(account, spent, count=check.integer("exposed", exposed, low=0))
    clock.stop("tight")
    saved = run.places[-1].read()
    module = _model(make_model, saved)
    found = tested(
        module, dataset, task=task, held_out=held_out, split=split, strata=strata,
        canaries=canaries, shadows=shadows, trained_at=trained_at, claim=claim, seed=seed,
        confidence=confidence, level=level, chunk_size=chunk_size,
        ids=(account.instance_ids, held_out_ids),
        configuration={
            "noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm,
            "sample_rate": rate, "steps": account.steps,
        },
    )  # fmt: skip
    clock.stop("scores and bounds")
    seen = _conformance(watched, run, claim, level)
    verdict, reasons = _verdict(found, seen, watched)
    scores = found.scores
    return Audit(
        verdict=verdict,
        reasons=reasons,
        claim=claim,
        worst_case_epsilon=account.worst_case_epsilon(delta),
        upper=spent,
        exposed=top,
        lower=found.lower,
        shown=found.shown,
        p_values=found.p_values,
        design=found.design,
        conformance=seen,
        attack=_attack(scores, shadows),
        notes=_notes(claim, len(dataset), found),
        hashes={"model": saved.sha256, "scores": _scores_hash(scores)},
        sizes={"rows": len(dataset), "held_out": 0 if held_out is None else len(held_out)},
        seconds=clock.seconds,
        records=_records(scores, account.instance_ids, spent.epsilon) if per_record else None,
        _trained={
            "module": lambda: _model(make_model, saved), "dataset": dataset,
            "criterion": criterion, "loss_of": loss_of,
        },
    )  # fmt: skip


class _Clock:
    """Wall time of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, part: str) -> None:
        """End a part and begin the next."""
        now = time.perf_counter()
        self.seconds[part], self._last = round(now - self._last, 3), now


def _require_design(
    held_out: Any,
    split: str | None,
    canaries: CanarySplit | None,
    shadows: Sequence[Shadow],
    trained_at: float | None,
) -> None:
    """Refuse what cannot be concluded from, before anything is measured."""
    if held_out is not None and canaries is not None:
        raise ValueError(
            "Expected held_out or canaries, got both. Canaries are the stronger design: leave "
            "held_out out."
        )
    if held_out is not None and split != "random":
        raise ValueError(
            check.expected(
                "split", "to be 'random' with held_out", split,
                "Members and held-out rows can be compared only if a coin decided which is which. "
                "A split by time, source or order proves nothing; if yours was drawn at random "
                "before training, say split='random'.",
            )
        )  # fmt: skip
    if shadows and canaries is None:
        raise ValueError(
            "Expected canaries with shadows, got none. Split first (canary_split), train shadows "
            "on canaries.again(generator).dataset."
        )
    if canaries is not None:
        canaries.require_trained(trained_at)


def _model(make_model: Callable[[], nn.Module] | nn.Module, saved: SavedWeights) -> nn.Module:
    made = copy.deepcopy(make_model) if isinstance(make_model, nn.Module) else make_model()
    module: nn.Module = getattr(made, "_module", made)
    fit_weights(module, saved)
    return module


def _runs(noise: Any, rate: Any, steps: int) -> tuple[tuple[float, float, int], ...]:
    """Join equal steps to runs."""
    noises = each_step(noise, "noise_multiplier", steps, lambda name, v: check.real(name, v))
    rates = each_step(rate, "sample_rate", steps, check.probability)
    pairs = zip(noises.tolist(), rates.tolist(), strict=True)
    return tuple((z, q, len(list(same))) for (z, q), same in itertools.groupby(pairs))


# --- putting together -----------------------------------------------------------------------------


def _conformance(
    watched: TrainingCheck | ScriptCheck | None, run: Trajectory, claim: Claim, level: float
) -> Conformance:
    """Return what was seen of the run, or that nobody looked."""
    training = _watched_training(watched)
    if training is not None:
        if training.claim != claim.runs:
            raise ValueError(
                "Expected watched to be a check of this training, got one of "
                f"{training.claim} against {claim.runs} (noise_multiplier, sample_rate, steps). "
                "Check the script that trained the model, as it was run."
            )
        return training.conformance
    counted = None if run.history is None else float(sum(r[2] for r in run.history))
    by_ledger = Check(
        "steps", "noisy steps by the accountant in the checkpoints", float(claim.steps), counted,
        state=UNKNOWN if counted is None else AGREES,
        reason="the checkpoints hold no accountant" if counted is None else "",
    )  # fmt: skip
    unseen = [
        Check(name, what, state=UNKNOWN, reason=_UNSEEN)
        for name, what in (
            ("noise", "noise std / accounted"),
            ("clip", "clipped sum, largest deviation"),
            ("rate", "rows drawn per step / rows of the data set"),
            ("divisor", "divisor of the sum"),
        )
    ]
    return Conformance((by_ledger, *unseen), level)


def _watched_training(watched: TrainingCheck | ScriptCheck | None) -> TrainingCheck | None:
    if isinstance(watched, ScriptCheck):
        if len(watched.trainings) != 1:
            raise ValueError(
                f"Expected a check of one training, got {len(watched.trainings)}. Pass the one of "
                "this model: watched=check.trainings[i]."
            )
        return watched.trainings[0]
    return watched


def _verdict(
    tested: Tested, seen: Conformance, watched: TrainingCheck | ScriptCheck | None
) -> tuple[str, tuple[str, ...]]:
    shares = shares_of(tested.design.level, tested.lower)
    reasons = [
        f"membership is told better than the claim allows ({bound.method}: ε >= "
        f"{rounded_down(bound.epsilon)}, p-value of the claim {p:.2g})"
        for bound, p, share in zip(tested.lower, tested.p_values, shares, strict=True)
        if p < share
    ]
    reasons += [f"{one.what}: {one.reason}" for one in seen.violations]
    if reasons:
        return RED, tuple(reasons)
    training = _watched_training(watched)
    if training is not None and training.verdict == RED:
        return RED, training.reasons
    if tested.design.powerful or (training is not None and training.verdict == CONSISTENT):
        return CONSISTENT, ()
    why = tested.design.why_none or (
        f"with {tested.design.units} {tested.design.kind} a training of twice the claimed ε would "
        "not have been seen either at this level; more rows, or canaries (canary_split, or "
        "`opacus-pil check`), see more"
    )
    return POWERLESS, (why,)


def _notes(claim: Claim, rows: int, tested: Tested) -> tuple[str, ...]:
    notes = []
    if claim.runs:
        rate = claim.runs[0][1]
        notes.append(
            f"N is public: Opacus divides sums by int(N·q) = {int(rows * rate)}, and rate and "
            f"divisor tell N to within {math.ceil(1.0 / rate) if rate else 0} rows (opacus#571, "
            "#819)"
        )
    notes.append(
        "the claim is about one record added or removed"
        + (
            "; pairs test one record exchanged for another, which has a larger ε of its own"
            if tested.design.kind == "pairs"
            else ""
        )
    )
    notes += [
        f"{bound.method}: at {bound.confidence:g} it lies above the claim, as happens to correct "
        f"trainings too; the verdict's own level is {tested.design.level:g}"
        for bound in tested.lower
        if bound.epsilon > tested.design.claimed_epsilon
    ]
    notes.append("trials of hyper-parameters on the private data are in no ε here")
    return tuple(notes)


def _attack(scores: Sequence[tuple[Hashable, bool, float]], shadows: Sequence[Shadow]) -> Any:
    members = [inside for _, inside, _ in scores]
    if not any(members) or all(members):
        return None
    name = "likelihood ratio against shadow models" if shadows else "loss of the final model"
    return attack_summary([s for _, _, s in scores], members=members, attack=name)


def _scores_hash(scores: Sequence[tuple[Hashable, bool, float]]) -> str | None:
    if not scores:
        return None
    lines = sorted(f"{i!r} {int(inside)} {score!r}" for i, inside, score in scores)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _records(
    scores: Sequence[tuple[Hashable, bool, float]], ids: Any, epsilon: FloatArray
) -> tuple[dict[str, Any], ...]:
    own = dict(zip(ids.tolist(), epsilon.tolist(), strict=True))
    if not scores:
        return tuple({"id": i, "member": True, "epsilon": e} for i, e in own.items())
    return tuple(
        {"id": i, "member": inside, "score": score, "epsilon": own.get(i) if inside else None}
        for i, inside, score in scores
    )
