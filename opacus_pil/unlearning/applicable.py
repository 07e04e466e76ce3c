"""Which certificates hold for forgetting these rows by this method, with and without worst case.

Reads the ledger and what has run so far; every refusal names the assumption that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._validate import IntArray
from ..accounting import PerInstanceAccountant
from ..certificates import Certificate, DataProcessingCertificate, best_of
from ..errors import CertificateError
from .glm import OneOutputRun
from .methods import Method, of_the_kernel
from .state import TrainedState

AndWorst = tuple[Certificate, Certificate | None]  # and the same in the worst case, where known


@dataclass(frozen=True, kw_only=True)
class Question:
    """What certificates are asked about.

    Attributes:
        rows: To be forgotten, beside those that were before.
        method: By which they are.
        measured: Use the sensitivities the ledger stands at, whatever its label: a prediction.
        adaptive: The request was chosen after a look at released models.
        evidence: Raises where no certificate may rest on the ledger.
        random_rows: Says whether items are drawn anew whenever they are asked for.
    """

    rows: IntArray
    method: Method
    measured: bool
    adaptive: bool
    evidence: Callable[[], None]
    random_rows: Callable[[], bool]


def certificates_for(state: TrainedState, asked: Question) -> AndWorst:
    """Return the certificate that everything forgotten up to now is forgotten, and its worst case.

    Raises:
        CertificateError: None applies.
    """
    if any(phase.private_length for phase in state.phases):
        raise CertificateError(
            "Expected every run so far to have a length fixed before it, got one that stopped on "
            "what the model showed, or that took predicted steps. Its length depends on private "
            "data; use method='noisy_finetuning'."
        )
    if state.account is None:
        raise CertificateError(
            "Expected privacy_engine for a certified plan, got None. Train with "
            "PerInstancePrivacyEngine, pass a certificate, or pass steps."
        )
    if not asked.method.contracts or asked.adaptive:
        # Of all bounds only this one is on the whole transcript, released models included: given a
        # release, the others' two runs are no longer hidden by the noise of the steps before it.
        return _training_alone(state, asked)
    ours, worst = _contraction(state, asked)
    assert state.kernel is not None
    if state.kernel.sample_rate == 1.0:
        return ours, worst  # never above what training alone gives: a_t = s_t is one way to hide
    try:  # mini-batches: contraction knows no amplification by sampling, training alone does
        trained, _ = _training_alone(state, asked)
    except CertificateError:
        return ours, worst
    return best_of([ours, trained]), worst


def _contraction(state: TrainedState, asked: Question) -> AndWorst:
    """Return what follows from contraction, if the run so far is one that it is proved for."""
    others = [phase.method for phase in state.phases if not of_the_kernel(phase.method)]
    if others:
        raise CertificateError(
            f"Expected every step so far to be one of the training's kernel, got a run of method "
            f"{others[0]!r}. Contraction does not follow it; use method='noisy_finetuning'."
        )
    run = OneOutputRun(state, measured=asked.measured, evidence=asked.evidence)
    if not asked.measured and asked.random_rows():
        raise CertificateError(
            "Expected items that are the same whenever they are asked for, got random ones. Their "
            "features cannot be held against feature_norm; use method='dp_sgd'."
        )
    everyone = sorted(state.forgotten.union(asked.rows.tolist()))
    parts = [
        (phase.steps, [row for row in everyone if row not in phase.forgotten])
        for phase in state.phases
    ]
    return run.certificate(phases=parts), run.certificate(phases=parts, worst_case=True)


def _training_alone(state: TrainedState, asked: Question) -> AndWorst:
    """Return what the whole transcript of training bounds, whatever steps follow."""
    ledger = state.ledger
    assert ledger is not None
    # Under a budget `guarantee` vouches for each instance; a set's loss is as realised.
    bound = asked.measured or ledger.guarantee == "bound"
    if not asked.measured:
        asked.evidence()
    everyone = np.array(sorted(state.forgotten.union(asked.rows.tolist())), dtype=np.int64)
    _require_bounded(ledger, bound=bound, members=len(everyone))
    orders = ledger.orders.tolist()
    if len(everyone) > 1:  # a member that was forgotten weighs nothing from then on
        return DataProcessingCertificate(ledger.group_rdp(everyone).tolist(), orders), None
    return (
        DataProcessingCertificate(np.asarray(ledger.rdp(asked.rows)[0]).tolist(), orders),
        DataProcessingCertificate(ledger.worst_case_rdp().tolist(), orders),
    )


def _require_bounded(ledger: PerInstanceAccountant, *, bound: bool, members: int) -> None:
    """Raise unless the ledger bounds what training gave away about so many instances together."""
    group = ledger.keeps_history and not ledger.budgeted
    if bound and (members == 1 or group):
        return
    why = "" if bound or not ledger.reasons else f" ({'; '.join(ledger.reasons)})"
    raise CertificateError(
        "Expected one instance, or a set and a ledger with history, and the label 'bound' for "
        f"a certificate from training alone, got {members} instances and "
        f"{ledger.guarantee!r}{why}. A sum of per-instance losses does not bound a set. Pass a "
        "certificate, or steps for a run without a claim."
    )
