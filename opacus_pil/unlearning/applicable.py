"""Which certificates hold for forgetting these rows by this method, with and without worst case.

Reads the ledger and what has run so far; every refusal names the assumption that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from .._validate import IntArray
from ..certificates import Certificate, DataProcessingCertificate, best_of
from ..errors import CertificateError
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Task
from .glm import OneOutputRun
from .phase import Phase

_SAME_KERNEL = ("training", "dp_sgd", "langevin", "retraining")  # steps of the training's kernel


def certificates_for(
    rows: IntArray,
    *,
    method: str,
    measured: bool,
    adaptive: bool,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    evidence: Callable[[], None],
    random_rows: Callable[[], bool],
    dataset: Dataset,
    present: IntArray,
    privacy_engine: PerInstancePrivacyEngine | None,
    feature_norm: float | None,
    phases: Sequence[Phase],
    forgotten: frozenset[int],
) -> tuple[Certificate, Certificate | None]:
    """Return the certificate that everything forgotten up to now is forgotten, and its worst case.

    Args:
        measured: Use the sensitivities the ledger stands at, whatever its label: a prediction.
        adaptive: The request was chosen after a look at released models.
        evidence: Raises where no certificate may rest on the ledger.
        random_rows: Says whether items are drawn anew whenever they are asked for.
        present: Rows that were not forgotten before.
        phases: What has run.
        forgotten: Rows forgotten so far.

    Raises:
        CertificateError: None applies.
    """
    if method == "noisy_finetuning":
        raise CertificateError(
            "Expected a NoisyFineTuningCertificate for method 'noisy_finetuning', got none. Pass "
            "certificate=: the run follows its clips, step size, decay and noise."
        )
    if any(phase.private_length for phase in phases):
        raise CertificateError(
            "Expected every run so far to have a length fixed before it, got one that stopped on "
            "what the model showed, or that took predicted steps. Its length depends on private "
            "data; use method='noisy_finetuning'."
        )
    if privacy_engine is None:
        raise CertificateError(
            "Expected privacy_engine for a certified plan, got None. Train with "
            "PerInstancePrivacyEngine, pass a certificate, or pass steps."
        )
    if method != "langevin" or adaptive:
        # Of all bounds only this one is on the whole transcript, released models included: given a
        # release, the others' two runs are no longer hidden by the noise of the steps before it.
        return _training_alone(
            rows, privacy_engine, forgotten, measured=measured, evidence=evidence
        )
    others = [phase.method for phase in phases if phase.method not in _SAME_KERNEL]
    if others:
        raise CertificateError(
            f"Expected every step so far to be one of the training's kernel, got a run of method "
            f"{others[0]!r}. Contraction does not follow it; use method='noisy_finetuning'."
        )
    run = OneOutputRun(
        module,
        optimizer=optimizer,
        task=task,
        dataset=dataset,
        present=present,
        privacy_engine=privacy_engine,
        feature_norm=feature_norm,
        measured=measured,
        evidence=evidence,
    )
    if not measured and random_rows():
        raise CertificateError(
            "Expected items that are the same whenever they are asked for, got random ones. Their "
            "features cannot be held against feature_norm; use method='dp_sgd'."
        )
    everyone = sorted(forgotten.union(rows.tolist()))
    parts = [
        (phase.steps, [row for row in everyone if row not in phase.forgotten]) for phase in phases
    ]
    ours = run.certificate(phases=parts)
    worst = run.certificate(phases=parts, worst_case=True)
    if privacy_engine.kernel.sample_rate == 1.0:
        return ours, worst  # never above what training alone gives: a_t = s_t is one way to hide
    try:  # mini-batches: contraction knows no amplification by sampling, training alone does
        trained, _ = _training_alone(
            rows, privacy_engine, forgotten, measured=measured, evidence=evidence
        )
    except CertificateError:
        return ours, worst
    return best_of([ours, trained]), worst


def _training_alone(
    rows: IntArray,
    privacy_engine: PerInstancePrivacyEngine,
    forgotten: frozenset[int],
    *,
    measured: bool,
    evidence: Callable[[], None],
) -> tuple[Certificate, Certificate | None]:
    """Return what the whole transcript of training bounds, whatever steps follow."""
    ledger = privacy_engine.per_instance
    orders = ledger.orders.tolist()
    # Under a budget `guarantee` vouches for each instance; a set's loss is as realised.
    bound = measured or ledger.guarantee == "bound"
    if not measured:
        evidence()
    everyone = np.array(sorted(forgotten.union(rows.tolist())), dtype=np.int64)
    group = ledger.keeps_history and not ledger.budgeted
    if not bound or not (len(everyone) == 1 or group):
        why = "" if bound or not ledger.reasons else f" ({'; '.join(ledger.reasons)})"
        raise CertificateError(
            "Expected one instance, or a set and a ledger with history, and the label 'bound' for "
            f"a certificate from training alone, got {len(everyone)} instances and "
            f"{ledger.guarantee!r}{why}. A sum of per-instance losses does not bound a set. Pass a "
            "certificate, or steps for a run without a claim."
        )
    if len(everyone) > 1:  # a member that was forgotten weighs nothing from then on
        return DataProcessingCertificate(ledger.group_rdp(everyone).tolist(), orders), None
    return (
        DataProcessingCertificate(np.asarray(ledger.rdp(rows)[0]).tolist(), orders),
        DataProcessingCertificate(ledger.worst_case_rdp().tolist(), orders),
    )
