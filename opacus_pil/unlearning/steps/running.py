"""From a plan's method to the steps that carry it out, from where a killed run left off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..._validate import IntArray
from ...certificates import NoisyFineTuningCertificate
from ...errors import CertificateError
from ...privacy_engine import PerInstancePrivacyEngine
from ...training.account import Account
from ...training.task import Task
from ..generators import Generators
from ..methods import METHOD, Term
from ..plan import CertifiedPlan, UnlearningPlan
from .averaged import noisy_finetuning_steps
from .extra_terms import gradient_difference, l1_sparse
from .noisy import noisy_steps
from .plain import AfterStep, ExtraTerm, plain_steps


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The rest of a run: what is left of a plan, and what its steps work on.

    Attributes:
        plan: What is carried out.
        done: Steps that were taken before.
        module, optimizer: Plain; changed in place.
        privacy_engine: Of the training, whose kernel noisy steps keep; None: there is none.
        account: The ledgers that noisy steps charge, with `privacy_engine`.
        generators: Of batches and noise.
        dataset, task, evaluated, retain_set, batch_size: Of the trained model.
        after_step: Told how many steps of this stretch were taken.
        progress: Moves with them.
    """

    plan: UnlearningPlan
    done: int
    module: nn.Module
    optimizer: torch.optim.Optimizer
    privacy_engine: PerInstancePrivacyEngine | None
    account: Account | None
    generators: Generators
    dataset: Dataset
    task: Task
    evaluated: frozenset[str]
    retain_set: IntArray
    batch_size: float
    after_step: AfterStep
    progress: tqdm

    @property
    def remaining(self) -> int:
        """Steps that are left."""
        return self.plan.steps - self.done

    def common(self) -> dict[str, Any]:
        """Return the arguments that all kinds of steps share."""
        return {
            "dataset": self.dataset,
            "task": self.task,
            "evaluated": self.evaluated,
            "retain_set": self.retain_set,
            "steps": self.remaining,
            "sampler_generator": self.generators.sampler,
            "sampler_state": self.generators.sampler_state,
            "after_step": self.after_step,
            "progress": self.progress,
        }


def take_steps(stretch: Stretch) -> None:
    """Take the plan's remaining steps on `stretch.module`, in place, or until `after_step` stops.

    Raises:
        CertificateError: A certified plan without a ledger to run by.
    """
    method = METHOD[stretch.plan.method]
    if method.own_constants:
        _averaged(stretch)  # also for no steps: the model is clipped before the first one
    elif stretch.remaining == 0:
        return  # already finished, or what is left of the forget set needs no step
    elif method.noisy and stretch.privacy_engine is not None:
        _noisy(stretch)
    else:
        _plain(stretch)


def _averaged(stretch: Stretch) -> None:
    plan = stretch.plan
    assert isinstance(plan, CertifiedPlan)
    assert isinstance(plan.certificate, NoisyFineTuningCertificate)
    noisy_finetuning_steps(
        stretch.module,
        certificate=plan.certificate,
        batch_size=stretch.batch_size,
        done=stretch.done,
        noise_generator=stretch.generators.noise,
        privacy_engine=stretch.privacy_engine,
        account=stretch.account,
        **stretch.common(),
    )


def _noisy(stretch: Stretch) -> None:
    assert stretch.privacy_engine is not None
    assert stretch.account is not None
    noisy_steps(
        stretch.module,
        optimizer=stretch.optimizer,
        privacy_engine=stretch.privacy_engine,
        account=stretch.account,
        noise_generator=stretch.generators.noise,
        **stretch.common(),
    )


def _plain(stretch: Stretch) -> None:
    if isinstance(stretch.plan, CertifiedPlan):
        raise CertificateError(
            "Expected steps with noise for a certified plan, got a run without privacy_engine."
        )
    plain_steps(
        stretch.module,
        optimizer=stretch.optimizer,
        batch_size=max(int(stretch.batch_size), 1),
        extra=_extra_term(stretch),
        **stretch.common(),
    )


def _extra_term(stretch: Stretch) -> ExtraTerm | None:
    """Return what the method adds to the loss of a retained batch."""
    plan, term = stretch.plan, METHOD[stretch.plan.method].term
    if term is None:
        return None
    assert plan.strength is not None
    if term is Term.PENALTY:
        return l1_sparse(strength=plan.strength, steps=plan.steps, done=stretch.done)
    return gradient_difference(
        strength=plan.strength,
        dataset=stretch.dataset,
        forget_set=plan.forget_set,
        task=stretch.task,
        batch_size=max(int(stretch.batch_size), 1),
        generator=stretch.generators.sampler,
    )
